r"""Gaussian noise that takes itself off: a map :math:`f` with :math:`f(f(w)) = w`, bit for bit.

Cut the number line into blocks of length :math:`a = |\varepsilon|` and let :math:`k = \lfloor w/a \rfloor`. Exchanging
each even block with the odd one above it, or, on the toss of a coin, with the one below, moves :math:`w` by exactly
:math:`\pm a` and is its own inverse:

.. math:: f_0(w) = \operatorname{round}\big(w + (-1)^k\,\varepsilon\big), \qquad
          f(w) = \begin{cases} f_0(w) & f_0(f_0(w)) = w \text{ (same bits)}\\ w & \text{otherwise} \end{cases}

The sign of :math:`\varepsilon` is the coin, so :math:`f(w) - w` is distributed as :math:`\varepsilon` for every
:math:`w`. Floating point breaks :math:`f_0(f_0(w)) = w` for a few elements only, if :math:`a` is a multiple of a grid
:math:`g = 2^j` near the spacing of the weights: those that would cross into a higher binade, half of the time, and
those much smaller than :math:`a`. They keep their value.

Where the noise is not large against :math:`g` (small :math:`\sigma` in bf16), rounding to the nearest multiple would
change its power. :math:`a = g\lfloor \rho|z| + \delta\rfloor` with :math:`\rho` = std/g and :math:`\delta(\rho)` chosen
such that :math:`\mathrm E\,\lfloor\rho|z|+\delta\rfloor^2 = \rho^2` keeps the mean square right.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import noise
from .scratch import Scratch

# log2(row rms / grid). bf16 and fp16: the spacing of the weights in the row's own binade. fp32 could go to 23; 16 loses
# nothing and leaves room for outliers and large sigma in the integer arithmetic.
GRID_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 16, torch.float64: 16}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
CHUNK = 1 << 18  # elements worked on at a time on a CPU: the temporaries stay in cache, and small


class Grid(NamedTuple):
    """Per row: ``rho`` = std/g, ``delta`` and ``step`` = g; float32, broadcastable to the weight's matrix."""

    rho: Tensor
    delta: Tensor
    step: Tensor


def grid_bits(sigma: float, dtype: torch.dtype) -> int:
    """log2(row rms / grid), about: one less than GRID_BITS where the noise is below the spacing of the weights.

    Few elements move then, by one step of the grid, and weights a binade up must be able to take it too. Without this a
    row of bf16 loses up to 15 % of its noise's std at sigma .001, with it 2 %.
    """
    bits = GRID_BITS[dtype]
    return bits - 1 if sigma * 2**bits < 1 else bits


@functools.cache
def _delta_table(device: torch.device) -> Tensor:
    """delta(rho) at rho = 2^-8 ... 2^6, 16 points an octave."""
    rho = torch.exp2(torch.arange(-8 * 16, 6 * 16 + 1, dtype=torch.float64) / 16)
    k = torch.arange(1, 400, dtype=torch.float64).unsqueeze(1)

    def mean_square(delta: Tensor) -> Tensor:  # sum over k of (2k-1) P(rho|z| + delta >= k)
        return ((2 * k - 1) * torch.erfc((k - delta) / (rho * math.sqrt(2)))).sum(0)

    low, high = -8 * rho, torch.ones_like(rho)
    for _ in range(60):
        middle = (low + high) / 2
        too_small = mean_square(middle) < rho.square()
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    return low.float().to(device)


def grid(std: Tensor, sigma: float, dtype: torch.dtype) -> Grid:
    """The grid for noise of standard deviation ``std`` = ``sigma`` x rms, on weights of type ``dtype``."""
    std = std.float()
    _, exponent = torch.frexp(std)
    step = torch.ldexp(torch.ones_like(std), exponent - 1 - (math.frexp(sigma)[1] - 1) - grid_bits(sigma, dtype))
    step = step.clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    rho = std / step
    table = _delta_table(std.device)
    at = (torch.log2(rho.clamp_min(2.0**-8)) * 16 + 8 * 16).clamp_max(len(table) - 1.001)
    left = at.floor().long()
    delta = torch.lerp(table[left], table[left + 1], at - left)
    # below the table fewer than 1 element in 60,000 would move, more rarely than z has resolution for: none does
    return Grid(rho, torch.where(rho < 2.0**-8, -math.inf, delta), step)


def _flip(w: Tensor, a: Tensor, signed: Tensor, q: Tensor, out: Tensor) -> Tensor:
    """f_0 before rounding: move ``w`` by ``signed`` = +-``a``, against its sign in odd blocks. Overwrites q and out."""
    block = out.view(signed.dtype)
    block.copy_(torch.div(w, a, out=q).floor_()).bitwise_left_shift_(torch.iinfo(block.dtype).bits - 1)
    block.bitwise_xor_(signed)  # the parity of the block goes to the sign bit
    return out.add_(w)


