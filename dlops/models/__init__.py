"""Reference model blocks built from dlops.nn and dlops.functional; :mod:`dlops.models.plain` has the plain twins."""

from dlops.models.mamba import Mamba, MambaBlock, MambaMixer, MambaState, mamba_130m
from dlops.models.mamba2 import Mamba2, Mamba2Mixer, mamba2_130m
from dlops.models.perceptron import MLP, MaxoutNetwork, McCullochPitts, Perceptron
from dlops.models.s4d import S4D
from dlops.models.s5 import S5

__all__ = [
    "MLP",
    "S4D",
    "S5",
    "Mamba",
    "Mamba2",
    "Mamba2Mixer",
    "MambaBlock",
    "MambaMixer",
    "MambaState",
    "MaxoutNetwork",
    "McCullochPitts",
    "Perceptron",
    "mamba2_130m",
    "mamba_130m",
]
