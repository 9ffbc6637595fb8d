"""Triton kernels and their launchers, one module per family of ops: each launcher has its op's name, arguments and results."""