def chunks(rows: int, columns: int, device: torch.device) -> "Iterator[tuple[slice, slice]]":
    """Parts of a matrix to work on at a time."""
    size = CHUNK if device.type == "cpu" else CHUNK << 3  # elsewhere the number of launches counts
    tall, wide = max(1, size // max(columns, 1)), max(1, min(columns, size))
    for top in range(0, rows, tall):
        for left in range(0, columns, wide):
            yield slice(top, top + tall), slice(left, left + wide)


def _keep_reversible(clean: Tensor, moved: Tensor, back: Tensor, out: Tensor) -> None:
    """``moved`` where ``back`` is ``clean``, else ``clean``. Bits are compared: -0.0 and NaN must come back too."""
    clean, moved, back, out = (t.view(BITS[t.dtype]) for t in (clean, moved, back, out))
    # integer arithmetic, as torch's masks cost several times as much
    torch.bitwise_xor(moved.bitwise_xor_(clean).mul_(back.eq_(clean)), clean, out=out)


def toggle_(matrix: Tensor, grid: Grid, key: "tuple[int, int]", scratch: "Scratch | None" = None) -> None:
    """Apply f in place to a 2-D view of a weight. The second call with the same grid and key undoes the first."""
    rows, columns = matrix.shape
    dtype, device = matrix.dtype, matrix.device
    work = torch.promote_types(dtype, torch.float32)
    keys = noise.row_keys(key, rows, device)
    rho, delta, step = (t.expand(rows, 1) for t in grid)
    scratch = scratch or Scratch()

    def f_0(w: Tensor, name: str) -> Tensor:
        wide = w if work == dtype else scratch("wide", w.shape, work, device).copy_(w)
        moved = _flip(wide, a, signed, q, scratch(name, w.shape, work, device))
        return moved if work == dtype else scratch(name, w.shape, dtype, device).copy_(moved)

    # memory traffic is what this costs: nothing is copied or allocated in vain
    for here in chunks(rows, columns, device):
        clean, top = matrix[here], here[0]
        a, q = scratch("a", clean.shape, work, device), scratch("q", clean.shape, work, device)
        z = noise.normals((keys[0][top], keys[1][top]), here[1].start, clean.shape[1], scratch)
        length = torch.mul(z, rho[top], out=a if work == z.dtype else None)
        a.copy_(length.abs_().add_(delta[top]).floor_().clamp_min_(0.0).mul_(step[top]))
        sign = z.to(work).view(BITS[work]).bitwise_and_(torch.iinfo(BITS[work]).min)
        signed = sign.bitwise_or_(a.view(BITS[work]))  # copysign(a, z), which is slower
        moved = f_0(clean, "moved")
        _keep_reversible(clean, moved, f_0(moved, "back"), out=clean)


def _log2(x: Tensor) -> Tensor:
    """log2 from exactly rounded operations alone (see noise._tables for why); |error| < 2e-8 + rounding."""
    mantissa, exponent = torch.frexp(x)
    t = (mantissa - math.sqrt(0.5)) / (mantissa + math.sqrt(0.5))
    s = t * t
    return exponent - 0.5 + t * ((s / 7 + 0.2) * s + 1 / 3).mul_(s).add_(1).mul_(2 / math.log(2))


def toggle_elements_(matrix: Tensor, sigma: float, key: "tuple[int, int]") -> None:
    r"""The same in :math:`\log|w|`, for noise of std :math:`\sigma|w|`: blocks of ratio :math:`1+a`, ``w (1+a)^{+-1}``.

    As :math:`w/(1+a)` lies a little nearer to w than :math:`w(1+a)`, the mean is :math:`+\tfrac12\sigma^2 w`, not 0.
    """
    rows, columns = matrix.shape
    dtype = matrix.dtype
    work = torch.promote_types(dtype, torch.float32)
    rho, delta, step = grid(torch.tensor([[sigma]], device=matrix.device), sigma, dtype)
    keys = noise.row_keys(key, rows, matrix.device)

    def flip(w: Tensor, ratio: Tensor, down: Tensor) -> Tensor:
        odd = torch.div(_log2(w.abs()), _log2(ratio)).floor_().to(BITS[work]).bitwise_and_(1).bool()
        return torch.where(odd.logical_xor_(down), w / ratio, w * ratio).to(dtype)

    for here in chunks(rows, columns, matrix.device):
        clean = matrix[here].contiguous()
        w = clean.to(work)
        z = noise.normals((keys[0][here[0]], keys[1][here[0]]), here[1].start, w.shape[1])
        ratio = torch.mul(z, rho).abs_().add_(delta).floor_().clamp_min_(0.0).mul_(step).add_(1).to(work)
        moved = flip(w, ratio, z < 0)
        back = flip(moved.to(work), ratio, z < 0)
        _keep_reversible(clean, moved, back, out=matrix[here])
