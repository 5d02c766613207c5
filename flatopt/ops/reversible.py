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

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import constant
from .scratch import Scratch

# log2(row rms / grid). bf16 and fp16: the spacing of the weights in the row's own binade. fp32 could go to 23; 16 loses
# nothing and leaves room for outliers and large sigma in the integer arithmetic.
GRID_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 16, torch.float64: 16}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class Grid(NamedTuple):
    """Per row: ``rho`` = std/g, ``delta`` and ``step`` = g; float32, ``(rows, 1)`` or ``(1, 1)``."""

    rho: Tensor
    delta: Tensor
    step: Tensor

    def of(self, rows: slice) -> "Grid":
        """That of a part of the rows."""
        return self if len(self.rho) == 1 else Grid(self.rho[rows], self.delta[rows], self.step[rows])


def grid_bits(sigma: float, dtype: torch.dtype) -> int:
    """log2(row rms / grid), about: one less than GRID_BITS where the noise is below the spacing of the weights.

    Few elements move then, by one step of the grid, and weights a binade up must be able to take it too. Without this a
    row of bf16 loses up to 15 % of its noise's std at sigma .001, with it 2 %.
    """
    bits = GRID_BITS[dtype]
    return bits - 1 if sigma * 2**bits < 1 else bits


@constant
def delta_table(device: torch.device) -> Tensor:
    """delta(rho) at rho = 2^-8 ... 2^6, 16 points an octave."""
    rho = torch.exp2(torch.arange(-8 * 16, 6 * 16 + 1, dtype=torch.float64, device="cpu") / 16)
    k = torch.arange(1, 400, dtype=torch.float64, device="cpu").unsqueeze(1)

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
    exponent = exponent.sub_(1 + math.frexp(sigma)[1] - 1 + grid_bits(sigma, dtype)).float()
    step = torch.ldexp(torch.ones_like(std), exponent)
    step = step.clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    rho = std / step
    table = delta_table(std.device)
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


def _keep_reversible(clean: Tensor, moved: Tensor, back: Tensor) -> Tensor:
    """``moved`` where ``back`` is ``clean``, else ``clean``. Bits are compared: -0.0 and NaN must come back too."""
    dtype = moved.dtype
    clean, moved, back = (t.view(BITS[t.dtype]) for t in (clean, moved, back))
    # integer arithmetic, as torch's masks cost several times as much
    return moved.bitwise_xor_(clean).mul_(back.eq_(clean)).bitwise_xor_(clean).view(dtype)


def toggled(clean: Tensor, z: Tensor, grid: Grid, scratch: Scratch) -> Tensor:
    """f of a part of a weight, from its normals; with the same normals and grid the second f gives ``clean`` again.

    The result lies in ``scratch``; ``z`` is overwritten.
    """
    dtype, device, shape = clean.dtype, clean.device, clean.shape
    work = torch.promote_types(dtype, torch.float32)
    # memory traffic is what this costs: nothing is copied or allocated in vain
    a, q = scratch("a", shape, work, device), scratch("q", shape, work, device)

    def f_0(w: Tensor, name: str) -> Tensor:
        wide = w if work == dtype else scratch("wide", shape, work, device).copy_(w)
        moved = _flip(wide, a, signed, q, scratch(name, shape, work, device))
        return moved if work == dtype else scratch(name, shape, dtype, device).copy_(moved)

    length = torch.mul(z, grid.rho, out=a if work == z.dtype else None)
    a.copy_(length.abs_().add_(grid.delta).floor_().clamp_min_(0.0).mul_(grid.step))
    sign = z.to(work).view(BITS[work]).bitwise_and_(torch.iinfo(BITS[work]).min)
    signed = sign.bitwise_or_(a.view(BITS[work]))  # copysign(a, z), which is slower
    moved = f_0(clean, "moved")
    return _keep_reversible(clean, moved, f_0(moved, "back"))


def _log2(x: Tensor) -> Tensor:
    """log2 from exactly rounded operations alone (see noise._tables for why); |error| < 2e-8 + rounding."""
    mantissa, exponent = torch.frexp(x)
    t = (mantissa - math.sqrt(0.5)) / (mantissa + math.sqrt(0.5))
    s = t * t
    return exponent.float() - 0.5 + t * ((s / 7 + 0.2) * s + 1 / 3).mul_(s).add_(1).mul_(2 / math.log(2))


def toggled_elements(clean: Tensor, z: Tensor, grid: Grid) -> Tensor:
    r"""The same in :math:`\log|w|`, for noise of std :math:`\sigma|w|`: blocks of ratio :math:`1+a`, ``w (1+a)^{+-1}``.

    As :math:`w/(1+a)` lies a little nearer to w than :math:`w(1+a)`, the mean is :math:`+\tfrac12\sigma^2 w`, not 0.
    """
    dtype = clean.dtype
    work = torch.promote_types(dtype, torch.float32)
    w = clean.to(work)
    a = torch.mul(z, grid.rho).abs_().add_(grid.delta).floor_().clamp_min_(0.0).mul_(grid.step)
    ratio, down = a.add_(1).to(work), z < 0

    def flip(w: Tensor) -> Tensor:
        odd = torch.div(_log2(w.abs()), _log2(ratio)).floor_().to(BITS[work]).bitwise_and_(1).bool()
        return torch.where(odd.logical_xor_(down), w / ratio, w * ratio).to(dtype)

    moved = flip(w)
    return _keep_reversible(clean, moved, flip(moved.to(work)))
