"""torch.nn's modules on dlops ops, with the same state dicts, and the fused ones."""

from dlops.nn.fused import FusedActivation
from dlops.nn.linear import GatedLinear, Linear, LinearAct, Maxout
from dlops.nn.norm import LayerNorm, RMSNorm

__all__ = ["FusedActivation", "GatedLinear", "LayerNorm", "Linear", "LinearAct", "Maxout", "RMSNorm"]
