"""Device functions that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _support

INTERPRETED = tl.constexpr(_support.interpreted())


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32; either factor may be float32 where the other is half.

    float32 by float32 follows PRECISION. A half type by float32 keeps the float32 factor whole: bfloat16 meets it in
    three bfloat16 pieces ("ieee"; two for "tf32x3", one for "tf32"), float16, which tf32 holds exactly, in tf32 ones.
    """
    if INTERPRETED:  # its products read bfloat16 as integers
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif a.dtype == b.dtype:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.float16 or b.dtype == tl.float16:
        THREE: tl.constexpr = "tf32" if PRECISION == "tf32" else "tf32x3"
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=THREE)
    elif a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        acc = tl.dot(a, high, acc)
        if PRECISION != "tf32":
            rest = b - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            acc = tl.dot(a, middle, acc)
            if PRECISION == "ieee":
                acc = tl.dot(a, (rest - middle.to(tl.float32)).to(tl.bfloat16), acc)
    else:
        high = a.to(tl.bfloat16)
        acc = tl.dot(high, b, acc)
        if PRECISION != "tf32":
            rest = a - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            acc = tl.dot(middle, b, acc)
            if PRECISION == "ieee":
                acc = tl.dot((rest - middle.to(tl.float32)).to(tl.bfloat16), b, acc)
    return acc


@triton.jit
def add_squares(x, squares, exponent):
    """Adds the squares of x [rows, columns] to squares [rows], which stand for squares · 4^(exponent − 127).

    ``exponent`` [rows] (int32, 1 at first) follows the largest magnitude, so no square leaves float32's range although
    the numbers themselves are in it. Powers of two: nothing is rounded by it. See ``product_of_squares``.
    """
    largest = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23
    new = tl.maximum(exponent, tl.minimum(tl.maximum(largest & 255, 1), 253))
    shrink = (tl.maximum(127 + exponent - new, 0) << 23).to(tl.float32, bitcast=True)
    scaled = x * ((254 - new) << 23).to(tl.float32, bitcast=True)[:, None]
    return squares * shrink * shrink + tl.sum(scaled * scaled, 1), new


@triton.jit
def product_of_squares(act, act_exponent, grad, grad_exponent, BIAS: tl.constexpr):
    """‖a‖²‖d‖² (+ ‖d‖² with a bias) from two sums of ``add_squares``; the scales meet first."""
    act_scale = (act_exponent << 23).to(tl.float32, bitcast=True)
    grad_scale = (grad_exponent << 23).to(tl.float32, bitcast=True)
    both = act_scale * grad_scale
    out = act * grad * both * both
    if BIAS:
        out += grad * grad_scale * grad_scale
    return out
