r"""Triton kernels that perturb all layers in three launches: factors, row norms, the reversible map and write.

Bound by memory and, nearly as much, by instructions: at 4.3 TB/s an H200 has 35 issue slots for each bf16 weight that is
read and written. So two columns share one thread, one hash and one Box-Muller, functions are the hardware's own
approximations, and a floor is an addition that rounds down.

``prepare`` copies the A of every adapter for the tensor cores; ``norms`` streams once over W for
:math:`\lVert w + sBA\rVert^2 = \lVert w\rVert^2 + 2s\,B_i\cdot(WA^\top)_i + s^2 B_i(AA^\top)B_i^\top`, with
:math:`\lVert w\rVert^2` cached, as W is frozen (or takes the norm that DoRA fixes), and keeps the std, 4 bytes a row;
``move`` makes the noise, maps and writes, and does the same again to restore. For the other restore modes it plainly adds
and subtracts the noise. Which program, thread or launch meets an element changes nothing: its noise follows from (step,
weight, row, column).

Proof of return: ``move`` sums up, row by row, the words that it reads and those that it writes, one instruction a word
each. To perturb it leaves both sums; to restore it compares what it found with what was left, and what it wrote with what
once stood there. A tile that is not as it should be is marked, and moved back at once by the program that moved it:
f(f(v)) = v, so the foreign bits v stand there again, or the clean ones, if somebody had put those back.

Same noise as torch's path up to the last bits of the functions; where w/a is an integer but for rounding, the two may
count w to different blocks and move it to different sides. Restoring is exact by construction all the same, since both
toggles do the same arithmetic: no contraction is left to the compiler.
"""

# ruff: noqa: SIM300 (Triton's compile-time branches; DTYPE is no constant to ruff's taste)
import math
import os

import torch
import triton
import triton.language as tl

from .. import noise
from .table import Row, field

# older ones (torch < 2.6) run norms wrongly in their interpreter, and were not tried on a GPU
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 2):
    raise ImportError(f"the kernels need Triton 3.2, there is {triton.__version__}")

MUL1, MUL2, GOLDEN = tl.constexpr(noise.MUL1), tl.constexpr(noise.MUL2), tl.constexpr(noise.GOLDEN)
TWO_PI, MINUS_TWO_LN_2 = tl.constexpr(2 * math.pi), tl.constexpr(-2 * math.log(2))
# 148 of float32's 2 pi apart, exactly: of 128 to 255, 149 is the one start for which that is a float32 (``_lower``)
ANGLE_AT_148, ANGLE_AT_0 = tl.constexpr((1.0 / 131072 - 1.5) * 2 * math.pi), tl.constexpr(-939.336181640625)
SPAN = tl.constexpr(1 << 13)  # pairs of columns a program takes
SUM = tl.constexpr(0x85EBCA6B)  # odd, so that no single changed word is lost
APPROX = torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1"

FIELDS = tl.constexpr(len(Row._fields))
WEIGHT, HEIGHT, WIDTH = field("weight"), field("rows"), field("columns")
ROW_STRIDE, COLUMN_STRIDE = field("row_stride"), field("column_stride")
STD, SQUARE_SUMS, NORMS, SCALING, SCRATCH = (field(f) for f in ("std", "square_sums", "norms", "scaling", "scratch"))
RANK_OF, A_AT, A_ROW_STRIDE, A_COLUMN_STRIDE = (field(f) for f in ("rank", "a", "a_row_stride", "a_column_stride"))
B_AT, B_ROW_STRIDE, B_COLUMN_STRIDE = field("b"), field("b_row_stride"), field("b_column_stride")
NAME, FIRST_ROW, MARK = field("name"), field("first_row"), field("mark")

