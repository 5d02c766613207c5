"""Methods that read or write base weights directly, PEFT's ``merge`` among them: W is made clean before they run."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.weight import AdaptedWeight
from .base import joined
from .custom import MERGING
from .registry import adapter_of

Before = Callable[[nn.Module], None]
WRITING = {*MERGING, "train", "inject_adapter"}  # through .data, which moves no version counter

_lock = threading.RLock()
_users: dict[tuple[type, str], list[list[Before]]] = {}  # (class, method) -> what runs before it, boxed: one a guard()
_wrappers: dict[tuple[type, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}  # -> (wrapper, what it wraps)


def guard(methods: Iterable[tuple[type, str]], before: Before) -> Callable[[], None]:
    """Run ``before(module)`` before each of ``methods``, ``(class, name)``, of any instance and subclass.

    The classes are patched as long as at least one guard is on them. Returns what takes this guard off again; to call it
    twice does no harm. ``before`` is held until then: it must hold nothing that should be deleted earlier.

    ``before`` does not run where an adapted layer calls the method in its own forward (PEFT's nn.MultiheadAttention merges
    there), nor for a ``train()`` that leaves the layer's update as it is, inside W or outside.
    """
    box = [before]
    with _lock:
        keys = list(dict.fromkeys((_definer(cls, name), name) for cls, name in methods))
        for key in keys:
            # in one go: a finalizer may call another guard's release() at any allocation
            _users[key] = [*_users.get(key, ()), box]
            _install(key)

    def release() -> None:
        with _lock:
            box.clear()
            for key in keys:
                if key in _users:
                    _users[key] = [user for user in _users[key] if user]
                    if not _users[key]:
                        _remove(key)
            keys.clear()

    return release


def _definer(cls: type, name: str) -> type:
    return next(owner for owner in cls.__mro__ if name in owner.__dict__)


def _install(key: tuple[type, str]) -> None:
    cls, name = key
    current = cls.__dict__[name]
    known = _wrappers.get(key)
    if known is not None and known[0] in _wrapped_by(current):
        return
    wrapper = _guarded(key, current)
    _wrappers[key] = wrapper, current
    setattr(cls, name, wrapper)


def _remove(key: tuple[type, str]) -> None:
    cls, name = key
    del _users[key]
    wrapper, original = _wrappers[key]
    # where others wrapped it since, it stays underneath, passing calls on, and is used again by the next guard
    if cls.__dict__.get(name) is wrapper:
        setattr(cls, name, original)
        del _wrappers[key]


def _wrapped_by(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _guarded(key: tuple[type, str], method: Callable[..., Any]) -> Callable[..., Any]:
    name = key[1]

    @functools.wraps(method)
    def guarded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        users = [before for box in _users.get(key, ()) for before in box]
        if not users or (name == "train" and _changes_nothing(self, *args, **kwargs)):
            return method(self, *args, **kwargs)
        if not (name in MERGING and _in_own_forward(self)):
            for before in users:
                before(self)
        if name not in WRITING:
            return method(self, *args, **kwargs)
        weights = _base_weights(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            for weight in {id(w): w for w in (*weights, *_base_weights(self))}.values():
                if not weight.is_inference():
                    torch.autograd.graph.increment_version(weight)

    return guarded


def _changes_nothing(layer: nn.Module, mode: bool = True) -> bool:
    """Whether a ``train(mode)`` that merges for evaluation leaves the update where it is: loops call train() every batch."""
    adapter = adapter_of(layer)
    return adapter is not None and mode != adapter.is_merged(layer)


def _in_own_forward(layer: nn.Module) -> bool:
    """Whether the forward of ``layer``, or of an adapted layer around it, is what called."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(caller, nn.Module) and adapter_of(caller) and layer in _modules(caller).values():
            return True
        frame = frame.f_back
    return False


def _base_weights(module: nn.Module) -> list[Tensor]:
    found: list[AdaptedWeight] = []
    for path, layer in _modules(module).items():
        adapter = adapter_of(layer)
        with contextlib.suppress(ValueError):  # a layer that is refused, and so has no noise
            found += adapter.weights(layer, path) if adapter else []
    made_anew = {
        (weight.owner, weight.name) for weight in found if weight.rebuilt
    }  # merged in each forward: a graph has them
    return [weight.parameter for weight in found if (weight.owner, weight.name) not in made_anew]


def _modules(module: nn.Module, path: str = "") -> "dict[str, nn.Module]":
    """``named_modules()`` without running anybody's own: PEFT's nn.MultiheadAttention has one that cuts its graph."""
    found = {path: module}
    for name, child in module._modules.items():
        if child is not None:
            found.update(_modules(child, joined(path, name)))
    return found
