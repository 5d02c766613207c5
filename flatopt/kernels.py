r"""The reversible map of :mod:`flatopt.reversible` on CUDA, all layers in three launches: factors, row norms, map and write.

Bound by memory and, nearly as much, by instructions: at 4.3 TB/s an H200 has 35 issue slots for each bf16 weight that is
read and written. So two columns share one thread, one hash and one Box-Muller, functions are the hardware's own
approximations, and a floor is an addition that rounds down.

``_prepare`` copies the A of every adapter for the tensor cores; ``_norms`` streams once over W for
:math:`\lVert w + sBA\rVert^2 = \lVert w\rVert^2 + 2s\,B_i\cdot(WA^\top)_i + s^2 B_i(AA^\top)B_i^\top`, with
:math:`\lVert w\rVert^2` cached, as W is frozen, and keeps the std, 4 bytes a row; ``_move`` draws, maps and writes, and
does the same again to restore. For the other restore modes it plainly adds and subtracts the noise. Which program, thread or
launch meets an element changes nothing: its noise follows from (step, target, row, column).

Same noise as the reference up to the last bits of the functions; where w/a is an integer but for rounding, the two may
count w to different blocks and move it to different sides. Restoring is exact by construction all the same, since both
toggles do the same arithmetic: no contraction is left to the compiler.
"""

# ruff: noqa: SIM300 (Triton's compile-time branches; DTYPE is no constant to ruff's taste)
import array
import contextlib
import functools
import math
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import noise
from .draw import Draw
from .reversible import _delta_table, grid_bits
from .scale import fill_std

# older ones (torch < 2.6) run _norms wrongly in their interpreter, and were not tried on a GPU
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 2):
    raise ImportError(f"the kernels need Triton 3.2, there is {triton.__version__}")

MUL1, MUL2, GOLDEN = tl.constexpr(noise.MUL1), tl.constexpr(noise.MUL2), tl.constexpr(noise.GOLDEN)
TWO_PI, MINUS_TWO_LN_2 = tl.constexpr(2 * math.pi), tl.constexpr(-2 * math.log(2))
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# What fits registers and cache of an H200 best (benchmarks/LOG.md); the noise is the same whatever stands here.
ROWS, PAIRS, WARPS = 16, 64, 4
SPAN = tl.constexpr(1 << 13)  # pairs of columns a program takes
NORM_ROWS, NORM_DEPTH, NORM_WARPS, NORM_STAGES = 64, 64, 4, 4
COUNTS_LISTS = torch.__version__ >= (2, 6)
MAX_RANK = 64  # beyond it the small matrices of _norms no longer fit shared memory everywhere
APPROX = torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1"

# The table of layers: one int64 row each, of these fields.
FIELDS = tl.constexpr(19)
WEIGHT, SHAPE, STRIDE, STDS, SUMS = (tl.constexpr(i) for i in (0, 1, 3, 5, 6))
RANK_OF, A_AT, B_AT, SCRATCH, SCALING, INDEX, NORMS = (tl.constexpr(i) for i in (7, 8, 11, 14, 15, 16, 18))


# --- the hardware's approximations; APPROX is off in Triton's interpreter and on other vendors' GPUs ------------------


@triton.jit
def _asm(text: tl.constexpr, x):
    return tl.inline_asm_elementwise(text, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x, APPROX: tl.constexpr):
    return _asm("lg2.approx.ftz.f32 $0, $1;", x) if APPROX else tl.log2(x)


@triton.jit
def _sqrt(x, APPROX: tl.constexpr):
    return _asm("sqrt.approx.ftz.f32 $0, $1;", x) if APPROX else tl.sqrt(x)


@triton.jit
def _cos(x, APPROX: tl.constexpr):
    return _asm("cos.approx.ftz.f32 $0, $1;", x) if APPROX else tl.cos(x)


@triton.jit
def _sin(x, APPROX: tl.constexpr):
    return _asm("sin.approx.ftz.f32 $0, $1;", x) if APPROX else tl.sin(x)


