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
    mamba_ssm.mamba_chunk_scan_combined: "x dt A B C chunk_size D=None z=None dt_bias=None initial_states=None "
    "seq_idx=None cu_seqlens=None dt_softplus=False dt_limit=(0.0,inf) return_final_states=False "
    "return_varlen_states=False",
    mamba_ssm.mamba_split_conv1d_scan_combined: "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size "
    "initial_states=None seq_idx=None dt_limit=(0.0,inf) return_final_states=False activation=silu rmsnorm_weight=None "
    "rmsnorm_eps=1e-06 outproj_weight=None outproj_bias=None headdim=None ngroups=1 norm_before_gate=True",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default}".replace(" ", "") for p in parameters]
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


def test_causal_conv1d_fn_of_narrower_weights() -> None:
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4).bfloat16().requires_grad_(), torch.randn(6).bfloat16()
    y = causal_conv1d.causal_conv1d_fn(x, weight, bias, activation="silu")
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, causal_conv1d.causal_conv1d_fn(x, weight.float(), bias.float(), activation="silu"))
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.bfloat16


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


@pytest.mark.parametrize(
    ("x_dtype", "dt_dtype", "coefficient_dtype", "state_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float32, torch.float16),
        (torch.float16, torch.float16, torch.float16, torch.bfloat16),
    ],
)
def test_selective_state_update_of_several_dtypes(
    x_dtype: torch.dtype, dt_dtype: torch.dtype, coefficient_dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    """The one head may be a dimension of the state alone; batch elements of negative indices are padding."""
    x, dt, z = torch.randn(2, 6).to(x_dtype), torch.rand(2, 6).to(dt_dtype), torch.randn(2, 6).to(x_dtype)
    B, C = torch.randn(2, 2, 4).to(coefficient_dtype)
    A, D, bias = -torch.rand(6, 4), torch.randn(6), torch.rand(6)
    state = torch.randn(3, 1, 6, 4).to(state_dtype)
    expected = state[:2, 0].to(torch.float32, copy=True)
    y = mamba_ssm.selective_state_update(
        expected, x.float(), dt.float(), A, B.float(), C.float(), D, z.float(), bias, True
    )
    last, picked = state[2].clone(), torch.tensor([1, -1], dtype=torch.int32)
    alone = state[:2, 0].flip(0).clone()
    found = mamba_ssm.selective_state_update(state[:2], x, dt, A, B, C, D, z, bias, True)
    torch.testing.assert_close(found, y.to(x_dtype))
    torch.testing.assert_close(state[:2, 0], expected.to(state_dtype))
    assert torch.equal(state[2], last)
    padded = mamba_ssm.selective_state_update(alone, x, dt, A, B, C, D, z, bias, True, picked)
    assert torch.equal(padded[0], found[0]) and not padded[1].any()
    assert torch.equal(alone[1], state[0, 0])


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


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    initial: Tensor | None = None,
    softplus: bool = True,
    limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence step by step."""
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    dt = dt if bias is None else dt + bias
    dt = (F.softplus(dt) if softplus else dt).clamp(*limit)
    h, ys = x.new_zeros(()) if initial is None else initial, []
    for t in range(x.shape[1]):
        write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + write
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    y = torch.stack(ys, 1)
    y = y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x
    return y if z is None else y * F.silu(z), h


def ssd_arguments(batch: int = 2) -> list[Tensor]:
    """x, dt, A, B, C, D, z, dt_bias and the initial states, of 4 heads in 2 groups."""
    shapes = [(batch, 9, 4, 3), (batch, 9, 4), (4,), *[(batch, 9, 2, 5)] * 2, (4,), (batch, 9, 4, 3), (4,)]
    found = [torch.randn(shape).double() for shape in (*shapes, (batch, 4, 3, 5))]
    found[2] = -found[2].abs()
    return found


def test_mamba_chunk_scan_combined() -> None:
    leaves, limit = ssd_arguments(), (0.4, 1.2)

    def ours(*given: Tensor) -> Any:
        x, dt, A, B, C, D, z, bias, initial = given
        options = {"dt_softplus": True, "dt_limit": limit, "return_final_states": True}
        return mamba_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, 4, D, z, bias, initial, **options)

    agree(ours, lambda *given: ssd(*given, limit=limit), leaves)
    given = *leaves[:4], leaves[4]
    y = mamba_ssm.mamba_chunk_scan_combined(*given, 4)
    torch.testing.assert_close(y, ssd(*given, softplus=False)[0])
    with pytest.raises(ValueError, match="chunk_size is 0"):
        mamba_ssm.mamba_chunk_scan_combined(*given, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_mamba_chunk_scan_combined_keeps_sequences_apart(dtype: torch.dtype) -> None:
    x, dt, A, B, C, *_, initial = ssd_arguments(1)
    index = torch.tensor([[0] * 4 + [1] * 5], dtype=dtype)
    edges = torch.tensor([0, 4, 9], dtype=dtype)

    def theirs(*given: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, initial = given
        first = ssd(*(t[:, :4] for t in (x, dt)), A, B[:, :4], C[:, :4], initial=initial, softplus=False)
        last = ssd(*(t[:, 4:] for t in (x, dt)), A, B[:, 4:], C[:, 4:], softplus=False)
        return torch.cat([first[0], last[0]], 1), last[1], torch.cat([first[1], last[1]])

    def ours(*given: Tensor) -> Any:
        options = {"return_final_states": True, "return_varlen_states": True}
        return mamba_ssm.mamba_chunk_scan_combined(
            *given[:5], 4, initial_states=given[5], seq_idx=index, cu_seqlens=edges, **options
        )

    leaves = x, dt.abs(), A, B, C, initial
    agree(ours, theirs, leaves)
    y = mamba_ssm.mamba_chunk_scan_combined(*leaves[:5], 4, initial_states=initial, seq_idx=index)
    torch.testing.assert_close(y, theirs(*leaves)[0])
    _, states = mamba_ssm.mamba_chunk_scan_combined(*leaves[:5], 4, cu_seqlens=edges, return_varlen_states=True)
    torch.testing.assert_close(states[1:], theirs(*leaves)[1])
    with pytest.raises(ValueError, match="takes cu_seqlens, which is None"):
        mamba_ssm.mamba_chunk_scan_combined(*leaves[:5], 4, return_varlen_states=True)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("variant", ["gate", "norm", "all"])
def test_mamba_split_conv1d_scan_combined(variant: str, before: bool) -> None:
    mlp, everything = (6, True) if variant == "all" else (0, False)
    shapes = [(2, 9, 2 * mlp + 12 + 32 + 4), (32, 4), (32,), (4,), (4,), (4, 3) if everything else (4,)]
    shapes += [(12,)] if variant != "gate" else []
    shapes += [(7, mlp + 12), (7,), (2, 4, 3, 5)] if everything else []
    leaves = [torch.randn(shape).double() for shape in shapes]
    leaves[4] = -leaves[4].abs()

    def ours(*given: Tensor) -> Any:
        weight, projection, bias, initial = (*given[6:], *[None] * 4)[:4]
        return mamba_ssm.mamba_split_conv1d_scan_combined(
            *given[:6], 4, initial, None, (0.4, 1.2), True, "silu", weight, 1e-5, projection, bias, 3, 2, before
        )

    def theirs(*given: Tensor) -> tuple[Tensor, Tensor]:
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, *rest = given
        swiglu, z, u, dt = zxbcdt.split([2 * mlp, 12, 32, 4], -1)
        u = conv(u.mT, conv_weight, conv_bias, None, True)[0].mT
        x, B, C = (t.unflatten(-1, (n, -1)) for t, n in zip(u.split([12, 10, 10], -1), (4, 2, 2), strict=True))
        y, states = ssd(x, dt, A, B, C, D, None, dt_bias, rest[3] if everything else None, True, (0.4, 1.2))
        y = y.flatten(2)
        if not rest or not before:
            y = y * F.silu(z)
        if rest:
            y = F.rms_norm(y.unflatten(-1, (2, 6)), [6], eps=1e-5).flatten(2) * rest[0]
            y = y * F.silu(z) if before else y
        if everything:
            up, gate = swiglu.split(mlp, -1)
            y = torch.einsum("bld,ed->ble", torch.cat([F.silu(up) * gate, y], -1), rest[1]) + rest[2]
        return y, states

    agree(ours, theirs, leaves)
    with pytest.raises(ValueError, match="headdim is None"):
        mamba_ssm.mamba_split_conv1d_scan_combined(*leaves[:5], torch.randn(4), 4)
