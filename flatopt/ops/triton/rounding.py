r"""A Triton kernel that takes weights to where the merged one is rounded: W + σ (Q(W + sBA) - (W + sBA)), in place.

The twin of :func:`flatopt.ops.rounding.to_rounded`. A program takes whole rows: once over them for what a row's scale
follows from and for inf and NaN, which leave a row as it is, and once more to round. The merged weight is made twice, in
registers, and never stands in memory. Divisions and roundings are those of float32, not the hardware's approximations:
torch's way and this one part only where a merged weight lies a few last bits from the middle of two levels.
"""

import triton
import triton.language as tl

from .kernels import (
    A_AT,
    A_COLUMN_STRIDE,
    A_ROW_STRIDE,
    B_AT,
    B_COLUMN_STRIDE,
    B_ROW_STRIDE,
    COLUMN_STRIDE,
    FIELDS,
    HEIGHT,
    RANK_OF,
    ROW_STRIDE,
    SCALING,
    WEIGHT,
    WIDTH,
)

# what lies between a group's least and largest weight
SYMMETRIC, ASYMMETRIC, NORMAL_FLOAT = (tl.constexpr(kind) for kind in range(3))
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to less than 2^22, it leaves no room for finer bits


@triton.jit
def _nearest(x):
    """The nearest integer, halves to even."""
    return (x + TO_INTEGER) - TO_INTEGER


@triton.jit
def _rounded(w, low, high, levels, KIND: tl.constexpr, BITS: tl.constexpr):
    """``w`` rounded; ``low`` and ``high``: the least and the largest of its group and 0."""
    if KIND == ASYMMETRIC:
        scale = tl.div_rn(high - low, 2.0**BITS - 1)
        zero = _nearest(tl.div_rn(-low, scale))
        level = _nearest(tl.div_rn(w, scale)) + zero
        q = (tl.minimum(tl.maximum(level, 0.0), 2.0**BITS - 1) - zero) * scale
    elif KIND == SYMMETRIC:
        scale = tl.div_rn(tl.maximum(high, -low), 2.0 ** (BITS - 1) - 1)
        q = _nearest(tl.div_rn(w, scale)) * scale
    else:
        scale = tl.maximum(high, -low)
        x = tl.div_rn(w, scale)
        below = tl.load(levels)
        q = tl.zeros_like(x) + below
        for number in tl.static_range(1, 16):
            above = tl.load(levels + number)
            q = tl.where(x > (above + below) / 2, above, q)
            below = above
        q *= scale
    return tl.where(scale > 0.0, q, 0.0)


@triton.jit
def _look(at, column_stride, A, a_row_stride, a_column_stride, B, b_column_stride, r, scaling, inside, j, n):
    """Some columns of W and of W + sBA, float32; 0 outside of them."""
    here = j < n
    w = tl.load(at + j[None, :] * column_stride, mask=inside[:, None] & here[None, :], other=0.0).to(tl.float32)
    update = tl.zeros_like(w)
    for k in range(0, r):
        a = tl.load(A + k * a_row_stride + j * a_column_stride, mask=here, other=0.0).to(tl.float32)
        b = tl.load(B + k * b_column_stride, mask=inside, other=0.0).to(tl.float32)
        update = tl.fma(tl.zeros_like(w) + b[:, None], tl.zeros_like(w) + a[None, :], update)
    return w, w + scaling * update


@triton.jit
def to_rounded(
    table, tiles, levels, sigma,
    KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, A_PACKED: tl.constexpr,
    DTYPE: tl.constexpr, A_DTYPE: tl.constexpr, B_DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``GROUP``: weights of a row that share a scale, a power of two and no more than ``COLUMNS``; 0: all of them."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    layer = table + tl.load(tile) * FIELDS
    row = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < tl.load(layer + HEIGHT)
    n, row_stride, column_stride = tl.load(layer + WIDTH), tl.load(layer + ROW_STRIDE), tl.load(layer + COLUMN_STRIDE)
    at = tl.load(layer + WEIGHT).to(tl.pointer_type(DTYPE))
    if PACKED:
        at, n, row_stride, column_stride = tl.multiple_of(at, 16), tl.multiple_of(n, 8), tl.multiple_of(row_stride, 8), 1
    at += row[:, None] * row_stride
    A, B = tl.load(layer + A_AT).to(tl.pointer_type(A_DTYPE)), tl.load(layer + B_AT).to(tl.pointer_type(B_DTYPE))
    B += row * tl.load(layer + B_ROW_STRIDE)
    a_row_stride, a_column_stride = tl.load(layer + A_ROW_STRIDE), tl.load(layer + A_COLUMN_STRIDE)
    if A_PACKED:
        A, a_row_stride, a_column_stride = tl.multiple_of(A, 16), tl.multiple_of(a_row_stride, 8), 1
    b_column_stride, r = tl.load(layer + B_COLUMN_STRIDE), tl.load(layer + RANK_OF)
    scaling = tl.load(layer + SCALING).to(tl.int32).to(tl.float32, bitcast=True)

    low, high, strange = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int32)
    for start in range(0, n, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        _, merged = _look(at, column_stride, A, a_row_stride, a_column_stride, B, b_column_stride, r, scaling, inside, j, n)
        low, high = tl.minimum(low, tl.min(merged, 1)), tl.maximum(high, tl.max(merged, 1))
        strange |= tl.max((merged - merged != 0.0).to(tl.int32), 1)  # inf and NaN
    writes = inside & (strange == 0)
    for start in range(0, n, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        w, merged = _look(at, column_stride, A, a_row_stride, a_column_stride, B, b_column_stride, r, scaling, inside, j, n)
        if GROUP == 0:
            rounded = _rounded(merged, low[:, None], high[:, None], levels, KIND, BITS)
        else:
            groups = tl.reshape(merged, [ROWS, COLUMNS // GROUP, GROUP])
            least, largest = tl.minimum(tl.min(groups, 2), 0.0), tl.maximum(tl.max(groups, 2), 0.0)
            rounded = _rounded(groups, least[:, :, None], largest[:, :, None], levels, KIND, BITS)
            rounded = tl.reshape(rounded, [ROWS, COLUMNS])
        moved = (w + sigma * (rounded - merged)).to(DTYPE)
        tl.store(at + j[None, :] * column_stride, moved, mask=writes[:, None] & (j < n)[None, :])
