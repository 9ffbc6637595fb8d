"""Other libraries' signatures: formulas in plain torch as the reference, gradients, updates in place."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlops.compat import causal_conv1d, mamba_ssm

# The parameters of the packages' functions, in their order (causal_conv1d 1.5, mamba_ssm 2.2).
SIGNATURES = {
    causal_conv1d.causal_conv1d_fn: "x weight bias=None seq_idx=None initial_states=None return_final_states=False "
    "final_states_out=None activation=None",
    causal_conv1d.causal_conv1d_update: "x conv_state weight bias=None activation=None cache_seqlens=None "
    "conv_state_indices=None",
    mamba_ssm.selective_scan_fn: "u delta A B C D=None z=None delta_bias=None delta_softplus=False "
    "return_last_state=False",
    mamba_ssm.selective_state_update: "state x dt A B C D=None z=None dt_bias=None dt_softplus=False "
    "state_batch_indices=None",
    mamba_ssm.mamba_inner_fn: "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight "
    "out_proj_bias A B=None C=None D=None delta_bias=None B_proj_bias=None C_proj_bias=None delta_softplus=True "
    "checkpoint_lvl=1 b_rms_weight=None c_rms_weight=None dt_rms_weight=None b_c_dt_rms_eps=1e-06",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert found == SIGNATURES[function].split()


def agree(ours: Any, theirs: Any, leaves: Sequence[Tensor | None]) -> None:
    """Values, and gradients of ``leaves``, of two functions of them."""
    given = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    wanted = [leaf for leaf in given if leaf is not None]
    results = []
    for function in (ours, theirs):
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        dys = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, wanted, dys)))
    torch.testing.assert_close(*results)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    width = weight.shape[1]
    joined = F.pad(x, (width - 1, 0)) if states is None else torch.cat([states, x], 2)
    y = F.conv1d(joined, weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if silu else y, joined[..., x.shape[2] :]


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("states", [False, True])
def test_causal_conv1d_fn(activation: str | None, states: bool) -> None:
    x, weight, bias = torch.randn(2, 6, 9).double(), torch.randn(6, 4).double(), torch.randn(6).double()
    initial = torch.randn(2, 6, 3).double() if states else None
    silu = activation is not None
    leaves = (x, weight, bias, initial)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None) -> Any:
        return causal_conv1d.causal_conv1d_fn(x, weight, bias, None, initial, True, None, activation)

    def written(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None) -> Any:
        out = torch.full((2, 6, 3), torch.nan).double()
        y, final = causal_conv1d.causal_conv1d_fn(x, weight, bias, None, initial, True, out, activation)
        assert final is out
        return y, final

    for function in (ours, written):
        agree(function, lambda *given: conv(*given, silu), leaves)
    y = causal_conv1d.causal_conv1d_fn(x, weight, bias, activation=activation)
    torch.testing.assert_close(y, conv(x, weight, bias, None, silu)[0])


def test_causal_conv1d_fn_keeps_sequences_apart() -> None:
    x, weight = torch.randn(1, 6, 9), torch.randn(6, 4)
    index = torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)
    y = causal_conv1d.causal_conv1d_fn(x, weight, None, index, activation="silu")
    alone = [conv(part, weight, None, None, True)[0] for part in x.split([4, 5], 2)]
    torch.testing.assert_close(y, torch.cat(alone, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_len", [3, 5])
@pytest.mark.parametrize("steps", [None, 1, 2])
def test_causal_conv1d_update(steps: int | None, state_len: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 8).to(dtype)
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    expected = conv(x.float(), weight, bias, None, True)[0].to(dtype).detach()
    pieces = x.unbind(2) if steps is None else x.split(steps, 2)
    state, ring = torch.zeros(2, 2, 6, state_len).to(dtype)
    pool, picked = torch.zeros(5, 6, state_len).to(dtype), torch.tensor([3, 1], dtype=torch.int32)
    so_far = torch.zeros(2, dtype=torch.int32)
    found: list[list[Tensor]] = [[], [], []]
    for piece in pieces:
        found[0].append(causal_conv1d.causal_conv1d_update(piece, state, weight, bias, "silu"))
        found[1].append(causal_conv1d.causal_conv1d_update(piece, ring, weight, bias, "silu", so_far))
        found[2].append(
            causal_conv1d.causal_conv1d_update(piece, pool, weight, bias, "silu", conv_state_indices=picked)
        )
        so_far += piece.shape[2] if steps else 1
    for ys in found:
        y = torch.stack(ys, 2) if steps is None else torch.cat(ys, 2)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected)
    assert torch.equal(state, x[..., -state_len:]) and torch.equal(pool[picked.long()], state)
    assert torch.equal(ring[..., torch.arange(8 - state_len, 8) % state_len], state)


def test_unknown_activation() -> None:
    x, weight = torch.randn(2, 6, 9), torch.randn(6, 4)
    with pytest.raises(NotImplementedError, match="'gelu'"):
        causal_conv1d.causal_conv1d_fn(x, weight, activation="gelu")
    with pytest.raises(NotImplementedError, match="'gelu'"):
        causal_conv1d.causal_conv1d_update(x, torch.zeros(2, 6, 3), weight, activation="gelu")


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence step by step; a varying B or C is (batch, groups, dstate, seqlen)."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    h, ys = torch.zeros_like(A), []
    for t in range(u.shape[2]):
        Bt, Ct = (x if x.dim() == 2 else x[..., t].repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))
        h = torch.exp(delta[..., t, None] * A) * h + (delta * u)[..., t, None] * Bt
        y = (h * Ct).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, 2)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z), h


@pytest.mark.parametrize("variant", ["plain", "grouped", "constant", "complex", "complex_constant"])
@pytest.mark.parametrize("softplus", [False, True])
def test_selective_scan_fn(variant: str, softplus: bool) -> None:
    u, delta, z = (torch.randn(2, 6, 7).double() for _ in range(3))
    delta = delta.abs()
    D, bias = torch.randn(6).double(), torch.rand(6).double()
    dtype = torch.complex128 if "complex" in variant else torch.float64
    A = torch.randn(6, 3, dtype=dtype)
    A = torch.complex(-A.real.abs(), A.imag) if A.is_complex() else -A.abs()
    if "constant" in variant:
        B, C = torch.randn(6, 3, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    elif variant == "grouped":
        B, C = torch.randn(2, 2, 3, 7).double(), torch.randn(2, 2, 3, 7).double()
    else:
        B, C = (torch.randn(2, 3, 14 if A.is_complex() else 7).double() for _ in range(2))

    def varying(x: Tensor) -> Tensor:
        x = torch.complex(x[..., ::2], x[..., 1::2]) if A.is_complex() and x.dim() > 2 else x
        return x[:, None] if x.dim() == 3 else x

    def ours(*given: Tensor) -> Any:
        return mamba_ssm.selective_scan_fn(*given, softplus, True)

    def theirs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor | None) -> Any:
        return scan(u, delta, A, *(x if x.dim() == 2 else varying(x) for x in (B, C)), *rest, softplus)

    agree(ours, theirs, (u, delta, A, B, C, D, z, bias))
    bare = (u, delta, A, B, C, None, None, None)
    torch.testing.assert_close(mamba_ssm.selective_scan_fn(*bare, softplus), theirs(*bare)[0])


@pytest.mark.parametrize("heads", [False, True])
def test_selective_state_update(heads: bool) -> None:
    """Steps of the scan, the parameters shared by the channels of a head expanded as in Mamba-2."""
    shape, flat = ((3, 2), 6) if heads else ((6,), 6)
    u, delta, z = (torch.randn(2, flat, 5) for _ in range(3))
    B, C = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    if heads:
        delta = delta[:, ::2].repeat_interleave(2, 1)
        A, D, bias = (
            (-torch.rand(3, 1, 1)).expand(3, 2, 4),
            torch.randn(3, 1).expand(3, 2),
            torch.rand(3, 1).expand(3, 2),
        )
    else:
        A, D, bias = -torch.rand(6, 4), torch.randn(6), torch.rand(6)
    A = A.clone().requires_grad_()
    flattened = A.reshape(6, 4), B[:, None], C[:, None], D.reshape(6), z, bias.reshape(6)
    y, last = scan(u, delta, *flattened, True)
    state, pool = torch.zeros(2, *shape, 4), torch.zeros(4, *shape, 4)
    picked = torch.tensor([3, 1], dtype=torch.int32)
    for t in range(5):
        step = [x[..., t].reshape(2, *shape) for x in (u, delta)]
        rest = (A, B[..., t], C[..., t], D, z[..., t].reshape(2, *shape), bias, True)
        for found in (
            mamba_ssm.selective_state_update(state, *step, *rest),
            mamba_ssm.selective_state_update(pool, *step, *rest, state_batch_indices=picked),
        ):
            assert not found.requires_grad
            torch.testing.assert_close(found.reshape(2, 6), y[..., t])
    torch.testing.assert_close((state.reshape(2, 6, 4), pool[picked.long()]), (last, state))


def inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj: Tensor,
    delta_proj: Tensor,
    out_proj: Tensor,
    out_bias: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    *norms: Tensor,
) -> Tensor:
    x, z = xz.chunk(2, 1)
    u, _ = conv(x, conv1d_weight[:, 0], conv1d_bias, None, True)
    width = (x_proj.shape[0] - delta_proj.shape[1]) // 2
    dt, B, C = torch.einsum("bdl,rd->blr", u, x_proj).split([delta_proj.shape[1], width, width], -1)
    dt, B, C = dt @ delta_proj.T, B + B_bias, C + C_bias
    if norms:
        B, C, dt = (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
            for x, weight in zip((B, C, dt), norms, strict=True)
        )
    if A.is_complex():
        B, C = (torch.complex(x[..., ::2], x[..., 1::2]) for x in (B, C))
    y, _ = scan(u, dt.mT, A, B.mT[:, None], C.mT[:, None], D, z, bias, True)
    return torch.einsum("bdl,ed->ble", y, out_proj) + out_bias


@pytest.mark.parametrize("variant", ["plain", "norms", "complex"])
def test_mamba_inner_fn(variant: str) -> None:
    dstate = 6 if variant == "complex" else 3
    shapes = [(2, 12, 7), (6, 1, 4), (6,), (2 + 2 * dstate, 6), (6, 2), (5, 6), (5,)]
    head = [torch.randn(shape).double() for shape in shapes]
    A = torch.randn(6, 3, dtype=torch.complex128 if variant == "complex" else torch.float64)
    A = torch.complex(-A.real.abs(), A.imag) if A.is_complex() else -A.abs()
    D, bias, B_bias, C_bias = (torch.randn(n).double() for n in (6, 6, dstate, dstate))
    norms = [torch.rand(n).double() for n in (3, 3, 6)] if variant == "norms" else []

    def ours(*given: Tensor) -> Tensor:
        return mamba_ssm.mamba_inner_fn(
            *given[:8], None, None, *given[8:12], True, 1, *(given[12:] or [None] * 3), b_c_dt_rms_eps=1e-5
        )

    agree(ours, inner, (*head, A, D, bias, B_bias, C_bias, *norms))


def test_mamba_inner_fn_with_constant_coefficients() -> None:
    shapes = [(2, 12, 7), (6, 1, 4), (6,), (2, 6), (6, 2), (5, 6)]
    leaves = [torch.randn(shape).double() for shape in shapes] + [-torch.rand(6, 3).double()]
    leaves += [torch.randn(6, 3).double(), torch.randn(6, 3).double()]

    def ours(*given: Tensor) -> Tensor:
        return mamba_ssm.mamba_inner_fn(*given[:6], None, *given[6:], delta_softplus=True)

    def theirs(xz: Tensor, weight: Tensor, bias: Tensor, x_proj: Tensor, delta_proj: Tensor, *rest: Tensor) -> Tensor:
        out_proj, A, B, C = rest
        x, z = xz.chunk(2, 1)
        u, _ = conv(x, weight[:, 0], bias, None, True)
        delta = torch.einsum("bdl,rd,er->bel", u, x_proj, delta_proj)
        return scan(u, delta, A, B, C, None, z, None, True)[0].mT @ out_proj.T

    agree(ours, theirs, leaves)
    with pytest.raises(ValueError, match="checkpoint_lvl is 2"):
        mamba_ssm.mamba_inner_fn(*leaves[:6], None, *leaves[6:], checkpoint_lvl=2)
