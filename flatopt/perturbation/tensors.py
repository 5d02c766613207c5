"""Tensors inside of what a forward takes or returns, and where they lie."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    """The address of what ``tensor`` is a view of; 0 where that says nothing."""
    if type(tensor).__name__ == "FakeTensor":
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (AttributeError, RuntimeError, NotImplementedError, ValueError):  # the last where a lazy module has not run yet
        return 0


def before_its_backward(output: Any, call: Callable[[Tensor], None]) -> None:
    for tensor in tensors_in(output):
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(call)


def tensors_in(output: Any, depth: int = 8) -> "Iterable[Tensor]":
    """Those in dicts, lists and the fields of dataclasses; ``depth``: of things that hold one another."""
    if isinstance(output, Tensor):
        yield output
        return
    parts: Iterable[Any] = ()
    if isinstance(output, dict):
        parts = output.values()
    elif isinstance(output, (list, tuple)):
        parts = output
    elif hasattr(output, "__dataclass_fields__"):
        parts = [getattr(output, name, None) for name in output.__dataclass_fields__]
    for part in parts if depth else ():
        yield from tensors_in(part, depth - 1)
