"""The blocks of :mod:`dlops.models` in plain torch.nn, with the same state dicts: what they are checked against."""

from dlops.models.plain.mamba import Mamba, MambaBlock, MambaMixer
from dlops.models.plain.perceptron import MLP, MaxoutNetwork, McCullochPitts, Perceptron

__all__ = ["MLP", "Mamba", "MambaBlock", "MambaMixer", "MaxoutNetwork", "McCullochPitts", "Perceptron"]
