"""What stands where an activation was once the linear layer before it applies it."""

import torch
from torch import Tensor


class FusedActivation(torch.nn.Module):
    """Identity: :class:`dlops.nn.LinearAct` before it has applied the activation already.

    :func:`dlops.patch` gives this class to an activation module it has fused; :func:`dlops.unpatch` takes it away.
    """

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        original = vars(self).get("_dlops_original")
        return original.__name__ if original else ""
