"""Tensors inside of what a forward takes or returns, and where they lie."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

# numbers and text, for speed, and what holds more than an output
_CLOSED = (int, float, str, bytes, type(None), type, FunctionType, MethodType, ModuleType, nn.Module, Optimizer)


def storage_of(tensor: Tensor) -> int:
    """The address of what ``tensor`` is a view of; 0 where that says nothing."""
    if type(tensor).__name__ == "FakeTensor":
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (AttributeError, RuntimeError, NotImplementedError, ValueError):  # the last where a lazy module has not run yet
        return 0


def before_its_backward(output: Any, call: Callable[[Tensor], None], inputs: "Sequence[Tensor]" = ()) -> None:
    """``call`` when a backward comes to ``output``, but for what was among the ``inputs``, whose graph is another's."""
    given = set(map(id, inputs))
    for tensor in tensors_in(output):
        if tensor.requires_grad and not tensor.is_leaf and id(tensor) not in given:
            tensor.register_hook(call)


def all_tensors_in(things: Any) -> "list[Tensor]":
    return list(tensors_in(things))


def tensors_in(output: Any, depth: int = 8, seen: "set[int] | None" = None) -> "Iterable[Tensor]":
    """Those in dicts, lists, dataclasses and whatever else holds them as attributes; no property of theirs is asked.

    ``depth``: of things that hold one another.
    """
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, _CLOSED):
        return
    parts: Iterable[Any] = ()
    if isinstance(output, dict):
        parts = output.values()
    elif isinstance(output, (list, tuple)):
        parts = output
    else:
        seen = set() if seen is None else seen
        if id(output) in seen or type(output).__module__ == "transformers.cache_utils":
            return  # the latter: two tensors a layer, at which no backward starts
        seen.add(id(output))
        parts = _attributes(output)
    for part in parts if depth else ():
        yield from tensors_in(part, depth - 1, seen)


def _attributes(thing: Any) -> "list[Any]":
    try:
        found = list(object.__getattribute__(thing, "__dict__").values())
    except AttributeError:
        found = []
    for cls in type(thing).__mro__[:-1]:
        for slot in cls.__dict__.values():
            if type(slot) is MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # nothing in it
                    found.append(slot.__get__(thing))
    return found
