"""torch.nn.functional's names and signatures, and the fused functions beside them.

A function that torch has takes the same arguments, raises the same errors and gives the same result: what the kernels
do not serve (other dtypes, mixed dtypes, arguments that torch rejects) goes to torch's own function. So do small
inputs, where torch's eager function is faster than any op call.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import elu, gelu, hardswish, leaky_relu, mish, relu, sigmoid, silu, softplus, tanh
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dlops import backend
from dlops.functional.conv1d import causal_conv1d
from dlops.functional.diagonal import diagonal_scan, fft_conv1d, s4d_kernel
from dlops.functional.linear_scan import linear_scan
from dlops.functional.scan import selective_scan
from dlops.functional.ssd_scan import ssd_scan
from dlops.functional.state_update import causal_conv1d_update, selective_state_update
from dlops.ops._check import FLOATING, Arguments, check_eps
from dlops.ops._linear_backends import CPU_KERNELS, SLOW_HALVES, onednn_wins
from dlops.ops.activation import FROM_OUTPUT, activate, activation_params
from dlops.ops.linear import gated_linear as gated_op
from dlops.ops.linear import linear_act as linear_op
from dlops.ops.linear import maxout_linear as maxout_op
from dlops.ops.norm import add_layer_norm as add_layer_norm_op
from dlops.ops.norm import add_rms_norm as add_rms_norm_op
from dlops.ops.norm import layer_norm as layer_norm_op
from dlops.ops.norm import rms_norm as rms_norm_op

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "diagonal_scan",
    "elu",
    "fft_conv1d",
    "gated_linear",
    "gelu",
    "hardswish",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_act",
    "linear_scan",
    "maxout_linear",
    "mish",
    "relu",
    "rms_norm",
    "s4d_kernel",
    "selective_scan",
    "selective_state_update",
    "sigmoid",
    "silu",
    "softplus",
    "ssd_scan",
    "tanh",
]

_FLOATS = frozenset(backend.KERNEL_DTYPES)
# Below this much work (elements; products) torch's own functions beat an op call on a CPU: bench rows small/*, and
# layer_norm's, which is as fast as torch's within the caches and faster past them.
_SMALL_NORM = 1 << 20
_SMALL_ADD_NORM = 32768
_SMALL_LINEAR = 1 << 21
# What a wrong argument may raise before it is named.
_ERRORS = (AttributeError, RuntimeError, TypeError, ValueError)


def _a_tensor(x: Any) -> bool:
    """Whether x is a tensor to compute with. torch's own functions name what is none, and serve what records them: a
    torch.fx proxy, torch.jit.trace."""
    return isinstance(x, Tensor) and torch._C._get_tracing_state() is None


def _check_types(op: str, required: dict[str, Any], **optional: Any) -> None:
    """Raise TypeError for what is no tensor. Called once something else has failed: it costs no other call time."""
    for name, value in (required | optional).items():
        if not isinstance(value, Tensor) and (value is not None or name in required):
            accepted = "a Tensor" if name in required else "a Tensor or None"
            raise TypeError(f"{op}: {name} is of type {type(value).__name__}, accepted is {accepted}")


def _plain(x: Tensor, weight: Tensor, *biases: Tensor | None) -> bool:
    """Whether eager torch serves a fused linear function: nothing is forced, there is little work or no kernel, and
    torch would not broadcast or promote a bias that the op rejects."""
    if not _a_tensor(x):
        return True
    device, dtype = x.device, x.dtype
    if backend.forced() is not None or weight.dim() != 2 or x.dim() == 0 or weight.device != device:
        return False
    features = weight.shape[0]
    for bias in biases:
        if bias is None:
            continue
        if bias.dim() != 1 or bias.numel() != features or bias.dtype is not dtype or bias.device != device:
            return False
    if dtype not in _FLOATS:
        return dtype == torch.float64
    if torch.compiler.is_compiling():
        return False
    # Kernels read neither nested nor sparse tensors.
    return x.numel() * features < _SMALL_LINEAR or x.is_nested or weight.layout is not torch.strided


def _keeps(activation: str, *tensors: Tensor | None) -> bool:
    """Whether the backward will need the pre-activation."""
    if activation in FROM_OUTPUT or not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


# ---- linear --------------------------------------------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`: input (..., in_features), weight (out_features, in_features)."""
    if not _linear_served(input, weight, bias):
        return F.linear(input, weight, bias)
    return linear_op(input, weight, bias, "none", [], False)[0]


