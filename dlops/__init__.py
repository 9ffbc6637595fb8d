"""dlops: fused kernels for PyTorch, each op with CUDA, Triton and CPU implementations of identical semantics."""

from dlops import functional, nn
from dlops.backend import backends, explain, use_backend

from dlops._version import __version__

