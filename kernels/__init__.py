"""Triton kernels and their launchers, a module per family: a launcher has its op's name, arguments and results."""
