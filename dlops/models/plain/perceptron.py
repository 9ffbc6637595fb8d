"""Perceptrons in plain torch.nn."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


class McCullochPitts(nn.Linear):
    """1 where the weighted sum reaches -bias, else 0."""

    def __init__(self, in_features: int, out_features: int = 1) -> None:
        super().__init__(in_features, out_features)

    def forward(self, input: Tensor) -> Tensor:
        return (super().forward(input) >= 0).to(input.dtype)


class Perceptron(nn.Linear):
    """The sign of an affine function."""

    def __init__(self, in_features: int, out_features: int = 1) -> None:
        super().__init__(in_features, out_features)

    def forward(self, input: Tensor) -> Tensor:
        return torch.sign(super().forward(input))


class MLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, sizes: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class MaxoutNetwork(nn.Module):
    """Linear layers with the maximum over groups of num_pieces outputs after them."""

    def __init__(self, sizes: Sequence[int], num_pieces: int = 2) -> None:
        super().__init__()
        hidden = [nn.Linear(a, b * num_pieces) for a, b in pairwise(sizes[:-1])]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))
        self.num_pieces = num_pieces

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).unflatten(-1, (-1, self.num_pieces)).max(-1).values
        return self.layers[-1](x)
