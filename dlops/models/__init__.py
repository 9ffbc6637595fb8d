"""Reference model blocks built from dlops.nn and dlops.functional; :mod:`dlops.models.plain` has the plain twins."""

from dlops.models.perceptron import MLP, MaxoutNetwork, McCullochPitts, Perceptron

__all__ = ["MLP", "MaxoutNetwork", "McCullochPitts", "Perceptron"]
