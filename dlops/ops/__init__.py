"""Ops: definition, autograd formula and measured choice of backend, one file per family."""

from dlops.ops import linear, norm

__all__ = ["linear", "norm"]
