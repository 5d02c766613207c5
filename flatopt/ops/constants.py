"""Tensors computed once for a process: they must not depend on what was under way when they were first needed."""

import functools
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

Made = TypeVar("Made")


def constant(make: Callable[..., Made]) -> Callable[..., Made]:
    """``make(*arguments)``, computed once: outside of FakeTensorMode, other dispatch modes and inference mode.

    ``make`` must give every dtype and device itself, as defaults may be set to others when it is called.
    """

    @functools.cache
    def made(*arguments: object) -> Made:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            return make(*arguments)

    return made


def _autocast_kinds() -> "list[str]":
    known = []
    for kind in ("cpu", "cuda", "xpu", "mps"):
        with suppress(RuntimeError):  # torch 2.4 knows no mps
            torch.is_autocast_enabled(kind)
            known.append(kind)
    return known


_AUTOCAST_KINDS = _autocast_kinds()


# modes without real weights, or that keep a forward's operations: to hand their results out again, or to write them down
_RECORDERS = {
    *("torch.utils.checkpoint", "torch.fx.experimental.proxy_tensor"),
    *("torch._subclasses.functional_tensor", "torch._subclasses.fake_tensor"),
}


class writing:  # a class, as a generator's context manager takes twice as long, twice a step
    """What is done inside is done to the real weights: no fake tensors, no graph, version counters that move, nothing that
    a selective checkpoint, make_fx or torch.export keeps, and products in the types of their factors: ε may not depend on
    whose autocast region a forward runs in."""

    def __enter__(self) -> None:
        self._stack: ExitStack | None = None
        self._gradients = torch.is_grad_enabled()
        modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
        recorded = any(cls.__module__ in _RECORDERS for mode in modes for cls in type(mode).__mro__)
        if recorded or torch.is_inference_mode_enabled():
            self._stack = ExitStack()
            if recorded:
                self._stack.enter_context(_disable_current_modes())
            # in inference mode a write would not move the version counter; leaving that mode turns gradients on
            self._stack.enter_context(torch.inference_mode(False))
        torch._C._set_grad_enabled(False)  # no_grad by its one effect: that object takes as long as a launch
        self._autocast: list[str] = []
        if torch._C._is_any_autocast_enabled():
            self._autocast = [kind for kind in _AUTOCAST_KINDS if torch.is_autocast_enabled(kind)]
            for kind in self._autocast:
                torch.set_autocast_enabled(kind, False)

    def __exit__(self, *exception: Any) -> None:
        torch._C._set_grad_enabled(self._gradients)
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, True)
        if self._stack is not None:
            self._stack.__exit__(*exception)