@triton.jit
def _reciprocal(x, APPROX: tl.constexpr):
    return _asm("rcp.approx.ftz.f32 $0, $1;", x) if APPROX else 1.0 / x


@triton.jit
def _whole(x, factor, offset, APPROX: tl.constexpr):
    """2 + 2^-22 max(0, floor(x factor + offset)), both given over 2^22: the sum has no room for finer bits."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; fma.rn.sat.f32 t, $1, $2, $3; add.rm.f32 $0, t, 0f40000000; }",
            "=f,f,f,f", [x, factor, offset], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    scaled = tl.maximum(tl.fma(x, factor, offset), 0.0) * 4194304.0
    return tl.floor(scaled) * (1.0 / 4194304.0) + 2.0


@triton.jit
def _odd(w, inverse, APPROX: tl.constexpr):
    """The parity of floor(w * inverse) as a sign bit; some fixed bit where that exceeds 2^22."""
    if APPROX:
        floor = tl.inline_asm_elementwise(
            "fma.rm.f32 $0, $1, $2, 0f4B400000;", "=f,f,f", [w, inverse], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        floor = tl.floor(w * inverse) + 12582912.0
    return floor.to(tl.int32, bitcast=True) << 31


@triton.jit
def _dot(x, y, total, APPROX: tl.constexpr):
    if not APPROX:  # Triton's interpreter cannot multiply bfloat16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total)


# --- noise ------------------------------------------------------------------------------------------------------------


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * MUL1
    x = (x ^ (x >> 15)) * MUL2
    return x ^ (x >> 15)


@triton.jit
def _normals(pair, first, second, APPROX: tl.constexpr):
    """(radius, cosine, sine) of the pair's two normals."""
    x = pair.to(tl.uint32) * GOLDEN + first
    x = (x ^ (x >> 16)) * MUL1 + second
    x = (x ^ (x >> 15)) * MUL2
    x = x ^ (x >> 15)
    # 16 bits at the top of a mantissa are a number in [1, 2): no conversion from integers, which is slow
    u = (((x >> 9) & 0x7FFF80) | 0x3F800000).to(tl.float32, bitcast=True) - (1.0 - 1.0 / 131072)
    v = (((x << 7) & 0x7FFF80) ^ 0x3FC00000).to(tl.float32, bitcast=True)
    angle = tl.fma(v, TWO_PI, (1.0 / 131072 - 1.5) * TWO_PI)
    return _sqrt(_log2(u, APPROX) * MINUS_TWO_LN_2, APPROX), _cos(angle, APPROX), _sin(angle, APPROX)


@triton.jit
def _grid(std, below, DTYPE: tl.constexpr, table):
    """rho, delta and step of :func:`flatopt.reversible.grid`; ``below``: log2 of rms over step, plus log2 sigma."""
    lowest: tl.constexpr = 103 if DTYPE == tl.float16 else 1
    exponent = tl.maximum(((std.to(tl.int32, bitcast=True) >> 23) & 0xFF) - below, lowest)
    step = (exponent << 23).to(tl.float32, bitcast=True)
    rho = std * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    at = tl.minimum(tl.log2(tl.maximum(rho, 1.0 / 256)) * 16.0 + 128.0, 223.999)
    left = at.to(tl.int32)
    low = tl.load(table + left)
    delta = tl.fma(tl.load(table + left + 1) - low, at - left.to(tl.float32), low)
    return rho, tl.where(rho < 1.0 / 256, float("-inf"), delta), step


# --- the map ----------------------------------------------------------------------------------------------------------


