"""Perceptrons: the McCulloch-Pitts neuron, Rosenblatt's perceptron, the MLP and the maxout network."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dlops.nn import Linear, LinearAct, Maxout


class McCullochPitts(LinearAct):
    """Threshold neurons: 1 where the weighted sum of the inputs reaches the threshold, else 0.

    McCulloch and Pitts, "A Logical Calculus of the Ideas Immanent in Nervous Activity", 1943. The threshold is
    ``-bias``. x: (..., in_features); returns (..., out_features) of zeros and ones, x's dtype; no gradient flows.
    """

    def __init__(self, in_features: int, out_features: int = 1) -> None:
        super().__init__(in_features, out_features, activation="step")


class Perceptron(LinearAct):
    """Rosenblatt's perceptron: the sign of an affine function, and the rule that learns it.

    Rosenblatt, "The Perceptron: A Probabilistic Model for Information Storage and Organization in the Brain", 1958.
    x: (..., in_features); returns (..., out_features) of -1, 0 and 1.
    """

    def __init__(self, in_features: int, out_features: int = 1) -> None:
        super().__init__(in_features, out_features, activation="sign")

    @torch.no_grad()
    def learn(self, x: Tensor, target: Tensor, lr: float = 1.0) -> int:
        """One step of the perceptron rule on a batch: weight += lr (target - output) x / 2.

        Args:
            x: (batch, in_features).
            target: (batch, out_features) of -1 and 1.

        Returns:
            How many outputs were wrong before the step.
        """
        error = (target - self(x)) / 2
        self.weight += lr * error.T @ x
        self.bias += lr * error.sum(0)
        return int(error.count_nonzero())


class MLP(nn.Module):
    """Multilayer perceptron: linear layers with the activation fused, and a linear one at the end.

    Args:
        sizes: in_features, the width of each hidden layer, out_features.
        activation: as :func:`dlops.functional.linear_act`.

    x: (..., sizes[0]); returns (..., sizes[-1]).
    """

    def __init__(self, sizes: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        hidden = [LinearAct(a, b, activation=activation) for a, b in pairwise(sizes[:-1])]
        self.layers = nn.Sequential(*hidden, Linear(sizes[-2], sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MaxoutNetwork(nn.Module):
    """Maxout layers and a linear one at the end. Goodfellow et al., "Maxout Networks", 2013.

    Args:
        sizes: in_features, the width of each hidden layer, out_features.
        num_pieces: affine functions per hidden unit.

    x: (..., sizes[0]); returns (..., sizes[-1]).
    """

    def __init__(self, sizes: Sequence[int], num_pieces: int = 2) -> None:
        super().__init__()
        hidden = [Maxout(a, b, num_pieces) for a, b in pairwise(sizes[:-1])]
        self.layers = nn.Sequential(*hidden, Linear(sizes[-2], sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
