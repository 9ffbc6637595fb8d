"""State space models whose transition is constant in time and diagonal: S4D's kernel and convolution, S5's scan."""

import math

import torch
from torch import Tensor

from dlops._op import acc
from dlops.functional.linear_scan import linear_scan


def diagonal_scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None, bidirectional: bool = False) -> Tensor:
    """The states of a diagonal linear system, h[t] = a h[t-1] + b[t]. Smith et al., "Simplified State Space Layers for
    Sequence Modeling", 2023 (S5).

    Args:
        a: (dim,), the discrete transition, real or complex; or (batch, dim, seqlen), one per step.
        b: (batch, dim, seqlen), the inputs of the states, real or complex, in any strides.
        initial_state: (batch, dim), the state before the first step, or None, zero.
        bidirectional: return also the states of the system that runs from the last step to the first, from zero.

    Returns:
        (batch, dim, seqlen), or (batch, 2 dim, seqlen): the forward states, then the backward ones.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    if a.dim() == 1:
        a = a[:, None]
    forward = linear_scan(a, b, initial_state)
    return torch.cat([forward, linear_scan(a, b, reverse=True)], 1) if bidirectional else forward


def s4d_kernel(A: Tensor, C: Tensor, dt: Tensor, seqlen: int, B: Tensor | None = None) -> Tensor:
    """The convolution kernel of a diagonal state space model, discretised by a zero-order hold:

        K[h, l] = 2 Re(sum over n of C[h, n] B[h, n] (exp(dt[h] A[h, n]) - 1) / A[h, n] exp(dt[h] A[h, n] l))

    Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", 2022 (S4D). Each n stands
    for itself and its conjugate. The powers are products of two tables of about sqrt(seqlen) powers, and the sum is a
    matrix product of these: memory is O(dim dstate sqrt(seqlen)), not O(dim dstate seqlen), in the backward too.

    Args:
        A: (dim, dstate) complex, Re(A) < 0.
        C, B: (dim, dstate) complex; B None is 1.
        dt: (dim,), positive.
        seqlen: how many steps.

    Returns:
        (dim, seqlen), float32 (float64 where A is complex128).

    Raises:
        RuntimeError: shapes that do not fit together, an A that is not complex, a negative seqlen.
    """
    if not A.is_complex() or A.dim() != 2:
        raise RuntimeError(f"s4d_kernel: A is {A.dtype} of shape {tuple(A.shape)}, accepted is complex (dim, dstate)")
    if dt.shape != A.shape[:1]:
        raise RuntimeError(f"s4d_kernel: dt has shape {tuple(dt.shape)}, accepted is (dim,) = {tuple(A.shape[:1])}")
    for name, x in (("C", C), ("B", B)):
        if x is not None and x.shape != A.shape:
            raise RuntimeError(f"s4d_kernel: {name} has shape {tuple(x.shape)}, accepted is A's, {tuple(A.shape)}")
    if seqlen < 0:
        raise RuntimeError(f"s4d_kernel: seqlen is {seqlen}, accepted are numbers >= 0")
    # A power's phase is a large number of turns late in the sequence: few exponents, so all of them in float64.
    exponent = (dt[:, None].double() * A.to(torch.complex128))[:, None]
    factor = C if B is None else C * B
    factor = factor.to(torch.complex128)[:, None] * _expm1(exponent) / A[:, None]
    traced = torch.compiler.is_compiling()
    if traced:  # seqlen has no root then, and what depends on whether there is one block would be a guard
        length, blocks = 64, seqlen // 64 + 2
    else:
        length = max(1, math.isqrt(seqlen))
        blocks = -(-seqlen // length)
    row, column = (torch.arange(n, device=A.device, dtype=torch.float64)[:, None] for n in (blocks, length))
    rows = factor * torch.exp(exponent * (length * row))  # (dim, blocks, dstate)
    columns = torch.exp(exponent * column)  # (dim, length, dstate)
    # Re(x y) is the inner product of x and conj(y) as pairs.
    real = A.real.dtype
    left, right = (torch.view_as_real(x).flatten(2).to(real) for x in (rows, columns.conj().resolve_conj()))
    kernel = (2 * (left @ right.mT)).flatten(1)
    return kernel.index_select(1, torch.arange(seqlen, device=A.device)) if traced else kernel[:, :seqlen]


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 of a complex z, which torch.expm1 does not take, without cancellation near zero."""
    half = torch.sin(z.imag / 2)
    real = torch.expm1(z.real) - 2 * torch.exp(z.real) * half * half
    return torch.complex(real, torch.exp(z.real) * torch.sin(z.imag))


def fft_conv1d(u: Tensor, kernel: Tensor, D: Tensor | None = None) -> Tensor:
    """A causal convolution as long as the sequence, by the fast Fourier transform:

        y[t] = sum over s <= t of kernel[t - s] u[s], plus D u[t]

    Args:
        u: (batch, dim, seqlen), float32, bfloat16, float16 or float64.
        kernel: (dim, seqlen).
        D: (dim,) or None.

    Returns:
        y, shaped like u, in its dtype, computed in float32 (float64 with float64).

    Raises:
        RuntimeError: shapes that do not fit together.
    """
    if u.dim() != 3 or kernel.shape != u.shape[1:]:
        raise RuntimeError(
            f"fft_conv1d: u has shape {tuple(u.shape)} and kernel {tuple(kernel.shape)}, accepted are "
            "(batch, dim, seqlen) and (dim, seqlen)"
        )
    if D is not None and D.shape != kernel.shape[:1]:
        raise RuntimeError(f"fft_conv1d: D has shape {tuple(D.shape)}, accepted is (dim,) = {tuple(kernel.shape[:1])}")
    seqlen = u.shape[2]
    if u.numel() == 0:
        y = acc(u) * acc(kernel)
    else:
        size = 2 * seqlen  # of which the end is zero: nothing comes around
        spectrum = torch.fft.rfft(acc(u), size) * torch.fft.rfft(acc(kernel), size)
        y = torch.fft.irfft(spectrum, size)[..., :seqlen]
    y = y if D is None else y + acc(D)[:, None] * acc(u)
    return y.to(u.dtype)
