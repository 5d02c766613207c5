r"""Eq. 7 and the reversible map once more, written to be read: what the library is held to in the tests.

Plain tensors of W's size, one line an idea, nothing cached, in chunks or in place. The backends must give the same standard
deviations and, from the same normals, the same bits.
"""

import math

import torch
from torch import Tensor

from .reversible import BITS, grid_bits


def standard_deviation(weight: Tensor, update: Tensor, sigma: float) -> Tensor:
    r"""Eq. 7: :math:`\sigma\,\lVert w'_i\rVert/\sqrt n` of each row of :math:`W' = W + sBA`; ``(m, n)`` to ``(m, 1)``."""
    merged = weight.double() + update.double()
    return sigma * merged.square().mean(dim=1, keepdim=True).sqrt()


def grid_step(std: Tensor, sigma: float, dtype: torch.dtype) -> Tensor:
    """The power of two that moves are multiples of: 2^-grid_bits in the binade of the row's rms = std/sigma, about."""
    exponent = torch.floor(torch.log2(std.double())) - math.floor(math.log2(sigma)) - grid_bits(sigma, dtype)
    return torch.exp2(exponent).clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def mean_square(rho: float, delta: float) -> float:
    r""":math:`\mathrm E\lfloor\rho|z|+\delta\rfloor_+^2`, as :math:`\sum_k (2k-1)\,P(\rho|z|+\delta\ge k)`."""
    return sum((2 * k - 1) * math.erfc((k - delta) / (rho * math.sqrt(2))) for k in range(1, int(8 * rho) + 10))


def rounding_offset(rho: float) -> float:
    r"""The :math:`\delta` with which rounding to whole steps keeps the noise's power: mean square :math:`\rho^2`."""
    low, high = -8 * rho, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_square(rho, middle) < rho * rho else (low, middle)
    return low


def move(weight: Tensor, length: Tensor, z: Tensor) -> Tensor:
    """f_0: the block of length |ε| a weight lies in is exchanged with its neighbour, above or below by the sign of z."""
    block = torch.floor(weight.to(length.dtype) / length)
    epsilon = torch.where(torch.signbit(z), -length, length)
    return (weight.to(length.dtype) + torch.where(block % 2 == 1, -epsilon, epsilon)).to(weight.dtype)


def toggled(weight: Tensor, rho: Tensor, delta: Tensor, step: Tensor, z: Tensor) -> Tensor:
    """f(W): f_0 where a second f_0 gives the old bits back, W elsewhere. ``f(f(W))`` is W, so this also restores.

    ``weight`` and the normals ``z`` are ``(m, n)``; ``rho`` = std/step, ``delta`` = :func:`rounding_offset` of it and
    ``step`` = :func:`grid_step` are ``(m, 1)``, float32.
    """
    length = (step * torch.floor(rho * z.abs() + delta).clamp_min(0)).to(torch.promote_types(weight.dtype, torch.float32))
    there = move(weight, length, z)
    back = move(there, length, z)
    bits = BITS[weight.dtype]
    return torch.where(back.view(bits) == weight.view(bits), there, weight)
