"""dlops: fused kernels for PyTorch, each op with CUDA, Triton and CPU implementations of identical semantics."""

from dlops import functional, nn
from dlops._version import __version__
from dlops.backend import backends, explain, use_backend
from dlops.patch import patch, unpatch

__all__ = ["__version__", "backends", "explain", "functional", "nn", "patch", "unpatch", "use_backend"]
