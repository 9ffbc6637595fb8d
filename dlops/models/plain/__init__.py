"""The blocks of :mod:`dlops.models` in plain torch.nn, with the same state dicts: what they are checked against."""

from dlops.models.plain.mamba import Mamba, MambaBlock, MambaMixer
from dlops.models.plain.mamba2 import Mamba2, Mamba2Mixer
from dlops.models.plain.perceptron import MLP, MaxoutNetwork, McCullochPitts, Perceptron
from dlops.models.plain.s4d import S4D
from dlops.models.plain.s5 import S5

__all__ = [
    "MLP",
    "S4D",
    "S5",
    "Mamba",
    "Mamba2",
    "Mamba2Mixer",
    "MambaBlock",
    "MambaMixer",
    "MaxoutNetwork",
    "McCullochPitts",
    "Perceptron",
]
