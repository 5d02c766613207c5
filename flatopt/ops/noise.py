r"""Keyed Gaussian noise: the same (key, row, column) gives the same number, on every device and in any chunking.

Two neighbouring columns share one 32-bit hash; Box-Muller makes its halves into their two normals:

.. math:: z_{2p} = \sqrt{-2\ln u}\,\cos 2\pi v, \qquad z_{2p+1} = \sqrt{-2\ln u}\,\sin 2\pi v

with :math:`u, v` the upper and lower 16 bits as midpoints of :math:`2^{16}` cells, so :math:`|z| \le 4.86`. No global
random state is read or written. :mod:`flatopt.ops.triton.kernels` computes the same numbers on the GPU.
"""

import hashlib
import math

import torch
from torch import Tensor

from .constants import constant
from .scratch import Scratch

Key = tuple[int, int]

# A 32-bit integer hash with low bias: xor-shift, multiply, xor-shift, multiply, xor-shift (constants: Wellons'
# hash-prospector). GOLDEN spreads consecutive counters over the whole range.
MUL1, MUL2, GOLDEN = 0x21F0AAAD, 0x735A2D97, 0x9E3779B9
MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    """The hash on a Python integer."""
    x &= MASK
    x = ((x ^ (x >> 16)) * MUL1) & MASK
    x = ((x ^ (x >> 15)) * MUL2) & MASK
    return x ^ (x >> 15)


def step_key(seed: int, step: int, rank: int, draw: int = 0) -> Key:
    """64 bits that name one draw of noise of a step on one rank; the weights' keys follow from it."""
    name = f"flatopt {seed} {step} {rank} {draw}" if draw else f"flatopt {seed} {step} {rank}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def sub_key(key: Key, index: int) -> Key:
    """The key of number ``index`` (a weight of a step, a row of a weight)."""
    first = mix(index * GOLDEN + key[0])
    return first, mix(first ^ key[1])


def weight_key(key: Key, index: int) -> Key:
    """The key of one weight's noise: of the step and the weight's number."""
    return sub_key(key, index)


def signed(x: int) -> int:
    """32 bits as the int32 that has them."""
    return x - (1 << 32) if x >= 1 << 31 else x


@constant
def _int32(number: int) -> Tensor:
    # an operand that is a tensor already saves torch half of what a small operation takes
    return torch.tensor(signed(number), dtype=torch.int32, device="cpu")


def _xor_shift_(x: Tensor, bits: int, shifted: Tensor) -> Tensor:
    # torch shifts int32 arithmetically: mask the copies of the sign bit away
    torch.bitwise_right_shift(x, _int32(bits), out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_(_int32((1 << (32 - bits)) - 1)))


def _mix_(x: Tensor) -> Tensor:
    shifted = torch.empty_like(x)
    _xor_shift_(x, 16, shifted).mul_(_int32(MUL1))
    _xor_shift_(x, 15, shifted).mul_(_int32(MUL2))
    return _xor_shift_(x, 15, shifted)


def row_keys(key: Key, rows: int, device: torch.device, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """:func:`sub_key` of every row at once, from number ``first_row`` on: two int32 tensors of shape ``(rows, 1)``."""
    index = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=device).unsqueeze(1)
    first = _mix_(index.mul_(_int32(GOLDEN)).add_(signed(key[0])))
    return first, _mix_(first.bitwise_xor(signed(key[1])))


@constant
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    # Looked up rather than computed: a vectorised and a scalar log may differ in the last bit, and which of the two an
    # element meets depends on chunk and thread counts. The noise must not.
    cell = (torch.arange(1 << 16, dtype=torch.float64, device="cpu") + 0.5) / (1 << 16)
    radius, direction = torch.sqrt(-2 * torch.log(cell)), torch.polar(torch.ones_like(cell), 2 * math.pi * cell)
    return radius.float().to(device), direction.to(torch.complex64).to(device)


def normals_of_rows(keys: tuple[Tensor, Tensor], first_column: int, columns: int, scratch: Scratch | None = None) -> Tensor:
    """Standard normals, float32 ``(rows, columns)``, for :func:`row_keys` ``keys``; ``first_column`` must be even.

    They lie in ``scratch``, if one is given, and are valid until its next use.
    """
    first, second = keys
    device = first.device
    scratch = scratch or Scratch()
    pair = torch.arange(first_column // 2, (first_column + columns + 1) // 2, dtype=torch.int32, device=device)
    shape = len(first), len(pair)
    bits, shifted = scratch("bits", shape, torch.int32, device), scratch("shifted", shape, torch.int32, device)
    torch.add(pair.mul_(_int32(GOLDEN)), first, out=bits)
    # the row's second word enters between the rounds: two rows are then never the same sequence shifted
    _xor_shift_(bits, 16, shifted).mul_(_int32(MUL1)).add_(second)
    _xor_shift_(bits, 15, shifted).mul_(_int32(MUL2))
    _xor_shift_(bits, 15, shifted)

    high = torch.bitwise_right_shift(bits, _int32(16), out=shifted).bitwise_and_(_int32(0xFFFF)).view(-1)
    low = bits.bitwise_and_(_int32(0xFFFF)).view(-1)
    radius, direction = _tables(device)
    z = torch.index_select(direction, 0, low, out=scratch("z", low.shape, torch.complex64, device))
    z.mul_(torch.index_select(radius, 0, high, out=scratch("radius", high.shape, torch.float32, device)))
    return torch.view_as_real(z).view(shape[0], 2 * shape[1])[:, :columns]


def normals(key: Key, rows: int, columns: int, device: "torch.device | str" = "cpu") -> Tensor:
    """Standard normals that follow from ``key`` alone: float32, ``(rows, columns)``."""
    return normals_of_rows(row_keys(key, rows, torch.device(device)), 0, columns)
