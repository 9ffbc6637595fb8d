"""Activations and their derivatives as device functions of float32 tiles, chosen by name at compile time.

exp reduces its argument before exp2; tanh, expm1 and log1p keep their relative accuracy near zero.
p0, p1 are the activation's parameters: leaky_relu's slope, elu's alpha, softplus's beta and threshold.
"""

import triton
import triton.language as tl

# The derivative of these is a function of the output, which is what backward saves; of the others, of the input.
FROM_OUTPUT = ("none", "step", "sign", "relu", "sigmoid", "tanh")
FROM_INPUT = ("leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "relu2", "hardswish", "mish", "softplus")
ACTIVATIONS = FROM_OUTPUT + FROM_INPUT
COSTLIEST = "softplus"  # in registers, of those that a fused kernel computes
FLAT = ("step", "sign")  # their gradient is zero everywhere

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # 9 bits: its products with n are exact
LN2_LOW = tl.constexpr(-2.12194440e-4)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def exp(x):
    """2^n 2^(r log2 e) with n the nearest integer to x log2 e, r = x - n ln 2: the product's rounding does not grow."""
    x = tl.where(x < -150.0, -150.0, tl.where(x > 150.0, 150.0, x))  # this way round a NaN stays
    n = tl.floor(x * LOG2E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp2(r * LOG2E) * tl.exp2(n)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def tanh_near_zero(x):
    """tanh for |x| < 0.625 (Cephes' tanhf), to 1 ulp."""
    z = x * x
    p = (
        ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    ) * z - 3.33332819422e-1
    return x + x * z * p


@triton.jit
def tanh(x):
    far = 1.0 - 2.0 / (1.0 + exp(2.0 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.625, tanh_near_zero(x), tl.where(x < 0, -far, far))


@triton.jit
def expm1_of_negative(x):
    """exp(x) - 1 for x <= 0: near zero as 2 t / (1 - t) with t = tanh(x / 2), which does not cancel."""
    t = tanh_near_zero(0.5 * x)
    return tl.where(x > -1.25, 2.0 * t / (1.0 - t), exp(x) - 1.0)


@triton.jit
def atanh_polynomial(z):
    """p with atanh(s) = s + s z p for 0 <= s <= 1/3, z = s^2."""
    return ((0.13433770835 * z + 0.14116978645) * z + 0.20003835857) * z + 0.33333319426


@triton.jit
def log1p_of_fraction(x):
    """log(1 + x) for 0 <= x <= 1 as 2 atanh(s), s = x / (2 + x), to 2 ulp."""
    s = x / (2.0 + x)
    z = s * s
    return 2.0 * (s + s * z * atanh_polynomial(z))


@triton.jit
def activate(x, p0, p1, ACTIVATION: tl.constexpr):
    """ACTIVATION of x."""
    if ACTIVATION == "none":
        return x
    elif ACTIVATION == "step":
        return tl.where(x >= 0, 1.0, 0.0)
    elif ACTIVATION == "sign":
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)  # this way round a NaN stays
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * p0)
    elif ACTIVATION == "elu":
        return tl.where(x > 0, x, p0 * expm1_of_negative(x))
    elif ACTIVATION == "sigmoid":
        return sigmoid(x)
    elif ACTIVATION == "tanh":
        return tanh(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is sigmoid(2 u)
        return x * sigmoid(x * (x * x * (GELU_CUBIC * SQRT_8_OVER_PI) + SQRT_8_OVER_PI))
    elif ACTIVATION == "silu":
        return x / (1.0 + exp(-x))
    elif ACTIVATION == "relu2":
        return tl.where(x <= 0, 0.0, x * x)
    elif ACTIVATION == "hardswish":
        return x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "mish":  # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2): 1 in float32 beyond 20
        e = exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    else:
        tl.static_assert(ACTIVATION == "softplus", "unknown activation")
        t = x * p0
        soft = (tl.maximum(t, 0.0) + log1p_of_fraction(exp(-tl.abs(t)))) / p0
        return tl.where(t > p1, x, soft)


@triton.jit
def activate_grad(dy, saved, p0, p1, ACTIVATION: tl.constexpr):
    """dy times the derivative of ACTIVATION; saved is its output for those in FROM_OUTPUT, else its input."""
    if ACTIVATION == "none":
        return dy
    elif ACTIVATION == "step" or ACTIVATION == "sign":
        return tl.zeros_like(dy)
    elif ACTIVATION == "relu":
        return tl.where(saved <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        return tl.where(saved > 0, dy, dy * p0)
    elif ACTIVATION == "elu":
        return tl.where(saved > 0, dy, dy * p0 * exp(saved))
    elif ACTIVATION == "sigmoid":
        return dy * (1.0 - saved) * saved
    elif ACTIVATION == "tanh":
        return dy * (1.0 - saved * saved)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(saved * SQRT_HALF))
        return dy * (cdf + saved * (exp(-0.5 * saved * saved) * INV_SQRT_2PI))
    elif ACTIVATION == "gelu_tanh":
        v = tl.where(saved < -12.0, -12.0, tl.where(saved > 12.0, 12.0, saved))  # beyond, the slope is 0 or 1
        z = v * (v * v * (GELU_CUBIC * SQRT_8_OVER_PI) + SQRT_8_OVER_PI)
        e = exp(-tl.abs(z))
        near = 1.0 / (1.0 + e)  # sigmoid(|z|); e times it is the other side, without cancellation
        slope = v * (v * v * (3.0 * GELU_CUBIC * SQRT_8_OVER_PI) + SQRT_8_OVER_PI)
        return dy * (tl.where(z > 0, near, e * near) + slope * (e * near * near))
    elif ACTIVATION == "silu":
        s = sigmoid(saved)
        return dy * (s * (1.0 + saved * (1.0 - s)))
    elif ACTIVATION == "relu2":
        return dy * (2.0 * tl.where(saved <= 0, 0.0, saved))
    elif ACTIVATION == "hardswish":  # torch's halves of the kinks: 0 at -3, 1 at 3
        return tl.where(saved <= -3.0, 0.0, tl.where(saved >= 3.0, dy, dy * (saved / 3.0 + 0.5)))
    elif ACTIVATION == "mish":
        e = exp(tl.minimum(saved, 20.0))
        n = e * (e + 2.0)
        slope = n / (n + 2.0) + saved * (4.0 * e * (e + 1.0) / ((n + 2.0) * (n + 2.0)))
        return dy * tl.where(saved > 20.0, 1.0, slope)
    else:
        tl.static_assert(ACTIVATION == "softplus", "unknown activation")
        t = saved * p0
        return tl.where(t > p1, dy, dy * sigmoid(t))
