"""RMS and layer normalisation over the last dimension, and each fused with the residual add before it.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; Ba, Kiros and Hinton, "Layer Normalization", 2016.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlops._op import acc, op, sum_rows, widest_dtype
from dlops.ops._check import check_eps, check_shape, check_tensors

# torch runs these norms in float32 under autocast on a GPU, and in what the arguments promote to on a CPU.
AUTOCAST = {"cuda": torch.float32, "cpu": widest_dtype}


def _check_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> None:
    check_tensors("rms_norm", x, weight=weight)
    check_shape("rms_norm", "weight", weight, x.shape[-1:])
    check_eps("rms_norm", eps)


def _check_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_tensors("layer_norm", x, weight=weight, bias=bias)
    check_shape("layer_norm", "weight", weight, x.shape[-1:])
    check_shape("layer_norm", "bias", bias, x.shape[-1:])
    check_eps("layer_norm", eps)


def _check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> None:
    check_tensors("add_rms_norm", x, residual=residual, weight=weight)
    check_shape("add_rms_norm", "residual", residual, x.shape)
    check_shape("add_rms_norm", "weight", weight, x.shape[-1:])
    check_eps("add_rms_norm", eps)


def _check_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_tensors("add_layer_norm", x, residual=residual, weight=weight, bias=bias)
    check_shape("add_layer_norm", "residual", residual, x.shape)
    check_shape("add_layer_norm", "weight", weight, x.shape[-1:])
    check_shape("add_layer_norm", "bias", bias, x.shape[-1:])
    check_eps("add_layer_norm", eps)


# ---- definitions ---------------------------------------------------------------------------------------------------


@op(returns=("y", "rstd"), check=_check_rms_norm, autocast=AUTOCAST)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; rstd is the factor, in float32."""
    rstd = torch.rsqrt(acc(x).square().mean(-1) + eps)
    y = acc(x) * rstd[..., None]
    if weight is not None:
        y = y * acc(weight)
    return y.to(x.dtype).contiguous(), rstd.contiguous()


