"""Hooks on the model: a training forward finds W perturbed, whoever else reads it finds it clean.

Two kinds of door. A *root* is a module given as target: its forward decides for all that runs inside it. An *owner* holds a
base weight: it is asked about when it is reached by another way (``generate``, ``get_base_model()``, a submodule, a method).
Nothing here depends on a hook after a forward having run: an interrupt skips those.
"""

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..adapters.registry import adapter_of
from ..core.sharding import is_fsdp_module
from ..core.weight import AdaptedWeight
from .doors import Doors
from .noisy_layers import installed
from .stack import (
    calls_itself,
    enclosing_forward,
    in_autograd_function,
    in_backward,
    in_training_module,
    is_exporting,
    pickled_for_a_process,
    untraced,
)
from .weights import CLEAN, PERTURBED


class Hook:
    """A hook of :class:`Doors`. Copies of the model get a deaf one, as they are not being trained; pickles load without
    flatopt."""

    def __init__(self, doors: Doors):
        self.doors: Doors | None = doors

    def __call__(self, *args: Any) -> None:
        raise NotImplementedError

    @property
    def __name__(self) -> str:
        raise AttributeError(
            "this module has hooks of a FlatPerturbOptimizer, which torch.jit.script cannot compile. Call detach() on the "
            "optimizer before the module is scripted, or before the copy of it is made that is scripted"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        doors, copy = self.doors, type(self).__new__(type(self))
        copy.doors = None
        weights = doors.weights if doors is not None else None
        if doors is not None:
            doors.look_again()  # the copy may share the weights, as a reference model's does
        if doors is not None and weights is not None and weights.state == PERTURBED and not weights.held:
            parameters = doors.parameters()
            weights.suspend()
            with torch.no_grad():
                for _, parameter in parameters:  # the copier may have passed W before it came here
                    if id(parameter) in memo:
                        memo[id(parameter)].copy_(parameter)
        return copy

    def __reduce__(self) -> Any:
        corrections = []
        doors = self.doors
        weights = doors.weights if doors is not None else None
        if doors is not None and pickled_for_a_process():
            doors.tell_of_sharing()
        elif doors is not None and weights is not None and weights.state == PERTURBED and not weights.held:
            weights.suspend()
            # the pickler may have written W before it came here: what it writes now puts W right when it is loaded
            corrections = [_Correction(p) for module, p in doors.parameters() if self._sits_on(module)]
        return getattr, (contextlib.nullcontext(), "__exit__", corrections)

    def _sits_on(self, module: nn.Module) -> bool:
        return any(hook is self for hook in module._forward_pre_hooks.values())


class _Correction:
    def __init__(self, parameter: Tensor):
        self.parameter = parameter

    def __reduce__(self) -> Any:
        return torch.Tensor.copy_, (self.parameter, self.parameter.detach().clone())


def exported(doors: Doors) -> bool:
    """Whether ``torch.export`` runs this forward: it opens no step, and finds W clean, which it keeps."""
    if not is_exporting():
        return False
    weights = doors.weights
    if weights is not None and weights.noisy and not weights.held:
        if torch.compiler.is_dynamo_compiling():  # strict=True: what stands here is traced, it does not run
            raise RuntimeError("torch.export of weights that are perturbed: call optimizer.restore() before it")
        with torch._C.DisableTorchFunction():  # it notes also where gradients are switched on and off
            weights.suspend()
    return True


class BeforeRoot(Hook):
    @untraced
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        doors = self.doors
        if doors is None or doors.weights is None or exported(doors) or torch.compiler.is_compiling():
            return
        trains = torch.is_grad_enabled() and (module.training or in_training_module())
        if is_fsdp_module(module):
            self._come_first(module)
        if getattr(module, "_is_replica", False):
            if trains and doors.weights.state != PERTURBED:
                raise RuntimeError(
                    "torch.nn.DataParallel copied the weights to its GPUs before they could be perturbed. Train with "
                    "DistributedDataParallel (torchrun, accelerate launch), on one GPU (CUDA_VISIBLE_DEVICES=0), or pass "
                    "the DataParallel module itself as targets"
                )
            return
        if in_backward():
            reads = doors.in_backward(module)
            doors.reader = module if reads else None  # also one that an interrupt left
            if reads:
                doors.weights.suspend()
            return
        calls = doors.calls
        if module in calls.inside and calls_itself(module):
            calls.around.append((module, calls.trains.get(module, trains)))
        calls.trains[module] = trains
        calls.inside.add(module)
        doors.within = True
        if trains:
            doors.trained = True
            if doors.weights.noisy:
                doors.unseen_steps.look()
            if not doors.ran_clean.get(module, True):
                del doors.ran_clean[module]  # a reference that is over: what is run again in backward is this forward
            if doors.weights.state == CLEAN and doors.first_pass.read:
                doors.first_pass.refuse_second(module, (args, kwargs))
        elif module.training and not doors.weights.held:
            by_function = in_autograd_function()
            if by_function or module not in doors.opened:
                doors.ran_clean[module] = by_function or doors.ran_clean.get(module, False)
            if doors.weights.state == CLEAN:
                doors.first_pass.note((args, kwargs))
        doors.settle(module, trains)
        if trains:
            doors.opened.add(module)

    def _come_first(self, module: nn.Module) -> None:
        """From the next call on before FSDP2's own hook, where that came later: it then gathers what it needs once."""
        hooks = module._forward_pre_hooks
        first = next(iter(hooks.values()))
        if not isinstance(first, Hook):
            hooks.move_to_end(next(n for n, hook in hooks.items() if hook is self), last=False)  # type: ignore[attr-defined]


class AfterRoot(Hook):
    @untraced
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        doors = self.doors
        if doors is None or doors.weights is None or torch.compiler.is_compiling():
            return
        calls = doors.calls
        trains = calls.trains.get(module)
        if in_backward():
            if doors.reader is module:
                doors.reader = None
                doors.read_in_backward(output)
            return
        if calls.around and calls.around[-1][0] is module and calls_itself(module):
            calls.trains[module] = calls.around.pop()[1]
            return
        calls.inside.discard(module)
        doors.within = bool(calls.inside)
        if trains and doors.weights.state == PERTURBED:
            doors.resume_in_backward(output, (args, kwargs))
        elif trains is False and torch.is_grad_enabled():
            doors.refuse_in_backward(output)


class BeforeOwner(Hook):
    """Also on a layer around an owner, whose mode then counts: both must give one answer."""

    def __init__(self, doors: Doors, owner: "nn.Module | None" = None):
        super().__init__(doors)
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any) -> None:
        doors = self.doors
        if doors is None or doors.weights is None or exported(doors):
            return
        trains = torch.is_grad_enabled() and (module if self.owner is None else self.owner).training
        if torch.compiler.is_compiling():
            # code is kept for each answer; only where no root around it has made W what it should be does the graph break
            follows_root = doors.within and not trains and torch.is_grad_enabled()
            if trains is not doors.weights.noisy and not follows_root and not doors.weights.held:
                _decide(self, module, doors)
            return
        if trains is doors.weights.noisy and (doors.within or not trains) and not doors.weights.partly:
            return
        self.decide(module, doors)

    def decide(self, module: nn.Module, doors: Doors, compiled: bool = False) -> None:
        weights = doors.weights
        if weights is None or getattr(module, "_is_replica", False):
            return
        if weights.held and weights.noisy and not weights.partly:
            return
        if in_backward():
            if doors.in_backward(module) and not compiled:
                doors.read_this_once(module)
            return
        trains = (module if self.owner is None else self.owner).training and torch.is_grad_enabled()
        around = enclosing_forward(doors.calls.trains)
        new = installed(module) is None
        doors.settle(module, trains if around is None else around, within=around is not None)
        if new and installed(module) is not None:
            _answer_anew(module)
        doors.trained = doors.trained or weights.noisy
        if trains and around is None and not compiled:
            # every such owner's output is listened to, as backward starts at the last one
            handles: list[Any] = []

            def after(module: nn.Module, args: Any, output: Any) -> None:
                handles.pop().remove()
                doors.resume_in_backward(output, args)

            handles.append(module.register_forward_hook(after))


