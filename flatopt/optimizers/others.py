"""Optimizers that are not ours and step while our noise is in W: whether that is known to go wrong, and what to say."""

import sys
import weakref
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from ..perturbation.gradients import gradients_of

# steps of another between two of ours: more than a critic takes for one of the generator, while our gradients stand still;
# and more micro-batches than anybody accumulates
STILL, OFTEN = 20, 100


class Since(NamedTuple):
    """Our last step: how often another optimizer stepped, and our gradients when it last did."""

    times: int = 0
    gradients: "list[Any] | None" = None


class OtherOptimizers:
    def __init__(self, roots: "list[nn.Module]"):
        self._roots = roots
        self._of_other_models: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._since: weakref.WeakKeyDictionary[Optimizer, Since] = weakref.WeakKeyDictionary()

    def note_own_step(self) -> None:
        self._since.clear()

    def warning_of_step(self, other: Any, ours: Optimizer, inner: Optimizer) -> "str | None":
        """What is wrong with a step of ``other`` amid one of ``ours``, whose innermost optimizer is ``inner``; or None."""
        if not isinstance(other, Optimizer) or other in self._of_other_models:
            return None
        if inner in chain_of(other) or other in chain_of(ours) or _step_is_running(ours, inner):
            return None
        name = type(other).__name__
        mine, theirs = ({id(p) for group in o.param_groups for p in group["params"]} for o in (inner, other))
        if mine & theirs:
            return (
                f"{name} is stepped, which has parameters of the {type(inner).__name__} that FlatPerturbOptimizer wraps: "
                "that step is not seen, so the base weights stay perturbed by the same noise and the schedule stands still. "
                "Wrap the optimizer that is stepped, and detach() this one"
            )
        if other not in self._since and theirs.isdisjoint(id(p) for root in self._roots for p in root.parameters()):
            self._of_other_models.add(other)  # a discriminator's
            return None
        since = self._since.get(other, Since())
        gradients = gradients_of(p for group in inner.param_groups for p in group["params"])
        self._since[other] = Since(since.times + 1, gradients)
        if since.times + 1 < (STILL if gradients == since.gradients else OFTEN):
            return None
        return (
            f"{name} was stepped {since.times + 1} times at base weights that FlatPerturbOptimizer perturbed, each time at "
            "the same noise, as its own step() does not come. If it is done with, call its detach()"
        )


def chain_of(optimizer: Any) -> "list[Any]":
    """An optimizer and those it wraps, the outermost first."""
    chain: list[Any] = []
    while optimizer is not None and optimizer not in chain:
        chain.append(optimizer)
        held = getattr(optimizer, "__dict__", {})
        optimizer = held.get("optimizer", held.get("_base_optimizer"))
    return chain


def _step_is_running(*optimizers: Optimizer) -> bool:
    """Whether the step of one of these, with torch's hooks around it, is what called: then its parts step in it."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and any(frame.f_locals.get("self") is optimizer for optimizer in optimizers):
            return True
        frame = frame.f_back
    return False


_HOOKED_STEP = Optimizer.profile_hook_step(len).__code__