@op(returns=("dx", "dweight"))
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dsum: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm`; ``dsum`` is added to dx (the gradient that reaches the residual stream)."""
    dx, dweight = x.new_empty(0), x.new_empty(0)
    xhat = acc(x) * rstd[..., None]
    if output_mask[0]:
        g = acc(dy) if weight is None else acc(dy) * acc(weight)
        dx = _round((g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[..., None], dsum, x.dtype)
    if output_mask[1]:
        dweight = sum_rows(acc(dy) * xhat).to(x.dtype)
    return dx, dweight


@op(returns=("y", "mean", "rstd"), check=_check_layer_norm, autocast=AUTOCAST)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension; mean and rstd in float32."""
    mean = acc(x).mean(-1)
    centred = acc(x) - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None]
    if weight is not None:
        y = y * acc(weight)
    if bias is not None:
        y = y + acc(bias)
    return y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


@op(returns=("dx", "dweight", "dbias"))
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dsum: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`layer_norm`; ``dsum`` is added to dx (the gradient that reaches the residual stream).

    ``mean`` is rounded, so what is left of it in xhat, which is xhat's own mean, is taken out.
    """
    dx, dweight, dbias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    xhat = (acc(x) - mean[..., None]) * rstd[..., None]
    xhat = xhat - xhat.mean(-1, keepdim=True)
    if output_mask[0]:
        g = acc(dy) if weight is None else acc(dy) * acc(weight)
        inner = g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
        dx = _round(inner * rstd[..., None], dsum, x.dtype)
    if output_mask[1]:
        dweight = sum_rows(acc(dy) * xhat).to(x.dtype)
    if output_mask[2]:
        dbias = sum_rows(acc(dy)).to(x.dtype)
    return dx, dweight, dbias


@op(returns=("y", "sum", "rstd"), check=_check_add_rms_norm, autocast=AUTOCAST)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """sum = x + residual, rounded to their dtype, and :func:`rms_norm` of it."""
    total = (x + residual).contiguous()
    y, rstd = rms_norm.definition(total, weight, eps)
    return y, total, rstd


@op(returns=("y", "sum", "mean", "rstd"), check=_check_add_layer_norm, autocast=AUTOCAST)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum = x + residual, rounded to their dtype, and :func:`layer_norm` of it."""
    total = (x + residual).contiguous()
    y, mean, rstd = layer_norm.definition(total, weight, bias, eps)
    return y, total, mean, rstd


def _round(dx: Tensor, dsum: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (dx if dsum is None else dx + acc(dsum)).to(dtype).contiguous()


# ---- gradients -----------------------------------------------------------------------------------------------------


def _rms_norm_formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    x, weight, _ = args
    return *rms_norm_backward(grads[0], x, weight, extras[0], None, [mask[0], mask[1]]), None


def _layer_norm_formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    x, weight, _, _ = args
    return *layer_norm_backward(grads[0], x, weight, *extras, None, mask[:3]), None


def _add_rms_norm_formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    dy, dsum, _ = grads
    total, _, weight, _ = args
    if dy is None:
        return dsum, dsum, None, None
    dx, dweight = rms_norm_backward(dy, total, weight, extras[0], dsum, [mask[0] or mask[1], mask[2]])
    return dx, dx, dweight, None


def _add_layer_norm_formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    dy, dsum, *_ = grads
    total, _, weight, _, _ = args
    if dy is None:
        return dsum, dsum, None, None, None
    needed = [mask[0] or mask[1], mask[2], mask[3]]
    dx, dweight, dbias = layer_norm_backward(dy, total, weight, *extras, dsum, needed)
    return dx, dx, dweight, dbias, None


rms_norm.register_autograd(
    _rms_norm_formula, saves=lambda args, outputs: (args, outputs[1:]), non_differentiable=("rstd",)
)
layer_norm.register_autograd(
    _layer_norm_formula, saves=lambda args, outputs: (args, outputs[1:]), non_differentiable=("mean", "rstd")
)
add_rms_norm.register_autograd(
    _add_rms_norm_formula,
    saves=lambda args, outputs: ((outputs[1], None, *args[2:]), outputs[2:]),
    non_differentiable=("rstd",),
)
add_layer_norm.register_autograd(
    _add_layer_norm_formula,
    saves=lambda args, outputs: ((outputs[1], None, *args[2:]), outputs[2:]),
    non_differentiable=("mean", "rstd"),
)


# ---- backends ------------------------------------------------------------------------------------------------------


def _vendor_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
    return y.contiguous(), rstd.reshape(x.shape[:-1])


def _vendor_rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dsum: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dweight = torch.ops.aten._fused_rms_norm_backward(dy, x, x.shape[-1:], rstd[..., None], weight, output_mask)
    return _given(dx, dsum, x), _given(dweight, None, x)


def _vendor_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y.contiguous(), mean.reshape(x.shape[:-1]), rstd.reshape(x.shape[:-1])


def _vendor_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dsum: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    bias = x.new_empty(x.shape[-1:]) if output_mask[2] else None  # its values play no part
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], mean[..., None], rstd[..., None], weight, bias, output_mask
    )
    return _given(dx, dsum, x), _given(dweight, None, x), _given(dbias, None, x)


def _given(gradient: Tensor | None, dsum: Tensor | None, x: Tensor) -> Tensor:
    if gradient is None:
        return x.new_empty(0)
    return gradient.contiguous() if dsum is None else gradient + dsum


def _refuses_vendor_rms_norm(*args: Any) -> str | None:
    return None if args[0].is_cuda else "torch's fused rms_norm exists for CUDA only"


def _refuses_vendor_layer_norm(*args: Any) -> str | None:
    return None if args[0].is_cuda else "torch's CPU layer_norm exceeds the error ratio (up to 46, docs/numerics.md)"


def _rule(*args: Any) -> Sequence[str]:
    # cpu: bench rows norm/*, 1.0x to 20x of torch's; elsewhere unmeasured.
    return ("cpu", "torch") if args[0].is_cpu else ("vendor", "cuda", "triton", "torch")


rms_norm.implement("vendor", lambda: _vendor_rms_norm, _refuses_vendor_rms_norm)
rms_norm_backward.implement("vendor", lambda: _vendor_rms_norm_backward, _refuses_vendor_rms_norm)
layer_norm.implement("vendor", lambda: _vendor_layer_norm, _refuses_vendor_layer_norm)
layer_norm_backward.implement("vendor", lambda: _vendor_layer_norm_backward, _refuses_vendor_layer_norm)
for _op in (rms_norm, rms_norm_backward, layer_norm, layer_norm_backward, add_rms_norm, add_layer_norm):
    _op.rule = _rule
    _op.implement("cpu")
    _op.implement("triton")
    _op.implement("cuda")