@triton.jit
def _unpack(word, DTYPE: tl.constexpr):
    """A word's low and high element, as float32."""
    if DTYPE == tl.float32:
        return word.to(tl.int32).to(tl.float32, bitcast=True), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif DTYPE == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -0x10000).to(tl.float32, bitcast=True)
    else:
        low, high = word.to(tl.int16).to(DTYPE, bitcast=True), (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _join(low, high, DTYPE: tl.constexpr):
    """A word of two integers as wide as an element."""
    if DTYPE == tl.float32:
        return low.to(tl.uint32, bitcast=True).to(tl.int64) | (high.to(tl.int64) << 32)
    else:
        return low.to(tl.uint16, bitcast=True).to(tl.int32) | (high.to(tl.int32) << 16)


@triton.jit
def _round(low, high, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    if DTYPE == tl.float32:
        return _join(low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True), DTYPE)
    elif APPROX:
        text: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;" if DTYPE == tl.float16 else "cvt.rn.bf16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(text, "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _join(low.to(DTYPE).to(tl.int16, bitcast=True), high.to(DTYPE).to(tl.int16, bitcast=True), DTYPE)


@triton.jit
def _where_equal(x, y, yes, no, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    """Element by element ``yes`` where ``x`` and ``y`` have the same bits, else ``no``."""
    if APPROX and DTYPE != tl.float32:
        # the carry of (d & 7fff) + 7fff sets the top bit of every half of d = x ^ y that is not 0; prmt spreads it
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t;
            lop3.b32 t, $1, $2, 0x7fff7fff, 0x28; add.u32 t, t, 0x7fff7fff; lop3.b32 t, t, $1, $2, 0xF6;
            prmt.b32 t, t, t, 0xBB99; lop3.b32 $0, t, $4, $3, 0xCA; }""",
            "=r,r,r,r,r", [x, y, yes, no], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    LOW: tl.constexpr = 0xFFFFFFFF if DTYPE == tl.float32 else 0xFFFF
    d = x ^ y
    take = tl.where((d & LOW) == 0, LOW, 0).to(x.dtype) | tl.where((d & ~LOW) == 0, ~LOW, 0).to(x.dtype)
    return (yes & take) | (no & ~take)


@triton.jit
def _block(radius, direction, rho, delta, step, APPROX: tl.constexpr):
    """The length of an element's blocks: inverted, and with the sign of the noise."""
    a = tl.fma(_whole(radius * tl.abs(direction), rho, delta, APPROX), step, -2.0 * step)
    signed = a.to(tl.int32, bitcast=True) | (direction.to(tl.int32, bitcast=True) & -0x80000000)
    return _reciprocal(a, APPROX), signed


@triton.jit
def _flip(w, inverse, signed, APPROX: tl.constexpr):
    return w + (signed ^ _odd(w, inverse, APPROX)).to(tl.float32, bitcast=True)


@triton.jit
def _map(word, radius, cosine, sine, rho, delta, step, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    """f of the two neighbours in a word."""
    inverse0, signed0 = _block(radius, cosine, rho, delta, step, APPROX)
    inverse1, signed1 = _block(radius, sine, rho, delta, step, APPROX)
    even, odd = _unpack(word, DTYPE)
    moved = _round(_flip(even, inverse0, signed0, APPROX), _flip(odd, inverse1, signed1, APPROX), DTYPE, APPROX)
    even, odd = _unpack(moved, DTYPE)
    back = _round(_flip(even, inverse0, signed0, APPROX), _flip(odd, inverse1, signed1, APPROX), DTYPE, APPROX)
    return _where_equal(back, word, moved, word, DTYPE, APPROX)


# --- the launches -----------------------------------------------------------------------------------------------------


@triton.jit
def _prepare(
    layers, scratch, grams,
    DTYPE: tl.constexpr, A_DTYPE: tl.constexpr, RANK: tl.constexpr, DEPTH: tl.constexpr,
    APPROX: tl.constexpr,
):  # fmt: skip
    """A layer's A in W's dtype, rows contiguous, for the tensor cores; and AA^T."""
    layer = layers + tl.program_id(0) * FIELDS
    n, r = tl.load(layer + SHAPE + 1), tl.load(layer + RANK_OF)
    k = tl.arange(0, RANK)[:, None]
    source = tl.load(layer + A_AT).to(tl.pointer_type(A_DTYPE)) + k.to(tl.int64) * tl.load(layer + A_AT + 1)
    target = scratch + tl.load(layer + SCRATCH) + k * n
    gram = tl.zeros([RANK, RANK], tl.float32)
    for start in range(0, tl.where(r > 0, n, 0), DEPTH):
        j = start + tl.arange(0, DEPTH)[None, :]
        here = (k < r) & (j < n)
        a = tl.load(source + j * tl.load(layer + A_AT + 2), mask=here, other=0.0).to(DTYPE)
        tl.store(target + j, a, mask=here)
        gram = _dot(a, tl.trans(a), gram, APPROX)
    tl.store(grams + tl.program_id(0) * RANK * RANK + k * RANK + tl.arange(0, RANK)[None, :], gram)


@triton.jit
def _norms(
    layers, tiles, stds, scratch, grams, sigma,
    PACKED: tl.constexpr, DTYPE: tl.constexpr, B_DTYPE: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Of every row the std: sigma ||w + sBA|| / sqrt(n), or with the norm that DoRA fixes."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    number = tl.load(tile)
    layer = layers + number * FIELDS
    sums, norms = tl.load(layer + SUMS), tl.load(layer + NORMS)
    if (sums | norms) == 0:  # the std was given
        return
    row = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    m, n, r = tl.load(layer + SHAPE), tl.load(layer + SHAPE + 1), tl.load(layer + RANK_OF)
    inside = row < m
    row_stride, column_stride = tl.load(layer + STRIDE), tl.load(layer + STRIDE + 1)
    W = tl.load(layer + WEIGHT).to(tl.pointer_type(DTYPE))
    A = scratch + tl.multiple_of(tl.load(layer + SCRATCH), 8)
    if PACKED:
        W, n, row_stride = tl.multiple_of(W, 16), tl.multiple_of(n, 8), tl.multiple_of(row_stride, 8)
    k = tl.arange(0, RANK)
    W += row[:, None] * row_stride
    A += k[:, None] * n
    cross = tl.zeros([ROWS, RANK], tl.float32)
    for start in range(0, tl.where(r > 0, n, 0), DEPTH):
        j = start + tl.arange(0, DEPTH)
        w_at = W + (j if PACKED else j * column_stride)[None, :]
        w = tl.load(w_at, mask=inside[:, None] & (j < n)[None, :], other=0.0)
        a = tl.load(A + j[None, :], mask=(k < r)[:, None] & (j < n)[None, :], other=0.0)
        cross = _dot(w, tl.trans(a), cross, APPROX)

    b_stride, b_step = tl.load(layer + B_AT + 1), tl.load(layer + B_AT + 2)
    b_at = tl.load(layer + B_AT).to(tl.pointer_type(B_DTYPE)) + row[:, None] * b_stride + k[None, :] * b_step
    b = tl.load(b_at, mask=inside[:, None] & (k < r)[None, :], other=0.0).to(tl.float32)
    b *= tl.load(layer + SCALING).to(tl.int32).to(tl.float32, bitcast=True)
    gram = tl.load(grams + number * RANK * RANK + k[:, None] * RANK + k[None, :])
    own = tl.load(sums.to(tl.pointer_type(tl.float32)) + row, mask=row < tl.where(sums == 0, 0, m), other=0.0)
    norm = tl.load(norms.to(tl.pointer_type(B_DTYPE)) + row, mask=row < tl.where(norms == 0, 0, m), other=0.0).to(tl.float32)
    total = own + norm * norm + tl.sum(b * (2.0 * cross + tl.dot(b, gram, input_precision="ieee")), 1)
    std = tl.sqrt_rn(tl.maximum(total, 0.0) / n.to(tl.float32)) * sigma
    std = tl.where(std < float("inf"), std, 0.0)  # a row with inf or NaN gets no noise
    tl.store(stds + tl.load(layer + STDS) + row, std, mask=inside)


@triton.jit
def _add(word, radius, cosine, sine, std, SIGN: tl.constexpr, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    """w + SIGN * noise, plainly rounded, of the two neighbours in a word."""
    even, odd = _unpack(word, DTYPE)
    even, odd = even + SIGN * (radius * cosine * std), odd + SIGN * (radius * sine * std)
    return _round(even, odd, DTYPE, APPROX)


@triton.jit
def _moved(word, radius, cosine, sine, std, rho, delta, step, HOW: tl.constexpr, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    """A word after the reversible map (``HOW`` 0), or plus or minus the noise (1, -1)."""
    if HOW == 0:
        return _map(word, radius, cosine, sine, rho, delta, step, DTYPE, APPROX)
    else:
        return _add(word, radius, cosine, sine, std, HOW, DTYPE, APPROX)


@triton.jit
def _sub_key(first, second, index):
    """:func:`flatopt.noise.sub_key`."""
    first = _mix(index.to(tl.uint32) * GOLDEN + first)
    return first, _mix(first ^ second)


@triton.jit(do_not_specialize=["below", "first", "second"])
def _move(
    layers, tiles, stds, table, below, first, second,
    HOW: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    layer = layers + tl.load(tile) * FIELDS
    row = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    left = tl.load(tile + 2)
    inside = row < tl.load(layer + SHAPE)
    n, row_stride, column_stride = tl.load(layer + SHAPE + 1), tl.load(layer + STRIDE), tl.load(layer + STRIDE + 1)
    if PACKED:
        n, row_stride = tl.multiple_of(n, 8), tl.multiple_of(row_stride, 8)
    std = tl.load(stds + tl.load(layer + STDS) + row, mask=inside, other=0.0)

    rho, delta, step = _grid(std, below, DTYPE, table)
    rho, delta, step = rho[:, None] / 4194304.0, delta[:, None] / 4194304.0, step[:, None] * 4194304.0
    first, second = _sub_key(first.to(tl.uint32), second.to(tl.uint32), tl.load(layer + INDEX))
    part = tl.load(layer + INDEX + 1)
    if part != 0:
        first, second = _sub_key(first, second, part)
    first, second = _sub_key(first, second, row)
    first, second = first[:, None], second[:, None]

    right = tl.minimum(left + SPAN, (n // 2 + n % 2).to(tl.int32))
    if PACKED:
        left, right = tl.multiple_of(left, 4), tl.multiple_of(right, 2 if DTYPE == tl.float32 else 4)
        WORD: tl.constexpr = tl.int64 if DTYPE == tl.float32 else tl.int32
        at = tl.multiple_of(tl.load(layer + WEIGHT).to(tl.pointer_type(WORD)), 16) + row[:, None] * (row_stride // 2)
    else:
        ELEMENT: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
        at = tl.load(layer + WEIGHT).to(tl.pointer_type(ELEMENT)) + row[:, None] * row_stride
    for start in range(left, right, PAIRS):
        pair = start + tl.arange(0, PAIRS)[None, :]
        here = inside[:, None] & (pair < right)
        radius, cosine, sine = _normals(pair, first, second, APPROX)
        if PACKED:
            word = tl.load(at + pair, mask=here, other=0)
            word = _moved(word, radius, cosine, sine, std[:, None], rho, delta, step, HOW, DTYPE, APPROX)
            tl.store(at + pair, word, mask=here)
        else:
            even = at + 2 * pair.to(tl.int64) * column_stride
            odd, both = even + column_stride, here & (2 * pair.to(tl.int64) + 1 < n)
            word = _join(tl.load(even, mask=here, other=0), tl.load(odd, mask=both, other=0), DTYPE)
            word = _moved(word, radius, cosine, sine, std[:, None], rho, delta, step, HOW, DTYPE, APPROX)
            tl.store(even, word.to(ELEMENT), mask=here)
            tl.store(odd, (word >> ELEMENT.primitive_bitwidth).to(ELEMENT), mask=both)


# --- from Python ------------------------------------------------------------------------------------------------------


def takes(draw: Draw) -> bool:
    """Whether the kernel can move this weight; the rest goes the reference's way."""
    dtype = draw.weight.dtype
    return dtype in DTYPES and draw.noise != "element" and (dtype != torch.bfloat16 or _has_bf16(draw.weight.device))


@functools.cache
def _has_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or not APPROX or torch.cuda.get_device_capability(device) >= (8, 0)


def fuse(draws: "list[Draw]") -> Callable[[int], None]:
    """What moves the weights of ``draws``, all :func:`taken <takes>`, given 0: the reversible map, or 1, -1: +- the noise.

    Sets ``draw.std`` where it is not set. One launch (and at first two small ones, for the stds) for all layers alike in
    device, dtypes and alignment; their table goes to the GPU when something in it changes, and nothing waits for the GPU.
    """
    layers = [_layer(draw) for draw in draws]
    known, launches = draws[0].launches or (None, None)
    if known != layers:
        by_kind = {}
        for draw, layer in zip(draws, layers):
            by_kind.setdefault(layer.kind, []).append((draw, layer))
        launches = [Launch(*kind, members) for kind, members in by_kind.items()]
        draws[0].launches = layers, launches
    unknown = [draw for draw in draws if draw.std is None and draw.layer.factors is None]
    if unknown:
        fill_std(unknown)
    for launch in launches:
        launch.fill()

    def move(how: int) -> None:
        for launch in launches:
            launch.move(how)

    return move


def _layer(draw: Draw) -> "Layer":
    known = draw.layer
    if draw.std is not None:
        layer = known or Layer(draw, None, None)
    else:
        state = draw.target.delta_state()
        layer = known if known and state is not None and known.state == state else Layer(draw, state, _factors(draw))
    if not known or (layer.kind, layer.fields, layer.state) != (known.kind, known.fields, known.state):
        draw.layer = layer
    return draw.layer


class Factors(NamedTuple):
    """What the row norms of W' follow from: W's square sums and at most one pair of factors, or the norms themselves."""

    sums: Tensor | None = None
    B: Tensor | None = None
    A: Tensor | None = None
    scaling: float = 0.0
    norms: Tensor | None = None


def _factors(draw: Draw) -> "Factors | None":
    """None if it takes more than the kernels know."""
    delta, device = draw.target.delta(), draw.weight.device
    if delta.row_norm is not None:
        norms = delta.row_norm.detach()
        return Factors(norms=norms.contiguous()) if norms.dtype in DTYPES and norms.device == device else None
    if delta.dense is not None or delta.alpha is not None or len(delta.factors) > 1:
        return None
    if not delta.factors:
        return Factors(draw.square_sums(draw.rows))
    B, A, scaling = delta.factors[0]
    if isinstance(scaling, Tensor) or A.shape[0] > MAX_RANK or A.dtype not in DTYPES or B.dtype not in DTYPES:
        return None
    return Factors(draw.square_sums(draw.rows), B, A, scaling) if A.device == B.device == device else None


class Layer:
    """A weight and its factors, as the table has them, while both stay where they are.

    ``state``: all that the factors follow from, as :meth:`Target.delta_state` tells it; None: they must be asked for again.
    """

    def __init__(self, draw: Draw, state: "tuple | None", factors: "Factors | None"):
        rows, self.factors = draw.rows, factors  # the latter kept, so that nothing else takes their memory
        sums, B, A, scaling, norms = factors or Factors()
        (m, n), (down, right), r = rows.shape, rows.stride(), 0 if A is None else A.shape[0]
        pointers = [tensor.data_ptr() for tensor in (A, B, norms) if tensor is not None]
        self.state = state if factors and state is not None and all(p in state for p in pointers) else None
        packed = right == 1 and (n | down) % 8 == 0 and rows.data_ptr() % 16 == 0
        a_dtype, b_dtype = (torch.float32 if tensor is None else tensor.dtype for tensor in (A, norms if B is None else B))
        self.kind = rows.device, rows.dtype, packed, a_dtype, b_dtype, max(16, 1 << (r - 1).bit_length() if r else 0)
        self.shape, self.scratch = (m, n), (r * n + 7) // 8 * 8
        self.fields = [rows.data_ptr(), m, n, down, right, 0, 0 if sums is None else sums.data_ptr(), r]
        self.fields += (A.data_ptr(), *A.stride(), B.data_ptr(), *B.stride()) if r else (0, 0, 0, 0, 0, 0)
        self.fields += (0, *struct.unpack("i", struct.pack("f", scaling)), draw.index, draw.part)
        self.fields.append(0 if norms is None else norms.data_ptr())


class Launch:
    """Layers alike in device, dtypes and alignment, and their table on the device."""

    def __init__(self, device, dtype, packed: bool, a_dtype, b_dtype, rank: int, members: "list[tuple[Draw, Layer]]"):
        self.device, self.dtype, self.rank, self.a_dtype = device, dtype, rank, DTYPES[a_dtype]
        self.packed, self.b_dtype = packed, DTYPES[b_dtype]
        self.draws = [draw for draw, _ in members]
        table, shapes, offset, self.scratch = array.array("q"), [], 0, 0
        for _, layer in members:
            fields = layer.fields.copy()
            fields[STDS.value], fields[SCRATCH.value] = offset, self.scratch
            table.extend(fields)
            shapes.append(layer.shape)
            offset, self.scratch = offset + layer.shape[0], self.scratch + layer.scratch
        self.layers = _upload(table, device)
        self.tiles = _tiles(tuple(shapes), ROWS, SPAN.value, device)
        self.norm_tiles = _tiles(tuple(shapes), NORM_ROWS, None, device)
        self.stds = torch.empty(offset, dtype=torch.float32, device=device)
        self.std_of = self.stds.unsqueeze(1).split([m for m, _ in shapes])

    def fill(self) -> None:
        """The stds: those given, or else found here."""
        find = False
        for draw, std in zip(self.draws, self.std_of):
            if draw.std is None:
                find, draw.std = True, std
            elif draw.std is not std:
                std.copy_(draw.std.expand_as(std))
        if not find:
            return
        device, dtype, rank = self.device, DTYPES[self.dtype], self.rank
        depth = max(32, NORM_DEPTH * 16 // rank)
        scratch = torch.empty(max(self.scratch, 1), dtype=self.dtype, device=device)
        grams = torch.empty(len(self.draws), rank, rank, device=device)
        kinds = self.packed, dtype, self.b_dtype, rank, NORM_ROWS, depth, APPROX
        with _on(device):
            _prepare[(len(self.draws),)](self.layers, scratch, grams, dtype, self.a_dtype, rank, depth, APPROX)
            _norms[(len(self.norm_tiles),)](
                self.layers, self.norm_tiles, self.stds, scratch, grams, self.draws[0].sigma, *kinds,
                num_warps=NORM_WARPS, num_stages=NORM_STAGES,
            )  # fmt: skip

    def move(self, how: int) -> None:
        sigma, key = self.draws[0].sigma, self.draws[0].step_key
        below = math.frexp(sigma)[1] - 1 + grid_bits(sigma, self.dtype)
        with _on(self.device):
            _move[(len(self.tiles),)](
                self.layers, self.tiles, self.stds, _delta_table(self.device), below, *map(noise.signed, key),
                how, self.packed, DTYPES[self.dtype], ROWS, PAIRS, APPROX,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        _count_write([draw.weight for draw in self.draws])


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _upload(table: "array.array[int]", device: torch.device) -> Tensor:
    host = torch.frombuffer(table, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host  # a plain copy would wait


@functools.lru_cache(maxsize=64)
def _tiles(shapes: "tuple[tuple[int, int], ...]", rows: int, span: "int | None", device: torch.device) -> Tensor:
    """(layer, first row, first pair) of each program, for ``rows`` rows by ``span`` pairs each, or by whole rows."""
    tiles = [
        torch.cartesian_prod(
            torch.tensor([layer]), torch.arange(0, m, rows), torch.arange(0, (n + 1) // 2 if span else 1, span or 1)
        )
        for layer, (m, n) in enumerate(shapes)
    ]
    return torch.cat(tiles).int().to(device)


def _count_write(weights: "list[Tensor]") -> None:
    # a kernel's writes do not move the version counters, by which autograd knows that W changed
    if COUNTS_LISTS:
        torch.autograd.graph.increment_version(weights)
    else:
        for weight in weights:
            torch.autograd.graph.increment_version(weight)
