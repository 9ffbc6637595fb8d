"""Normalisation modules: torch.nn's, on dlops ops."""

import torch
from torch import Tensor

from dlops import functional as F


class RMSNorm(torch.nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` on :func:`dlops.functional.rms_norm`; the same arguments and state dict."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)  # type: ignore[arg-type]


class LayerNorm(torch.nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` on :func:`dlops.functional.layer_norm`; the same arguments and state dict."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)  # type: ignore[arg-type]