# What move does: the reversible map, W + noise, W - noise, or nothing (it reads and sums up).
TOGGLE, ADD, SUBTRACT, READ = (tl.constexpr(how) for how in (0, 1, -1, 2))
# And what it does with the sums. PERTURB: leave them. RESUME: the same, but a tile that was perturbed already is moved back.
# RESTORE: compare them, mark weights, and move back what was not as PERTURB left it. Done again, RESUME and RESTORE come to
# the same. PERTURBED: leave that of what is found as what was written, by another kernel.
PERTURB, RESUME, RESTORE, PERTURBED = (tl.constexpr(stage) for stage in range(4))


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
def _whole(radius, direction, factor, offset, APPROX: tl.constexpr):
    """2 + 2^-22 max(0, floor(|z| factor + offset)), both given over 2^22: the sum has no room for finer bits."""
    if APPROX:  # Triton's own abs would take an instruction, PTX's is a flag of the multiplication
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t; abs.f32 t, $2; mul.rn.f32 t, $1, t;
            fma.rn.sat.f32 t, t, $3, $4; add.rm.f32 $0, t, 0f40000000; }""",
            "=f,f,f,f,f", [radius, direction, factor, offset], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    scaled = tl.maximum(tl.fma(radius * tl.abs(direction), factor, offset), 0.0) * 4194304.0
    return tl.floor(scaled) * (1.0 / 4194304.0) + 2.0


@triton.jit
def _block_number(w, inverse, APPROX: tl.constexpr):
    """An integer as odd as floor(w * inverse); some fixed one where that exceeds 2^22."""
    if APPROX:
        floor = tl.inline_asm_elementwise(
            "fma.rm.f32 $0, $1, $2, 0f4B400000;", "=f,f,f", [w, inverse], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        floor = tl.floor(w * inverse) + 12582912.0
    return floor.to(tl.int32, bitcast=True)


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
def _upper(x, APPROX: tl.constexpr):
    """128 + the upper 16 bits of x over 2^16: the mantissa's end beside an exponent; converting is slow."""
    if APPROX:  # one instruction, as an addition of shifted bits
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 16; add.u32 $0, t, 0x43000000; }",
            "=f,r", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return ((x >> 16) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _lower(x, APPROX: tl.constexpr):
    """149 + the lower 16 bits of x over 2^16."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xFFFF, 0x43150000, 0xEA;", "=f,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return ((x & 0xFFFF) | 0x43150000).to(tl.float32, bitcast=True)


@triton.jit
def _normals(pair, first, second, APPROX: tl.constexpr):
    """(radius, cosine, sine) of the pair's two normals."""
    x = pair.to(tl.uint32) * GOLDEN + first
    x = (x ^ (x >> 16)) * MUL1 + second
    x = (x ^ (x >> 15)) * MUL2
    x = x ^ (x >> 15) ^ 0x8000  # half a turn: angles from -pi to pi
    u = _upper(x, APPROX) - (128.0 - 1.0 / 131072)
    v = _lower(x, APPROX)
    # fused, both are the same to the last bit; the interpreter rounds the product, which is best small
    angle = tl.fma(v, TWO_PI, ANGLE_AT_0) if APPROX else tl.fma(v - 148.0, TWO_PI, ANGLE_AT_148)
    return _sqrt(_log2(u, APPROX) * MINUS_TWO_LN_2, APPROX), _cos(angle, APPROX), _sin(angle, APPROX)


@triton.jit
def _grid(std, below, DTYPE: tl.constexpr, deltas):
    """rho, delta and step of :func:`flatopt.ops.reversible.grid`; ``below``: log2 of rms over step, plus log2 sigma."""
    lowest: tl.constexpr = 103 if DTYPE == tl.float16 else 1
    exponent = tl.maximum(((std.to(tl.int32, bitcast=True) >> 23) & 0xFF) - below, lowest)
    step = (exponent << 23).to(tl.float32, bitcast=True)
    rho = std * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    at = tl.minimum(tl.log2(tl.maximum(rho, 1.0 / 256)) * 16.0 + 128.0, 223.999)
    left = at.to(tl.int32)
    low = tl.load(deltas + left)
    delta = tl.fma(tl.load(deltas + left + 1) - low, at - left.to(tl.float32), low)
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
    a = tl.fma(_whole(radius, direction, rho, delta, APPROX), step, -2.0 * step)
    signed = a.to(tl.int32, bitcast=True) | (direction.to(tl.int32, bitcast=True) & -0x80000000)
    return _reciprocal(a, APPROX), signed


@triton.jit
def _flip(w, inverse, signed, APPROX: tl.constexpr):
    # its parity added to the sign bit: a multiplication with addition, in place of a shift and an exclusive or
    return w + (signed + (_block_number(w, inverse, APPROX) << 31)).to(tl.float32, bitcast=True)


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
def prepare(
    table, scratch,
    DTYPE: tl.constexpr, A_DTYPE: tl.constexpr, RANK: tl.constexpr, DEPTH: tl.constexpr,
    APPROX: tl.constexpr,
):  # fmt: skip
    """A layer's A in W's dtype, rows contiguous, for the tensor cores; and AA^T, at the beginning of the scratch."""
    layer = table + tl.program_id(0) * FIELDS
    n, r = tl.load(layer + WIDTH), tl.load(layer + RANK_OF)
    k = tl.arange(0, RANK)[:, None]
    source = tl.load(layer + A_AT).to(tl.pointer_type(A_DTYPE)) + k.to(tl.int64) * tl.load(layer + A_ROW_STRIDE)
    target = scratch + tl.load(layer + SCRATCH) + k * n
    gram = tl.zeros([RANK, RANK], tl.float32)
    for start in range(0, tl.where(r > 0, n, 0), DEPTH):
        j = start + tl.arange(0, DEPTH)[None, :]
        here = (k < r) & (j < n)
        a = tl.load(source + j * tl.load(layer + A_COLUMN_STRIDE), mask=here, other=0.0).to(DTYPE)
        tl.store(target + j, a, mask=here)
        gram = _dot(a, tl.trans(a), gram, APPROX)
    grams = scratch.to(tl.pointer_type(tl.float32))
    tl.store(grams + tl.program_id(0) * RANK * RANK + k * RANK + tl.arange(0, RANK)[None, :], gram)


@triton.jit
def norms(
    table, tiles, stds, scratch, sigma,
    PACKED: tl.constexpr, DTYPE: tl.constexpr, B_DTYPE: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Of every row the std: sigma ||w + sBA|| / sqrt(n), or with the norm that DoRA fixes."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    number = tl.load(tile)
    layer = table + number * FIELDS
    sums, fixed = tl.load(layer + SQUARE_SUMS), tl.load(layer + NORMS)
    if (sums | fixed) == 0:  # the std was given
        return
    row = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    m, n, r = tl.load(layer + HEIGHT), tl.load(layer + WIDTH), tl.load(layer + RANK_OF)
    inside = row < m
    row_stride, column_stride = tl.load(layer + ROW_STRIDE), tl.load(layer + COLUMN_STRIDE)
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

    b_stride, b_step = tl.load(layer + B_ROW_STRIDE), tl.load(layer + B_COLUMN_STRIDE)
    b_at = tl.load(layer + B_AT).to(tl.pointer_type(B_DTYPE)) + row[:, None] * b_stride + k[None, :] * b_step
    b = tl.load(b_at, mask=inside[:, None] & (k < r)[None, :], other=0.0).to(tl.float32)
    b *= tl.load(layer + SCALING).to(tl.int32).to(tl.float32, bitcast=True)
    grams = scratch.to(tl.pointer_type(tl.float32))
    gram = tl.load(grams + number * RANK * RANK + k[:, None] * RANK + k[None, :])
    own = tl.load(sums.to(tl.pointer_type(tl.float32)) + row, mask=row < tl.where(sums == 0, 0, m), other=0.0)
    norm = tl.load(fixed.to(tl.pointer_type(B_DTYPE)) + row, mask=row < tl.where(fixed == 0, 0, m), other=0.0).to(tl.float32)
    total = own + norm * norm + tl.sum(b * (2.0 * cross + tl.dot(b, gram, input_precision="ieee")), 1)
    std = tl.sqrt_rn(tl.maximum(total, 0.0) / n.to(tl.float32)) * sigma
    std = tl.where(std < float("inf"), std, 0.0)  # a row with inf or NaN gets no noise
    tl.store(stds + tl.load(layer + STD) + row, std, mask=inside)


@triton.jit
def _add(word, radius, cosine, sine, std, SIGN: tl.constexpr, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    """w + SIGN * noise, plainly rounded, of the two neighbours in a word."""
    even, odd = _unpack(word, DTYPE)
    even, odd = even + SIGN * (radius * cosine * std), odd + SIGN * (radius * sine * std)
    return _round(even, odd, DTYPE, APPROX)


@triton.jit
def _moved(word, radius, cosine, sine, std, rho, delta, step, HOW: tl.constexpr, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    """A word after the reversible map, or plus or minus the noise."""
    if HOW == TOGGLE:
        return _map(word, radius, cosine, sine, rho, delta, step, DTYPE, APPROX)
    else:
        return _add(word, radius, cosine, sine, std, HOW, DTYPE, APPROX)


@triton.jit
def _sub_key(first, second, index):
    """:func:`flatopt.ops.noise.sub_key`."""
    first = _mix(index.to(tl.uint32) * GOLDEN + first)
    return first, _mix(first ^ second)


@triton.jit
def _halves(word):
    return tl.split(tl.reshape(word, [word.shape[0], word.shape[1] // 2, 2]))


@triton.jit
def _turned(word):
    """Its halves exchanged: what a sum modulo 2^32 hardly sees of the highest bits, it sees here."""
    return (word << 16) | (word >> 16)


@triton.jit
def _two(word, DTYPE: tl.constexpr):
    """A word of two float32 as two of 32 bits; any other is both."""
    if DTYPE == tl.float32:
        return word.to(tl.uint32), (word >> 32).to(tl.uint32)
    else:
        return word.to(tl.uint32), word.to(tl.uint32)


@triton.jit
def _add_up(total, word, DTYPE: tl.constexpr, HALVINGS: tl.constexpr):
    """The total after a word more, so that every word's place counts and none that changed alone is lost.

    A thread's own neighbours, 2 to the power of ``HALVINGS``, are taken in at once, so that it keeps one total for them:
    where they are 16 bytes, two multiplications suffice.
    """
    if HALVINGS == 0:
        first, second = _two(word, DTYPE)
        return (total * SUM + first) * SUM + _turned(second)
    else:
        even, odd = _halves(word)
        if DTYPE == tl.float32:
            first, second = _two(even, DTYPE)
            third, fourth = _two(odd, DTYPE)
        else:
            first, third = _halves(even.to(tl.uint32))
            second, fourth = _halves(odd.to(tl.uint32))
        return ((total * SUM + first) ^ second ^ _turned(third)) * SUM + fourth


@triton.jit
def _sums(total, LANES: tl.constexpr):
    """The totals of a row's lanes in one, each with an odd factor of its own; int32."""
    factor = _mix(tl.arange(0, LANES).to(tl.uint32) + 1) | 1
    return tl.sum(total * factor[None, :], 1).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _pass(
    at, left, right, inside, n, column_stride, first, second, std, rho, delta, step,
    HOW: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, HALVINGS: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Move a tile, and the sums of its rows as they were found and as they were left."""
    LANES: tl.constexpr = PAIRS // 2**HALVINGS
    found_total, left_total = tl.zeros([ROWS, LANES], tl.uint32), tl.zeros([ROWS, LANES], tl.uint32)
    for start in range(left, right, PAIRS):
        pair = start + tl.arange(0, PAIRS)[None, :]
        here = inside[:, None] & (pair < right)
        if PACKED:
            word = tl.load(at + pair) if WHOLE else tl.load(at + pair, mask=here, other=0)
            found_total = _add_up(found_total, word, DTYPE, HALVINGS)
            if HOW != READ:
                radius, cosine, sine = _normals(pair, first, second, APPROX)
                word = _moved(word, radius, cosine, sine, std, rho, delta, step, HOW, DTYPE, APPROX)
                if WHOLE:
                    tl.store(at + pair, word)
                else:
                    tl.store(at + pair, word, mask=here)
                    word = tl.where(pair < right, word, 0)
                left_total = _add_up(left_total, word, DTYPE, HALVINGS)
        else:
            ELEMENT: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
            even = at + 2 * pair.to(tl.int64) * column_stride
            odd, both = even + column_stride, here & (2 * pair.to(tl.int64) + 1 < n)
            word = _join(tl.load(even, mask=here, other=0), tl.load(odd, mask=both, other=0), DTYPE)
            found_total = _add_up(found_total, word, DTYPE, HALVINGS)
            if HOW != READ:
                radius, cosine, sine = _normals(pair, first, second, APPROX)
                word = _moved(word, radius, cosine, sine, std, rho, delta, step, HOW, DTYPE, APPROX)
                low, high = word.to(ELEMENT), (word >> ELEMENT.primitive_bitwidth).to(ELEMENT)
                tl.store(even, low, mask=here)
                tl.store(odd, high, mask=both)
                left_total = _add_up(
                    left_total, _join(tl.where(here, low, 0), tl.where(both, high, 0), DTYPE), DTYPE, HALVINGS
                )
    return _sums(found_total, LANES), _sums(left_total, LANES)


@triton.jit(do_not_specialize=["below", "first", "second", "stage"])
def move(
    table, tiles, stds, deltas, sums, marks, below, first, second, stage,
    HOW: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, HALVINGS: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    tile = tiles + number * 3
    layer = table + tl.load(tile) * FIELDS
    row = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    left = tl.load(tile + 2)
    inside = row < tl.load(layer + HEIGHT)
    n, row_stride, column_stride = tl.load(layer + WIDTH), tl.load(layer + ROW_STRIDE), tl.load(layer + COLUMN_STRIDE)
    if PACKED:
        n, row_stride = tl.multiple_of(n, 8), tl.multiple_of(row_stride, 8)
    std = tl.load(stds + tl.load(layer + STD) + row, mask=inside, other=0.0)

    rho, delta, step = _grid(std, below, DTYPE, deltas)
    std, rho, delta, step = std[:, None], rho[:, None] / 4194304.0, delta[:, None] / 4194304.0, step[:, None] * 4194304.0
    first, second = _sub_key(first.to(tl.uint32), second.to(tl.uint32), tl.load(layer + NAME))
    first, second = _sub_key(first, second, tl.load(layer + FIRST_ROW) + row)
    first, second = first[:, None], second[:, None]

    right = tl.minimum(left + SPAN, (n // 2 + n % 2).to(tl.int32))
    if PACKED:
        left, right = tl.multiple_of(left, 4), tl.multiple_of(right, 2 if DTYPE == tl.float32 else 4)
        WORD: tl.constexpr = tl.int64 if DTYPE == tl.float32 else tl.int32
        at = tl.multiple_of(tl.load(layer + WEIGHT).to(tl.pointer_type(WORD)), 16) + row[:, None] * (row_stride // 2)
    else:
        ELEMENT: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
        at = tl.load(layer + WEIGHT).to(tl.pointer_type(ELEMENT)) + row[:, None] * row_stride
    found, written = _pass(
        at, left, right, inside, n, column_stride, first, second, std, rho, delta, step,
        HOW, PACKED, WHOLE, DTYPE, ROWS, PAIRS, HALVINGS, APPROX,
    )  # fmt: skip

    clean_at = sums + number * 2 * ROWS + tl.arange(0, ROWS)
    perturbed_at = clean_at + ROWS
    clean, perturbed = tl.load(clean_at, mask=inside, other=0), tl.load(perturbed_at, mask=inside, other=0)
    other = tl.max((inside & (found != perturbed)).to(tl.int32), 0)  # than perturb left
    unclean = tl.max((inside & (found != clean)).to(tl.int32), 0)
    lost = tl.max((inside & (written != clean)).to(tl.int32), 0)
    repeated = (stage == RESUME) & (other == 0) & (unclean != 0)
    if stage == RESTORE:
        mark, bad = tl.load(layer + MARK), other & unclean
        if HOW == TOGGLE:
            bad = bad | ((1 - other) & lost)
        if HOW == SUBTRACT:  # noqa: SIM102
            if other == 0:  # it drifts, and what it drifted to counts as clean
                tl.store(clean_at, written, mask=inside)
        if (bad != 0) & (mark >= 0):
            tl.store(marks + mark, 1)
    elif not repeated:
        tl.store(clean_at, found, mask=inside & (stage != PERTURBED))
        tl.store(perturbed_at, found if HOW == READ else written, mask=inside)
    if HOW != READ:  # noqa: SIM102
        if repeated | ((stage == RESTORE) & (other != 0)):
            tl.debug_barrier()  # what other threads wrote is read now
            _, put_back = _pass(
                at, left, right, inside, n, column_stride, first, second, std, rho, delta, step,
                -HOW, PACKED, WHOLE, DTYPE, ROWS, PAIRS, HALVINGS, APPROX,
            )  # fmt: skip
            if HOW == SUBTRACT:
                tl.store(clean_at, put_back, mask=inside)
            elif HOW == ADD:
                tl.store(perturbed_at, put_back, mask=inside)
