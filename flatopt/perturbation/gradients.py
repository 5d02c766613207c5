"""Gradients that came by a backward no hook saw: the loss was not made from what a forward returned."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..core.sharding import is_sharded, local

FEW = 4  # parameters asked: a backward reaches all that train, and these are asked at each forward


def gradients_of(parameters: "Iterable[Tensor]") -> "list[Any]":
    """What tells whether a backward reached ``parameters`` since; of a few, and no reference to what they hold."""
    grads = (p.grad for p in islice(parameters, FEW))
    return [None if grad is None else (id(grad), grad._version) for grad in grads]


def came_since(before: "list[Any]", parameters: "Iterable[Tensor]") -> bool:
    """Whether a backward reached ``parameters`` after :func:`gradients_of` gave ``before``."""
    few = list(islice(parameters, FEW))
    moved = [p.grad for p, now, then in zip(few, gradients_of(few), before) if p.grad is not None and now != then]
    return any(map(_is_one, moved))


def wanted(parameters: "Iterable[Tensor]") -> bool:
    """Whether the backward under way makes a gradient of any of ``parameters``; one of a model's inputs alone does not."""
    for parameter in parameters:
        if is_sharded(parameter) or not parameter.is_leaf:
            return True  # what FSDP2 has gathered takes its place in the graph
        if not parameter.requires_grad:
            continue
        with torch.enable_grad():
            view: Any = parameter.view_as(parameter)
        try:
            if torch._C._will_engine_execute_node(view.grad_fn.next_functions[0][0]):
                return True
        except RuntimeError:  # it cannot be asked about what torch.autograd.grad(loss, parameters) is given
            return True
    return False


def _is_one(grad: Tensor) -> bool:
    """zero_grad(set_to_none=False) writes to gradients, too."""
    return grad.layout is not torch.strided or bool(local(grad).any())
