"""Memory to work in."""

import math

import torch
from torch import Tensor


class Scratch:
    """Tensors without values; the same name, dtype and device gives the same memory again.

    On a CPU memory fresh from the system is paid for page by page, which costs several times the arithmetic done in it.
    """

    def __init__(self):
        self.memory, self.views = {}, {}

    def __call__(self, name: str, shape: "tuple[int, ...]", dtype: torch.dtype, device: torch.device) -> Tensor:
        view = self.views.get((name, shape, dtype, device))
        if view is None:
            size, memory = math.prod(shape), self.memory.get((name, dtype, device))
            if memory is None or len(memory) < size:
                memory = self.memory[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
                self.views.clear()
            view = self.views[name, shape, dtype, device] = memory[:size].view(shape)
        return view
