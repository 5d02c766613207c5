"""Memory to work in."""

import math

import torch
from torch import Tensor


class Scratch:
    """Tensors without values; the same name, dtype and device gives the same memory again.

    On a CPU memory fresh from the system is paid for page by page, which costs several times the arithmetic done in it.
    """

    def __init__(self):
        self.memory = {}

    def __call__(self, name: str, shape: "tuple[int, ...]", dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        memory = self.memory.get((name, dtype, device))
        if memory is None or len(memory) < size:
            memory = self.memory[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(shape)