def _linear_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not (_a_tensor(x) and isinstance(weight, Tensor)):
        return False
    forced = backend.forced()
    if forced is not None and forced != "torch":
        return True
    if weight.dim() != 2 or x.dim() == 0:
        return False
    if forced is None:
        # Kernels read neither nested nor sparse tensors.
        if not x.is_cpu or x.is_nested or x.layout is not torch.strided or weight.layout is not torch.strided:
            return False
        # bench rows linear: torch's own product is what every backend here calls, but for halves on an AVX2 CPU, and
        # where oneDNN beats MKL.
        if not (CPU_KERNELS and (x.dtype in SLOW_HALVES or onednn_wins(x))):
            return False
        if not torch.compiler.is_compiling() and x.numel() * weight.shape[0] < _SMALL_LINEAR:
            return False
    if weight.shape[1] != x.shape[-1] or not _alike(x, weight, bias):
        return False
    return bias is None or bias.shape == weight.shape[:1]


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    return all(t is None or (isinstance(t, Tensor) and t.dtype == x.dtype and t.device == x.device) for t in others)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu", **params: float
) -> Tensor:
    """activation(x weight^T + bias) in one pass.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        weight: (out_features, in_features), x's dtype and device.
        bias: (out_features,) or None.
        activation: ``none``, ``step`` (1 where >= 0, else 0), ``sign``, ``relu``, ``leaky_relu``, ``elu``,
            ``sigmoid``, ``tanh``, ``gelu`` (erf), ``gelu_tanh``, ``silu``, ``relu2`` (relu squared), ``hardswish``,
            ``mish`` or ``softplus``.
        params: the activation's, by torch's names: ``negative_slope`` (leaky_relu), ``alpha`` (elu), ``beta`` and
            ``threshold`` (softplus).

    Returns:
        (..., out_features), x's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: an unknown activation.
        TypeError: what is no tensor or number, or a parameter that the activation does not take.
    """
    values = activation_params("linear_act", activation, params)
    try:
        if _plain(x, weight, bias):
            return activate(F.linear(x, weight, bias), activation, values)
        return linear_op(x, weight, bias, activation, values, _keeps(activation, x, weight, bias))[0]
    except _ERRORS:
        _check_types("linear_act", {"x": x, "weight": weight}, bias=bias)
        linear_op.check(x, weight, bias, activation, values, False)
        raise


def gated_linear(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
    activation: str = "silu",
    **params: float,
) -> Tensor:
    """activation(x weight_gate^T + bias_gate) * (x weight_up^T + bias_up): SwiGLU (``silu``), GeGLU (``gelu``), ReGLU
    (``relu``), GLU (``sigmoid``), bilinear (``none``). Shazeer, "GLU Variants Improve Transformer", 2020.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        weight_gate, weight_up: (out_features, in_features), x's dtype and device.
        bias_gate, bias_up: (out_features,) or None.
        activation, params: as in :func:`linear_act`.

    Returns:
        (..., out_features), x's dtype.

    Raises:
        RuntimeError, ValueError, TypeError: as :func:`linear_act`.
    """
    values = activation_params("gated_linear", activation, params)
    inputs = (x, weight_gate, weight_up, bias_gate, bias_up)
    try:
        alike = not _a_tensor(x) or (weight_gate.shape == weight_up.shape and weight_up.device == weight_gate.device)
        if alike and _plain(x, weight_gate, bias_gate, bias_up):
            return activate(F.linear(x, weight_gate, bias_gate), activation, values) * F.linear(x, weight_up, bias_up)
        # The gate's own derivative may need only its output, but the product's needs both factors.
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        return gated_op(*inputs, activation, values, keep)[0]
    except _ERRORS:
        weights = {"weight_gate": weight_gate, "weight_up": weight_up}
        _check_types("gated_linear", {"x": x, **weights}, bias_gate=bias_gate, bias_up=bias_up)
        gated_op.check(*inputs, activation, values, False)
        raise


