"""Linear recurrences."""

import torch
from torch import Tensor

from dlops._op import acc
from dlops.ops.linear_scan import linear_scan as linear_scan_op


def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None, reverse: bool = False) -> Tensor:
    """The linear recurrence h[t] = a[t] h[t-1] + b[t] per channel, elementwise: RG-LRU (De et al., "Griffin", 2024),
    HGRN (Qin et al., 2023), minGRU and minLSTM (Feng et al., 2024), S5 (Smith et al., 2023). A GPU multiplies the
    factors a of many steps first: where their product overflows, h is NaN there even if it is zero.

    Args:
        a, b: (batch, dim, seqlen), or shapes that broadcast to it: (dim, 1) is a factor that is the same at every
            step. float32, bfloat16, float16, float64, complex64 or complex128, of two dtypes the one torch promotes
            them to, in any strides; a transposed (batch, seqlen, dim) is as good. Factors close to 1 want float32.
        initial_state: (batch, dim), h before the first step, or None, zero.
        reverse: begin at the last step: h[t] = a[t] h[t+1] + b[t].

    The state is float32 (complex64) where a and b are less.

    Returns:
        h, (batch, dim, seqlen) in the dtype of a and b; channels-last in memory if b is.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = torch.broadcast_tensors(a.to(dtype), b.to(dtype))
    if initial_state is not None:
        initial_state = initial_state.to(acc(a.new_empty(0)).dtype)
    return linear_scan_op(a, b, initial_state, reverse)
