
from dlops.nn.linear import GatedLinear, Linear, LinearAct, Maxout
from dlops.nn.norm import LayerNorm, RMSNorm

__all__ = ["GatedLinear", "LayerNorm", "Linear", "LinearAct", "Maxout", "RMSNorm"]
