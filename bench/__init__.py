"""Benchmarks: ``python -m bench --help``. A module here that declares cases with ``@case`` is found by itself."""
