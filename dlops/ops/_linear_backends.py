"""How the linear family runs on libraries and on the passes around them: backends ``vendor``, ``cpu`` and ``cuda``.

``vendor`` is one library call where the library fuses (oneDNN on a CPU, cuBLASLt's epilogue on a GPU). ``cpu`` is the
fastest library product, in float32 where the CPU multiplies halves slowly, and one C++ pass for everything around it;
``cuda``'s gradients are the same on a GPU, its forward one kernel for few rows.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops import backend
from dlops._op import Op, acc, as_rows, sum_rows
from dlops.ops.activation import FROM_OUTPUT, activate, activate_backward

# oneDNN's names for the activations that its inner product fuses, and its algorithm. Not relu and leaky_relu, which
# turn NaN into 0 there, nor hardswish, which is finite where torch's overflows.
_ONEDNN = {
    "none": ("none", ""),
    "sigmoid": ("sigmoid", ""),
    "tanh": ("tanh", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
# oneDNN adds up all products of an output in one chain, which rounds too much past so many of them. Longer
# sums are made of runs; of copies where the run is not dense, which takes oneDNN a thousand times longer.
ONEDNN_LONGEST, _ONEDNN_RUN = 384, 256
_CUBLASLT = {"relu": False, "gelu_tanh": True}  # activation: use_gelu


def _amd_family() -> int:
    vendor, family = backend.cpu_model()
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.backends.mkldnn.is_available()
    return family if vendor == "AuthenticAMD" and avx512 else 0


# Decided once, at import: traced code cannot probe the CPU.
CPU_KERNELS = backend.missing("cpu") is None
# Whether oneDNN's float32 products beat torch's own (MKL): on AMD CPUs with AVX-512, which MKL does not use there. By
# 2x from family 26 (Zen 5) on, which multiplies whole vectors at a time; by 1.2x on the one before, but for those in
# runs and of transposed rows (512x1024->4096: 20 ms, in runs 28, MKL 27; 384x3520->1536, transposed: 27, MKL 22).
ONEDNN_WINS = _amd_family() > 0
_ONEDNN_WINS_TWICE = _amd_family() >= 26
_RUNS_PAY = 128  # rows: with fewer, copying the runs of the weight takes longer than multiplying by them
# What this CPU multiplies slower than float32: without AVX-512 torch multiplies halves element by element.
SLOW_HALVES = frozenset(
    dtype
    for dtype, fast in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported),
    )
    if not fast()
)


# ---- cpu -----------------------------------------------------------------------------------------------------------


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias by the fastest library here; halves may come back as float32, not yet rounded."""
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    if x.dtype in SLOW_HALVES:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    pays = x.shape[-1] <= ONEDNN_LONGEST or x.numel() >= _RUNS_PAY * x.shape[-1]
    if onednn_wins(x) and reads_well(x) and pays and x.numel() and weight.numel():
        return _onednn(x, weight, bias, "none")
    return F.linear(x, weight, bias)


def onednn_wins(x: Tensor) -> bool:
    """Whether oneDNN multiplies rows as long as x's, of a CPU tensor, faster than torch's own library."""
    return ONEDNN_WINS and x.dtype == torch.float32 and (_ONEDNN_WINS_TWICE or x.shape[-1] <= ONEDNN_LONGEST)


def reads_well(x: Tensor) -> bool:
    """Whether it does so too with x's rows as they lie in memory."""
    return _ONEDNN_WINS_TWICE or x.is_contiguous()


def _cpu_linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, params: list[float], save: bool
) -> tuple[Tensor, Tensor]:
    pre = product(x, weight, bias)
    if save:
        return torch.ops.dlops_cpu.act(pre, activation, params).to(x.dtype), pre.to(x.dtype)
    if activation != "none":
        torch.ops.dlops_cpu.act_(pre, activation, params)
    return pre.to(x.dtype), x.new_empty(0)


