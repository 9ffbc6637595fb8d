"""The version of dlops."""

__version__ = "0.1.0"