def maxout_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, num_pieces: int = 2) -> Tensor:
    """The largest of ``num_pieces`` affine functions of x per output. Goodfellow et al., "Maxout Networks", 2013.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        weight: (out_features * num_pieces, in_features): the pieces of one output are adjacent rows.
        bias: (out_features * num_pieces,) or None.

    Returns:
        (..., out_features), x's dtype. Among equal pieces the gradient flows to the first, as in ``torch.max``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: ``num_pieces`` does not divide weight's rows.
        TypeError: what is no tensor or int.
    """
    try:
        if num_pieces > 0 and _plain(x, weight, bias):
            return F.linear(x, weight, bias).unflatten(-1, (weight.shape[0] // num_pieces, num_pieces)).max(-1).values
        return maxout_op(x, weight, bias, num_pieces)[0]
    except _ERRORS:
        _check_types("maxout_linear", {"x": x, "weight": weight}, bias=bias)
        maxout_op.check(x, weight, bias, num_pieces)
        raise


# ---- norms ---------------------------------------------------------------------------------------------------------


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """:func:`torch.nn.functional.rms_norm`: input (..., *normalized_shape), weight normalized_shape or None; eps None
    is the epsilon of the dtype that the norm is computed in."""
    dims = _norm_dims(input, normalized_shape, (weight,), 0.0 if eps is None else eps)
    if dims == 0:
        return F.rms_norm(input, normalized_shape, weight, eps)
    y = rms_norm_op(_flat(input, dims), _flat(weight, dims), _eps(input, eps))[0]
    return y if dims == 1 else y.view(input.shape)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm`: input (..., *normalized_shape), weight and bias normalized_shape."""
    dims = 0
    if not (type(input) is Tensor and _small(input, _SMALL_NORM)):
        dims = _norm_dims(input, normalized_shape, (weight, bias), eps)
    if dims == 0:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    y = layer_norm_op(_flat(input, dims), _flat(weight, dims), _flat(bias, dims), eps)[0]
    return y if dims == 1 else y.view(input.shape)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual add and the :func:`rms_norm` after it in one pass.

    Args:
        input, residual: (..., *normalized_shape), one floating-point dtype and device.
        weight: normalized_shape or None.
        eps: None is the epsilon of the dtype that the norm is computed in.

    Returns:
        ``(normed, sum)``: rms_norm(input + residual) and input + residual, both shaped like input.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: a negative eps.
        TypeError: what is no tensor, sequence of ints or number.
    """
    try:
        dims = _fused_dims(input, residual, normalized_shape, weight)
        if torch._C._is_any_autocast_enabled() and _splits(input, residual, weight):
            total = input + residual
            return rms_norm(total, list(normalized_shape), weight, eps), total
        y, total, _ = add_rms_norm_op(_flat(input, dims), _flat(residual, dims), _flat(weight, dims), _eps(input, eps))
    except _ERRORS:
        eps = 0.0 if eps is None else eps
        _check_fused("add_rms_norm", input, residual, normalized_shape, eps, weight=weight)
        raise
    if total.requires_grad:
        total = _own_graph(total, input, residual)
    return (y, total) if dims == 1 else (y.view(input.shape), total.view(input.shape))


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
) -> tuple[Tensor, Tensor]:
    """The residual add and the :func:`layer_norm` after it in one pass; arguments and errors as :func:`add_rms_norm`.

    Returns:
        ``(normed, sum)``: layer_norm(input + residual) and input + residual, both shaped like input.
    """
    try:
        if _small_row(input, residual, normalized_shape, weight, bias, eps):
            total = input + residual
            return F.layer_norm(total, list(normalized_shape), weight, bias, eps), total
        dims = _fused_dims(input, residual, normalized_shape, weight, bias)
        if torch._C._is_any_autocast_enabled() and _splits(input, residual, weight, bias):
            total = input + residual
            return layer_norm(total, list(normalized_shape), weight, bias, eps), total
        y, total, *_ = add_layer_norm_op(
            _flat(input, dims), _flat(residual, dims), _flat(weight, dims), _flat(bias, dims), eps
        )
    except _ERRORS:
        _check_fused("add_layer_norm", input, residual, normalized_shape, eps, weight=weight, bias=bias)
        raise
    if total.requires_grad:
        total = _own_graph(total, input, residual)
    return (y, total) if dims == 1 else (y.view(input.shape), total.view(input.shape))


def _small(x: Tensor, size: int) -> bool:
    """Whether x is too small for an op call to be faster than torch's own layer_norm, and nothing is forced."""
    return backend.forced() is None and not torch.compiler.is_compiling() and x.numel() < size


def _small_row(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> bool:
    """Whether the sum of x and residual is small, and torch rejects what the op does."""
    shape, dtype = x.shape, x.dtype
    return (
        _small(x, _SMALL_ADD_NORM)
        and shape == residual.shape
        and shape[-1:] == tuple(normalized_shape)
        and dtype in _FLOATS
        and dtype == residual.dtype
        and (weight is None or weight.dtype == dtype)
        and (bias is None or bias.dtype == dtype)
        and eps >= 0
        and not torch.is_autocast_enabled(x.device.type)
    )


def _norm_dims(x: Tensor, normalized_shape: Sequence[int], parameters: Sequence[Tensor | None], eps: float) -> int:
    """How many trailing dimensions the op normalises; 0 where torch's own function serves, or rejects, the call."""
    if not _a_tensor(x) or not isinstance(normalized_shape, (list, tuple)) or _wraps(x):
        return 0
    dims = len(normalized_shape)
    shape = x.shape[-dims:]
    if dims == 0 or x.dim() < dims or shape != tuple(normalized_shape) or float in map(type, normalized_shape):
        return 0
    forced = backend.forced()
    kernels = forced is not None and forced != "torch"
    for parameter in parameters:
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor) or parameter.shape != shape:
            return 0
        if parameter.dtype != x.dtype and not kernels:
            return 0
    if kernels:
        return dims
    try:
        if not eps >= 0:
            return 0
    except TypeError:  # no number
        return 0
    # A GPU's norms are unmeasured: torch's fused ones run there.
    if forced is None and not (x.is_cpu and CPU_KERNELS and x.dtype in _FLOATS):
        return 0
    return dims


def _wraps(x: Tensor) -> bool:
    """Whether x is a nested, sparse, distributed or similar tensor, which torch's own functions have rules for."""
    if x.is_nested or x.layout is not torch.strided:
        return True
    return type(x) is not Tensor and is_traceable_wrapper_subclass(x) and not torch.compiler.is_compiling()


def _fused_dims(x: Tensor, residual: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> int:
    """How many trailing dimensions the op normalises."""
    dims, shape = len(normalized_shape), x.shape
    row = shape[-dims:]
    fits = dims > 0 and row == tuple(normalized_shape) and float not in map(type, normalized_shape)
    fits = fits and residual.shape == shape
    for parameter in parameters:
        fits = fits and (parameter is None or parameter.shape == row)
    if not fits:
        raise RuntimeError("the shapes do not fit together")  # which do not, _check_fused says
    return dims


def _check_fused(
    op: str, input: Tensor, residual: Tensor, normalized_shape: Sequence[int], eps: float, **parameters: Tensor | None
) -> None:
    """Name the argument that made a norm of a sum fail."""
    _check_types(op, {"input": input, "residual": residual}, **parameters)
    if not isinstance(normalized_shape, Sequence) or not all(hasattr(size, "__index__") for size in normalized_shape):
        raise TypeError(f"{op}: normalized_shape is {normalized_shape!r}, accepted is a sequence of ints")
    check_eps(op, eps)
    if input.is_nested or input.layout is not torch.strided:
        raise NotImplementedError(f"{op}: input is a nested or sparse tensor, accepted are dense ones")
    if input.dtype not in FLOATING:
        raise RuntimeError(f"{op}: input has dtype {input.dtype}, accepted are float32, bfloat16, float16 and float64")
    shape = tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise RuntimeError(
            f"{op}: input has shape {tuple(input.shape)}, accepted is (..., *normalized_shape) with {shape}"
        )
    arguments = Arguments(op, "input", input)
    dtypes = tuple(FLOATING) if torch.is_autocast_enabled(input.device.type) else input.dtype
    arguments.check("residual", residual, dtypes, ("input's shape", input.shape))
    for name, parameter in parameters.items():
        arguments.check(name, parameter, dtypes, ("normalized_shape", shape))


def _splits(x: Tensor, residual: Tensor, *parameters: Tensor | None) -> bool:
    """Whether autocast gives the sum or the norm of it another dtype than the op, which casts all its arguments to one:
    halves are normalised in float32 on a GPU, and with parameters of any dtype on a CPU."""
    if not torch.is_autocast_enabled(x.device.type):
        return False
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return dtype.itemsize == 2 and not (x.is_cpu and all(p is None or p.dtype == dtype for p in parameters))


def _own_graph(total: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    """The sum, which needs no gradient where only the norm's parameters do: autograd marks all outputs of an op."""
    return total if x.requires_grad or residual.requires_grad else total.detach()


def _flat(x: Tensor | None, dims: int) -> Any:
    return x if x is None or dims == 1 else x.flatten(-dims)


def _eps(x: Tensor, eps: float | None) -> float:
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
