"""Linear modules: torch.nn's, and those with an activation, a gate or a maximum fused."""

import torch
from torch import Tensor
from torch.nn import Parameter

from dlops import functional as F
from dlops.ops.activation import activation_params


class Linear(torch.nn.Linear):
    """:class:`torch.nn.Linear` on :func:`dlops.functional.linear`; the same arguments and state dict."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class LinearAct(torch.nn.Linear):
    """A linear layer and the activation after it in one pass; :class:`torch.nn.Linear`'s state dict.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`.
        activation, params: as :func:`dlops.functional.linear_act`.
    """

    activation: str
    activation_params: dict[str, float]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **params: float,
    ) -> None:
        activation_params("LinearAct", activation, params)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.activation_params = params

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_act(input, self.weight, self.bias, self.activation, **self.activation_params)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class GatedLinear(torch.nn.Module):
    """activation(gate(x)) * up(x): the first half of a SwiGLU feed-forward (Shazeer, 2020).

    Args:
        in_features, out_features: sizes of the last dimension.
        bias: whether both products add a bias.
        activation, params: as :func:`dlops.functional.gated_linear`.

    State dict: ``weight_gate``, ``weight_up`` (out_features, in_features), ``bias_gate``, ``bias_up`` (out_features,).
    """

    weight_gate: Parameter
    weight_up: Parameter
    bias_gate: Parameter | None
    bias_up: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **params: float,
    ) -> None:
        activation_params("GatedLinear", activation, params)
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.activation_params = activation, params
        for name in ("gate", "up"):
            weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
            self.register_parameter(f"weight_{name}", Parameter(weight))
            vector = Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"bias_{name}", vector)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch.nn.Linear's initialisation, for both products."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return F.gated_linear(
            input,
            self.weight_gate,
            self.weight_up,
            self.bias_gate,
            self.bias_up,
            self.activation,
            **self.activation_params,
        )

    def extra_repr(self) -> str:
        bias = self.bias_gate is not None
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {bias=}, activation={self.activation!r}"


class Maxout(torch.nn.Linear):
    """The largest of ``num_pieces`` affine functions per output (Goodfellow et al., "Maxout Networks", 2013).

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`.
        num_pieces: affine functions per output.

    State dict: ``weight`` (out_features * num_pieces, in_features), the pieces of one output adjacent, and ``bias``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_pieces: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features * num_pieces, bias, device, dtype)
        self.out_features, self.num_pieces = out_features, num_pieces

    def forward(self, input: Tensor) -> Tensor:
        return F.maxout_linear(input, self.weight, self.bias, self.num_pieces)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_pieces={self.num_pieces}"
