"""The static gates: what the compiled kernels look like on chips that are not there. ``python -m bench --static``."""
