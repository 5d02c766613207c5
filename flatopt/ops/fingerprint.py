"""Proof of what stands in memory: a checksum of a tensor's bits that sees every changed element, and where it stood.

The bits are read as words of 64 bits, word number ``i`` is added up in lane ``i % LANES``, and the lanes are added up with
odd factors of their own, modulo 2^64. A single changed word always shows.
"""

import torch
from torch import Tensor

from .constants import constant
from .reversible import BITS

LANES = 1021  # prime, so that neither a shifted row nor an exchanged one falls into the same lanes; 63 vectors of 16, and 13
FEW = 4096  # words that have a lane each: for so few, calls cost more than arithmetic


@constant
def _factors(device: torch.device) -> Tensor:
    index = torch.arange(FEW, dtype=torch.int64, device="cpu")
    return (index * 0x9E3779B97F4A7C15 - (1 << 63)).bitwise_or_(1).to(device)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.view(-1)
    whole = flat.numel() * flat.element_size() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return flat.view(torch.int64) if whole else flat.view(BITS[flat.dtype]).long()


def checksum(tensor: Tensor) -> Tensor:
    """Of a contiguous floating-point tensor's bits: int64, 0-dimensional, on its device."""
    words = _words(tensor)
    size = len(words)
    if size > FEW:
        tall = size // LANES
        # the last few are added with some of those that the lanes have already
        words = words[: tall * LANES].view(tall, LANES).sum(0).add_(words[size - LANES :], alpha=3)
    factors = _factors(tensor.device)[: len(words)]
    # CUDA has no dot product of integers
    return torch.dot(words, factors) if words.device.type == "cpu" else (words * factors).sum()


def fingerprint(tensor: Tensor) -> int:
    """The same as a number, of any floating-point tensor; waits for the tensor's device."""
    return int(checksum(tensor.detach().contiguous()).item())


class Flags:
    """One mark for each of ``size`` weights, set on ``device`` and read by the host without making it wait.

    ``set``: where they are set. With ``on_host`` that is memory of the host that kernels can write to, which spares a copy
    at each step; torch's own operations cannot.
    """

    def __init__(self, size: int, device: torch.device, on_host: bool = False):
        self._device, waits = device, device.type == "cuda"
        self._read = torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=waits)
        self.set = self._read if on_host or not waits else torch.zeros(size, dtype=torch.int32, device=device)
        self._sent: torch.cuda.Event | None = torch.cuda.Event() if waits else None
        self._under_way = False

    def send(self) -> None:
        """After all that sets marks was queued."""
        if self.set is not self._read:
            self._read.copy_(self.set, non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._device))
        self._under_way = True

    def read(self, wait: bool = False) -> list[int]:
        """The numbers of the weights marked, which are then no longer; none as long as what sets them is under way."""
        if not self._under_way:
            return []
        if self._sent is not None and not self._sent.query():
            if not wait:
                return []
            self._sent.synchronize()
        self._under_way = False
        marks = self._read.tolist()
        if not any(marks):
            return []
        marked = [number for number, mark in enumerate(marks) if mark]
        self.set[marked] = 0  # these alone: another may be set right now
        return marked
