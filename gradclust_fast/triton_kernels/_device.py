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
