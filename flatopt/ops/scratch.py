"""Memory to work in."""

import math

import torch
from torch import Tensor


class Scratch:
    """Tensors without values; the same name, dtype and device gives the same memory again.

    On a CPU memory fresh from the system is paid for page by page, which costs several times the arithmetic done in it.
    ``capacity``: the size in elements that each is made with at least, so that the largest needs no other memory.
    """

    def __init__(self, capacity: int = 0):
        self.capacity = capacity
        self.memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        view = self.views.get((name, shape, dtype, device))
        if view is None:
            size, memory = math.prod(shape), self.memory.get((name, dtype, device))
            if memory is None or len(memory) < size:
                memory = torch.empty(max(size, self.capacity), dtype=dtype, device=device)
                self.memory[name, dtype, device] = memory
                self.views.clear()
            view = self.views[name, shape, dtype, device] = memory[:size].view(shape)
        return view
