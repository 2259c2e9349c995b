"""The numbers of a head in one tile or two, so that little is multiplied that is only padding.

A tile's width is a power of two, 16 at least. 192 numbers are in two tiles, of 128 and 64, instead of one of 256; 80
are in 64 and 16. 128 are in one, and so are 120: 64 and, for the rest, 64 would be no less. A matrix `[R, D]` is here a
tuple of its tiles `[R, W]`: the first columns, and the others if there is a second tile.

Decoding, which is bound by memory, and what only adds up have a single tile (`load_tile`, as wide as `padded`): of
padding nothing is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import first_width, load_tile, second_width, store_tile


@triton.jit
def load_tiles(base, rows, stride, row_mask, D: tl.constexpr, WIDEST: tl.constexpr = 256):
    """Rows `[R]` of a matrix `[R, D]` whose rows stand `stride` apart; zero outside the mask and behind `D`."""
    FIRST: tl.constexpr = first_width(D, WIDEST)
    SECOND: tl.constexpr = second_width(D, WIDEST)
    if SECOND == 0:
        return (load_tile(base, rows, stride, row_mask, D, FIRST),)
    else:
        return (
            load_tile(base, rows, stride, row_mask, FIRST, FIRST),
            load_tile(base + FIRST, rows, stride, row_mask, D - FIRST, SECOND),
        )


@triton.jit
def store_tiles(base, rows, stride, row_mask, x, D: tl.constexpr, WIDEST: tl.constexpr = 256):
    """The opposite of `load_tiles`; converts to the pointer's type."""
    FIRST: tl.constexpr = first_width(D, WIDEST)
    SECOND: tl.constexpr = second_width(D, WIDEST)
    if SECOND == 0:
        store_tile(base, rows, stride, row_mask, x[0], D, FIRST)
    else:
        store_tile(base, rows, stride, row_mask, x[0], FIRST, FIRST)
        store_tile(base + FIRST, rows, stride, row_mask, x[1], D - FIRST, SECOND)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, D: tl.constexpr, WIDEST: tl.constexpr = 256):
    """Zeros `[ROWS, D]` in float32."""
    FIRST: tl.constexpr = first_width(D, WIDEST)
    SECOND: tl.constexpr = second_width(D, WIDEST)
    if SECOND == 0:
        return (tl.zeros([ROWS, FIRST], tl.float32),)
    else:
        return tl.zeros([ROWS, FIRST], tl.float32), tl.zeros([ROWS, SECOND], tl.float32)


@triton.jit
def dot_tiles(a, b, PRECISION: tl.constexpr):
    """`a b^T` of two matrices in tiles, `[RA, D]` and `[RB, D]`, as `[RA, RB]` in float32; `b` in `a`'s type."""
    products = tl.dot(a[0], tl.trans(b[0].to(a[0].dtype)), input_precision=PRECISION)
    if len(a) == 2:
        products = tl.dot(a[1], tl.trans(b[1].to(a[1].dtype)), products, input_precision=PRECISION)
    return products


@triton.jit
def add_products(weights, x, acc, PRECISION: tl.constexpr):
    """`acc + weights x`, of weights `[RA, RB]` and matrices in tiles, `x [RB, D]` and `acc [RA, D]`."""
    first = tl.dot(weights, x[0], acc[0], input_precision=PRECISION)
    if len(x) == 1:
        return (first,)
    else:
        return first, tl.dot(weights, x[1], acc[1], input_precision=PRECISION)


@triton.jit
def add_tiles(x, y):
    """`x + y` in float32, of which `x` is."""
    if len(x) == 1:
        return (x[0] + y[0].to(tl.float32),)
    else:
        return x[0] + y[0].to(tl.float32), x[1] + y[1].to(tl.float32)


@triton.jit
def scale_tiles(x, factor):
    """`x * factor`, a number or `[R, 1]`."""
    if len(x) == 1:
        return (x[0] * factor,)
    else:
        return x[0] * factor, x[1] * factor


@triton.jit
def divide_tiles(x, divisor):
    """`x / divisor`, `[R, 1]`."""
    if len(x) == 1:
        return (x[0] / divisor,)
    else:
        return x[0] / divisor, x[1] / divisor


@triton.jit
def finish_softmax(acc, top, total):
    """The average of what `acc` is the weighted sum of, and the log2-sum-exp; both 0 for a row that saw nothing."""
    seen = total > 0
    out = divide_tiles(acc, tl.where(seen, total, 1.0)[:, None])
    return out, tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), 0.0)