def _cpu_gated_linear(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
    params: list[float],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = product(x, weight_gate, bias_gate), product(x, weight_up, bias_up)
    if save:
        y = torch.ops.dlops_cpu.gate(gate, up, activation, params)
        return y.to(x.dtype), gate.to(x.dtype), up.to(x.dtype)
    torch.ops.dlops_cpu.gate_(gate, up, activation, params)
    return gate.to(x.dtype), x.new_empty(0), x.new_empty(0)


def _cpu_maxout_linear(x: Tensor, weight: Tensor, bias: Tensor | None, num_pieces: int) -> tuple[Tensor, Tensor]:
    y, index = torch.ops.dlops_cpu.maxout(product(x, weight, bias), num_pieces)
    return y.to(x.dtype), index


def _cpu_maxout_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, index: Tensor, num_pieces: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dpre = dy.new_zeros((*dy.shape, num_pieces)).scatter_(-1, index[..., None], dy[..., None]).flatten(-2)
    _, dbias = torch.ops.dlops_cpu.act_backward(dpre, dpre, "none", [], output_mask[2])
    return *_gradient_products(dpre, x, weight, output_mask), dbias


# ---- gradients on cpu and cuda -------------------------------------------------------------------------------------


def _linear_act_backward(library: Callable[[], Any]) -> Callable[..., Any]:
    def linear_act_backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        saved: Tensor,
        activation: str,
        params: list[float],
        output_mask: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dpre, dbias = library().act_backward(dy, saved, activation, params, output_mask[2])
        return *_gradient_products(dpre, x, weight, output_mask), dbias

    return linear_act_backward


def _gated_linear_backward(library: Callable[[], Any]) -> Callable[..., Any]:
    def gated_linear_backward(
        dy: Tensor,
        x: Tensor,
        weight_gate: Tensor,
        weight_up: Tensor,
        gate: Tensor,
        up: Tensor,
        activation: str,
        params: list[float],
        output_mask: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dgate, dup, dbias_gate, dbias_up = library().gate_backward(
            dy, gate, up, activation, params, output_mask[3] or output_mask[4]
        )
        dx_gate, dweight_gate = _gradient_products(dgate, x, weight_gate, output_mask)
        dx_up, dweight_up = _gradient_products(dup, x, weight_up, [output_mask[0], output_mask[2]])
        return (
            dx_gate + dx_up,
            dweight_gate,
            dweight_up,
            dbias_gate if output_mask[3] else x.new_empty(0),
            dbias_up if output_mask[4] else x.new_empty(0),
        )

    return gated_linear_backward


def _gradient_products(dpre: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    dx = dweight = x.new_empty(0)
    if output_mask[0]:
        dx = product(dpre, weight.t(), None).to(x.dtype)
    if output_mask[1]:
        dweight = product(as_rows(dpre).t(), as_rows(x).t(), None).to(x.dtype).contiguous()
    return dx, dweight


# ---- vendor --------------------------------------------------------------------------------------------------------


def _vendor_linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, params: list[float], save: bool
) -> tuple[Tensor, Tensor]:
    if activation == "none" or save:
        pre = _library_product(x, weight, bias)
        return (activate(pre, activation, params) if save else pre), pre if save else x.new_empty(0)
    if x.is_cuda:
        assert bias is not None
        y = torch.ops.aten._addmm_activation(bias, as_rows(x), weight.t(), use_gelu=_CUBLASLT[activation])
        return y.view(*x.shape[:-1], weight.shape[0]), x.new_empty(0)
    return _onednn(x, weight, bias, activation), x.new_empty(0)


def _vendor_linear_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    params: list[float],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dpre = activate_backward(dy, saved, activation, params)
    dbias = sum_rows(acc(dpre)).to(x.dtype) if output_mask[2] else x.new_empty(0)
    return *_vendor_products(dpre, x, weight, output_mask), dbias


def _vendor_gated_linear(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
    params: list[float],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if save or x.shape[-1] > ONEDNN_LONGEST:
        gate, up = _onednn(x, weight_gate, bias_gate, "none"), _onednn(x, weight_up, bias_up, "none")
        y = activate(gate, activation, params) * up
        return (y, gate, up) if save else (y, x.new_empty(0), x.new_empty(0))
    act = _onednn(x, weight_gate, bias_gate, activation)
    return _onednn_with(x, weight_up, bias_up, act, "mul"), x.new_empty(0), x.new_empty(0)


def _vendor_gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    params: list[float],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    act = activate(gate, activation, params)
    dgate = activate_backward(dy * up, act if activation in FROM_OUTPUT else gate, activation, params)
    dup = dy * act
    dx_gate, dweight_gate = _vendor_products(dgate, x, weight_gate, output_mask)
    dx_up, dweight_up = _vendor_products(dup, x, weight_up, [output_mask[0], output_mask[2]])
    dbias_gate = sum_rows(acc(dgate)).to(x.dtype) if output_mask[3] else x.new_empty(0)
    dbias_up = sum_rows(acc(dup)).to(x.dtype) if output_mask[4] else x.new_empty(0)
    return dx_gate + dx_up, dweight_gate, dweight_up, dbias_gate, dbias_up


def _vendor_products(dpre: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    dx = _library_product(dpre, weight.t(), None) if output_mask[0] else x.new_empty(0)
    dweight = _library_product(as_rows(dpre).t(), as_rows(x).t(), None) if output_mask[1] else x.new_empty(0)
    return dx, dweight


def _library_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if x.is_cuda else _onednn(x, weight, bias, "none")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    bias = bias if bias is None else bias.contiguous()  # it reads one with a stride as if it had none
    if x.shape[-1] <= ONEDNN_LONGEST:
        attr, algorithm = _ONEDNN[activation]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm).contiguous()
    y = _onednn(_run(x, 0), _run(weight, 0), bias, "none")
    for k in range(_ONEDNN_RUN, x.shape[-1], _ONEDNN_RUN):
        y = _onednn_with(_run(x, k), _run(weight, k), None, y, "add")
    return activate(y, activation, [])


def _run(x: Tensor, k: int) -> Tensor:
    run = x[..., k : k + _ONEDNN_RUN]
    return run if run.dim() == 2 and run.t().is_contiguous() else run.contiguous()


def _onednn_with(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, operation: str) -> Tensor:
    """x weight^T + bias, then "add" or "mul" with other."""
    bias = bias if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, operation)


def _refuses_onednn(x: Tensor, weight: Tensor, activation: str) -> str | None:
    if x.device.type != "cpu":
        return f"oneDNN runs on CPU tensors, got one on {x.device}"
    if x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return f"oneDNN's fused linear is used for float32 only, got {x.dtype}"
    if activation not in _ONEDNN:
        return f"oneDNN's fused linear has no {activation}"
    return None if x.numel() and weight.numel() else "oneDNN's fused linear takes no empty tensors"


def _refuses_vendor_linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, params: list[float], save: bool
) -> str | None:
    if x.is_cuda:
        if activation == "none":
            return None
        if activation not in _CUBLASLT or save or bias is None:
            return "cuBLASLt's epilogue is bias and relu or gelu_tanh, without the pre-activation"
        return None
    return _refuses_onednn(x, weight, "none" if save else activation)


def _refuses_vendor_linear_act_backward(dy: Tensor, x: Tensor, weight: Tensor, *others: Any) -> str | None:
    return None if x.is_cuda else _refuses_onednn(x, weight, "none")


def _refuses_vendor_gated_linear(x: Tensor, weight_gate: Tensor, *others: Any) -> str | None:
    activation, save = others[-3], others[-1]
    return _refuses_onednn(x, weight_gate, "none" if save else activation)


def _refuses_vendor_gated_linear_backward(dy: Tensor, x: Tensor, weight_gate: Tensor, *others: Any) -> str | None:
    return _refuses_onednn(x, weight_gate, "none")


_MAX_ROWS = 16


def _refuses_many_rows(x: Tensor, *others: Any) -> str | None:
    rows = math.prod(x.shape[:-1])
    return f"it serves at most {_MAX_ROWS} rows (decoding), got {rows}" if rows > _MAX_ROWS else None


_CPU = {
    "linear_act": _cpu_linear_act,
    "linear_act_backward": _linear_act_backward(lambda: torch.ops.dlops_cpu),
    "gated_linear": _cpu_gated_linear,
    "gated_linear_backward": _gated_linear_backward(lambda: torch.ops.dlops_cpu),
    "maxout_linear": _cpu_maxout_linear,
    "maxout_linear_backward": _cpu_maxout_linear_backward,
}
_CUDA = {
    "linear_act_backward": _linear_act_backward(backend.cuda_library),
    "gated_linear_backward": _gated_linear_backward(backend.cuda_library),
}
_VENDOR = {
    "linear_act": (_vendor_linear_act, _refuses_vendor_linear_act),
    "linear_act_backward": (_vendor_linear_act_backward, _refuses_vendor_linear_act_backward),
    "gated_linear": (_vendor_gated_linear, _refuses_vendor_gated_linear),
    "gated_linear_backward": (_vendor_gated_linear_backward, _refuses_vendor_gated_linear_backward),
}


def implement(op: Op) -> None:
    """Give ``op`` its ``cpu`` and, where they exist, its ``cuda`` and ``vendor`` implementations."""
    op.implement("cpu", lambda: _CPU[op.name])
    if op.name in _CUDA:
        op.implement("cuda", lambda: _CUDA[op.name])
    elif op.name in ("linear_act", "gated_linear"):
        op.implement("cuda", refuses=_refuses_many_rows)
    if op.name in _VENDOR:
        vendor, refuses = _VENDOR[op.name]
        op.implement("vendor", lambda: vendor, refuses)
