"""Normalisation: rms_norm, layer_norm and each after a residual add. Bound by bytes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dlops.functional as D
from bench.case import Problem, case, importable

EPS = 1e-6
SHAPES: dict[str, Any] = {
    "cpu": [(4096, 1024)],
    "cuda": [(32768, 4096), (8192, 16384)],
    "more_cpu": [(16384, 256), (1024, 4096), (256, 16384), (32, 65536)],
    "more_cuda": [(131072, 1024), (65536, 2048), (16384, 8192), (2048, 65536), (64, 4096)],
    "small": (8, 64),
}


def _inputs(device: torch.device, dtype: torch.dtype, rows: int, width: int, vectors: int) -> tuple[Tensor, ...]:
    """x (rows, width) and parameters (width,)."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    return x, *(torch.randn(width, device=device, dtype=dtype) for _ in range(vectors))


def _problem(
    ours: Callable[..., Any], eager: Callable[..., Any], args: tuple[Tensor, ...], peers: dict[str, Any], adds: bool
) -> Problem:
    """Forward reads x and writes y, backward reads dy and x and writes dx; a residual add has one more of each."""
    size = args[0].nbytes
    passes = (4, 8) if adds else (2, 5)
    return Problem(
        dlops=ours,
        eager=eager,
        args=args,
        bytes=(passes[0] * size, passes[1] * size),
        flops=(0, 0),
        peers={name: peer for name, peer in peers.items() if peer is not None} if args[0].is_cuda else {},
    )


@case(**SHAPES)
def rms_norm(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Problem:
    liger = importable("liger_kernel.ops.rms_norm:LigerRMSNormFunction")
    quack = importable("quack:rmsnorm")
    return _problem(
        lambda x, w: D.rms_norm(x, [width], w, EPS),
        lambda x, w: F.rms_norm(x, [width], w, EPS),
        _inputs(device, dtype, rows, width, 1),
        {
            "liger": liger and (lambda x, w: liger.apply(x, w, EPS)),
            "quack": quack and (lambda x, w: quack(x, w, eps=EPS)),
        },
        adds=False,
    )


@case(**SHAPES)
def layer_norm(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Problem:
    liger = importable("liger_kernel.ops.layer_norm:LigerLayerNormFunction")
    flash = importable("flash_attn.ops.triton.layer_norm:layer_norm_fn")
    return _problem(
        lambda x, w, b: D.layer_norm(x, [width], w, b, EPS),
        lambda x, w, b: F.layer_norm(x, [width], w, b, EPS),
        _inputs(device, dtype, rows, width, 2),
        {
            "liger": liger and (lambda x, w, b: liger.apply(x, w, b, EPS)),
            "flash_attn": flash and (lambda x, w, b: flash(x, w, b, eps=EPS)),
        },
        adds=False,
    )


@case(**SHAPES)
def add_rms_norm(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Problem:
    def eager(x: Tensor, w: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, [width], w, EPS), total

    liger = importable("liger_kernel.ops.fused_add_rms_norm:LigerFusedAddRMSNormFunction")
    flash = importable("flash_attn.ops.triton.layer_norm:rms_norm_fn")
    x, w = _inputs(device, dtype, rows, width, 1)
    return _problem(
        lambda x, w, residual: D.add_rms_norm(x, residual, [width], w, EPS),
        eager,
        (x, w, torch.randn_like(x)),
        {
            "liger": liger and (lambda x, w, residual: liger.apply(x, residual, w, EPS)),
            "flash_attn": flash
            and (lambda x, w, residual: flash(x, w, None, residual=residual, eps=EPS, prenorm=True)),
        },
        adds=True,
    )


@case(**SHAPES)
def add_layer_norm(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Problem:
    def eager(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, [width], w, b, EPS), total

    flash = importable("flash_attn.ops.triton.layer_norm:layer_norm_fn")
    x, w, b = _inputs(device, dtype, rows, width, 2)
    return _problem(
        lambda x, w, b, residual: D.add_layer_norm(x, residual, [width], w, b, EPS),
        eager,
        (x, w, b, torch.randn_like(x)),
        {"flash_attn": flash and (lambda x, w, b, residual: flash(x, w, b, residual=residual, eps=EPS, prenorm=True))},
        adds=True,
    )