def _answer_anew(module: nn.Module) -> None:
    """For a layer given its noisy forward amid a call, when torch had looked up its own: its output is made again."""

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        handle.remove()
        return module.forward(*args, **kwargs)

    handle = module.register_forward_hook(after, prepend=True, with_kwargs=True)


@torch.compiler.disable
def _decide(hook: BeforeOwner, module: nn.Module, doors: Doors) -> None:
    hook.decide(module, doors, compiled=True)


class CleanFirst(Hook):
    """For who reads or writes W by its state dict."""

    @torch.compiler.disable
    def __call__(self, *args: Any) -> None:
        if self.doors is not None and self.doors.weights is not None and not self.doors.weights.held:
            self.doors.weights.suspend()


class ProcessWide:
    """A hook on all modules of the process. The collector may end an optimizer while torch walks through these, when none
    may be taken off: that waits for :meth:`take_off_ended`."""

    _ended: ClassVar[list[Any]] = []

    def __init__(self, handle: Any):
        self.take_off_ended()
        self._handle = handle

    def remove(self) -> None:
        self._ended.append(self._handle)

    @classmethod
    def take_off_ended(cls) -> None:
        while cls._ended:
            cls._ended.pop().remove()


def listen(doors: Doors, roots: "Iterable[nn.Module]", weights: "list[AdaptedWeight]") -> None:
    """Register the hooks on the modules whose forward opens a step, on those that hold the weights, and on the layers that
    may read them without calling these."""
    inside = {weight.layer: weight.owner for weight in reversed(weights) if weight.by_layer}
    owners = [*inside, *(weight.owner for weight in weights)]
    before, after, clean_first = BeforeRoot(doors), AfterRoot(doors), CleanFirst(doors)
    for root in roots:
        # prepended: FSDP gathers the weights in hooks of its own, and must gather perturbed ones
        doors.handles.append(root.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        doors.handles.append(root.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True))
    doors.owners.update(owners)
    doors.look_where_they_lie()
    tied = [module for root in roots for module in root.modules() if any(map(doors.holds, module._parameters.values()))]
    for owner in dict.fromkeys((*owners, *tied)):
        doors.owners.add(owner)
        if owner not in roots:
            doors.handles.append(owner.register_forward_pre_hook(BeforeOwner(doors, inside.get(owner)), prepend=True))
        doors.handles += clean_copies(owner, clean_first)
    myself = weakref.ref(doors)

    def adapted(module: nn.Module, name: str, submodule: Any) -> None:
        doors = myself()
        if doors is not None and submodule is not None and adapter_of(submodule) is not None:
            doors.adapters_changed = True
            doors.others.clear()

    doors.handles.append(ProcessWide(register_module_module_registration_hook(adapted)))


def clean_copies(module: nn.Module, clean_first: CleanFirst) -> "list[Any]":
    """Clean W for who reads or writes the module's state dict."""
    return [
        module.register_state_dict_pre_hook(clean_first),
        module._register_load_state_dict_pre_hook(clean_first),
    ]
