"""A second forward and backward that repeats the first: the same dropout, and BatchNorm statistics that stay put."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle


def random_state(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Take down the random states of torch on CPU and ``devices``, numpy and Python; the result sets them back."""
    python, arrays, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    others = []
    for device in {d for d in devices if d.type not in ("cpu", "meta")}:
        backend, args = getattr(torch, device.type), () if device.type == "mps" else (device,)
        others.append((backend.set_rng_state, backend.get_rng_state(*args), args))

    def put_back() -> None:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.set_rng_state(cpu)
        for set_rng_state, state, args in others:
            set_rng_state(state, *args)

    return put_back


@contextmanager
def running_statistics_kept() -> Iterator[None]:
    """Inside, BatchNorm and its kin normalise as ever; afterwards their running statistics are what they were.

    Works for any module that is called, without being told which: the optimizer knows parameters, not the model.
    """
    kept: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    handles: dict[str, RemovableHandle] = {}

    def listen(*_: object) -> None:
        for handle in handles.values():
            handle.remove()
        handles["before"] = register_module_forward_pre_hook(take_down)

    @torch.compiler.disable
    def take_down(root: nn.Module, args: object) -> None:
        # only for the outermost call: a global hook seen while torch.compile traces the rest would break its graph
        handles["before"].remove()
        handles["after"] = root.register_forward_hook(listen, always_call=True)
        for module in root.modules():
            if isinstance(module, _NormBase) and module.training and module not in kept:
                kept[module] = [(b, b.clone()) for b in module.buffers(recurse=False)]

    listen()
    try:
        yield
    finally:
        for handle in handles.values():
            handle.remove()
        with torch.no_grad():
            for buffers in kept.values():
                for buffer, before in buffers:
                    buffer.copy_(before)
