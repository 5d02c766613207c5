"""Hooks on the model: a training forward finds W perturbed, whoever else reads it finds it clean.

Two kinds of door. A *root* is a module given as target: its forward decides for all that runs inside it. An *owner* holds a
base weight: it is asked about when it is reached by another way (``generate``, ``get_base_model()``, a submodule, a method).
Nothing here depends on a hook after a forward having run: an interrupt skips those.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..adapters.raw import RAW
from ..adapters.registry import adapter_of
from ..core.sharding import fsdp_modules, is_fsdp_module
from ..core.warn import warn_user
from .gradient_cache import FirstPass
from .noisy_layers import installed
from .stack import (
    calls_itself,
    enclosing_forward,
    in_autograd_function,
    in_backward,
    in_training_module,
    is_distributed,
    pickled_for_a_process,
    reads_in_backward,
    refuse_transforms,
    running_modules,
)
from .tensors import before_its_backward, storage_of
from .unseen_steps import UnseenSteps
from .weights import CLEAN, PERTURBED, SUSPENDED, PerturbedWeights


class Doors:
    """What the hooks of one optimizer share. ``perturb`` opens a step, ``next_draw`` ends a micro-batch's noise, if each is
    to have its own; reached weakly: hooks keep no optimizer."""

    def __init__(self, weights: PerturbedWeights, perturb: Callable[[], Any], next_draw: Callable[[], Any] | None = None):
        self.weights: PerturbedWeights | None = weights
        self.perturb, self.next_draw = perturb, next_draw
        self.backward_began = False  # since this was last set: the training forward after it is another micro-batch's
        self.trains: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # what each root last ran as
        self.around: list[tuple[nn.Module, bool]] = []  # roots that call themselves: what the outer call runs as
        # roots run without gradients since the last step; whether by an autograd.Function (reentrant checkpointing)
        self.ran_clean: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self.opened: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # roots that trained since the last step
        self.owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules whose hooks open a step
        self.handles: list[Any] = []
        # no part of the targets, but in their memory: their hooks
        self.strangers: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
        self.wholes: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that have some of these inside and run as one
        self.looked = False  # for strangers
        self.told_of_sharing = False  # memory with other processes
        self.first_pass = FirstPass()
        self.unseen_steps = UnseenSteps()
        self._memory: set[int] = set()
        self.inside: set[nn.Module] = set()  # roots whose forward runs; one too many after an interrupt, so only a hint
        self.reader: nn.Module | None = None  # a root that reads W inside backward
        self.within = False  # whether there are any: torch.compile keeps code for each value
        self.trained = False  # whether a training forward began since this was last set
        self.adapters_changed = False  # maybe: somebody called a method that can

    # --- what a forward wants ---------------------------------------------------------------------------------------

    def settle(self, module: nn.Module, trains: bool) -> None:
        """Bring W to what a forward of ``module`` needs: W + ε if it trains, W if not."""
        weights = self.weights
        assert weights is not None
        trains = trains or weights.held
        anew = self.next_draw is not None and trains and self.backward_began and not weights.held
        if trains is weights.noisy and not weights.partly and not anew:
            return
        refuse_transforms(module)
        running = [m for m in running_modules() if is_fsdp_module(m)] if is_distributed() else []
        with weights.gathered_again(running[::-1]):
            if anew and self.next_draw is not None:
                self.backward_began = False
                self.next_draw()
            self._move(module, trains)

    def _move(self, module: nn.Module, trains: bool) -> None:
        weights = self.weights
        assert weights is not None
        if trains:
            if weights.state == CLEAN:
                self.ran_clean.clear()
                self.opened.clear()
                self.first_pass.read = {}
            self.perturb()
        elif threading.get_ident() != weights.thread:
            raise RuntimeError(
                f"{type(module).__name__} was called without gradients by another thread than the one that trains, amid a "
                "step, when its base weights are perturbed. Evaluate in the training thread, or on a copy of the model"
            )
        else:
            weights.suspend()

    def clean_inside(self, module: nn.Module) -> None:
        """Clean W for a method of ``module`` that reads or writes the base weights inside it (merge, unload, ...)."""
        self.adapters_changed = True
        weights = self.weights
        if weights is not None and weights.state != CLEAN and weights.lie_inside(module):
            weights.restore()

    def clean_for_a_reader(self, module: nn.Module) -> None:
        """Clean W for a method of another module that reads it: torch's own average of a model."""
        if self.weights is not None and not self.weights.held:
            self.weights.suspend()

    def in_backward(self, module: nn.Module) -> bool:
        """A forward inside backward repeats one that was made before and must find the same W; or it is a reader's: true."""
        weights = self.weights
        assert weights is not None
        if weights.partly:
            raise RuntimeError(
                f"{type(module).__name__} is run again, in backward, at weights that are perturbed in part: an earlier "
                "restore failed. Call optimizer.restore() and begin the step anew"
            )
        if weights.held:
            return False
        if not (torch.is_grad_enabled() and module.training):
            reads = weights.noisy and reads_in_backward()
            if reads and fsdp_modules(weights.roots):
                raise RuntimeError(
                    f"{type(module).__name__} was called without gradients by a hook inside backward, when its base weights "
                    "are perturbed and FSDP2 has gathered them for the backward: they cannot be made clean there. Call it "
                    "after the backward, or inside `with optimizer.perturbed():` if it may see the noise"
                )
            return reads
        if weights.state == CLEAN or module in self.ran_clean:
            raise RuntimeError(
                f"{type(module).__name__} ran its forward without gradients on clean weights and is now run again, in "
                "backward, on perturbed ones. If an activation checkpoint is around a module given in the groups: use "
                "use_reentrant=False, or pass the whole model as targets. If it is a cache of gradients (GradCache, "
                "sentence-transformers' cached losses): put both passes inside `with optimizer.perturbed():`"
            )
        if weights.state == SUSPENDED:
            weights.resume()
        return False

    def read_this_once(self, module: nn.Module) -> None:
        """Clean W for this one forward, inside backward: what comes after it there needs W + ε."""
        weights = self.weights
        assert weights is not None

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if output is not None:  # where a forward raised, torch walks through its hooks: it goes with the next
                handle.remove()
            if in_backward():
                self.read_in_backward(output)

        weights.suspend()
        handle = module.register_forward_hook(after, always_call=True)

    def read_in_backward(self, output: Any) -> None:
        """A reader inside backward is through."""
        assert self.weights is not None
        if torch.is_grad_enabled():
            self.refuse_in_backward(output)
        self.weights.resume()

    def resume_in_backward(self, output: Any) -> None:
        """The graph behind ``output`` was made at W + ε: its backward brings W + ε back where a reader suspended it."""
        before_its_backward(output, self._before_backward)

    def refuse_in_backward(self, output: Any) -> None:
        """The graph behind ``output`` was made at W in eval mode: its backward fails at W + ε, and should say why."""
        before_its_backward(output, self._clean_graph_in_backward)

    def _clean_graph_in_backward(self, grad: Tensor) -> None:
        weights = self.weights
        if weights is not None and weights.state == PERTURBED and not weights.held and weights.writes():
            raise RuntimeError(
                "the weights that this backward needs were modified by an inplace operation: a forward in eval mode made "
                "its graph at clean weights, then a training forward opened the step, or a backward under way went on. Give "
                "the module around both as targets, call optimizer.perturb() before the first forward, or run the one in "
                "eval mode without gradients"
            )

    def _before_backward(self, grad: Tensor) -> None:
        self.backward_began = True
        if self.weights is not None and self.weights.state == SUSPENDED:
            self.weights.resume()

    # --- where the weights lie --------------------------------------------------------------

    def look_again(self) -> None:
        """Before W is next perturbed."""
        self.looked = False

    def look_where_they_lie(self) -> None:
        """Take down the memory of the weights; not of raw parameters, which have no forward to listen to."""
        weights = self.weights.weights() if self.weights is not None else []
        mine = [w.owner._parameters.get(w.name) for w in weights if w.adapter is not RAW]
        self._memory = {storage_of(parameter) for parameter in mine if parameter is not None} - {0}

    def holds(self, tensor: Any) -> bool:
        """Whether ``tensor`` shares memory with a weight."""
        return isinstance(tensor, Tensor) and storage_of(tensor) in self._memory

    def tell_of_sharing(self) -> None:
        if self.weights is not None and not self.told_of_sharing:
            self.told_of_sharing = True
            warn_user(
                "another process is given a module whose base weights FlatPerturbOptimizer perturbs, and shares their "
                "memory: amid a step it sees their noise. Give it a copy (copy.deepcopy(module))"
            )

    def parameters(self) -> "list[tuple[nn.Module, Tensor]]":
        """The weights and what else shares their memory, each with a module that holds it."""
        mine = [(w.owner, w.parameter) for w in self.weights.weights()] if self.weights is not None else []
        for module in (*self.owners, *self.strangers):
            mine += [(module, p) for p in module._parameters.values() if p is not None and self.holds(p)]
        return list({(id(module), id(p)): (module, p) for module, p in mine}.values())


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


class BeforeRoot(Hook):
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        doors = self.doors
        if doors is None or doors.weights is None or torch.compiler.is_compiling():  # torch.export's fake forward
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
        if module in doors.inside and calls_itself(module):
            doors.around.append((module, doors.trains.get(module, trains)))
        doors.trains[module] = trains
        doors.inside.add(module)
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
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        doors = self.doors
        if doors is None or doors.weights is None or torch.compiler.is_compiling():
            return
        trains = doors.trains.get(module)
        if in_backward():
            if doors.reader is module:
                doors.reader = None
                doors.read_in_backward(output)
            return
        if doors.around and doors.around[-1][0] is module and calls_itself(module):
            doors.trains[module] = doors.around.pop()[1]
            return
        doors.inside.discard(module)
        doors.within = bool(doors.inside)
        if trains and doors.weights.state == PERTURBED:
            doors.resume_in_backward(output)
        elif trains is False and torch.is_grad_enabled():
            doors.refuse_in_backward(output)


class BeforeOwner(Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        doors = self.doors
        if doors is None or doors.weights is None:
            return
        trains = torch.is_grad_enabled() and module.training
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
        trains, around = module.training and torch.is_grad_enabled(), enclosing_forward(doors.trains)
        new = installed(module) is None
        doors.settle(module, trains if around is None else around)
        if new and installed(module) is not None:
            _answer_anew(module)
        doors.trained = doors.trained or weights.noisy
        if trains and around is None and not compiled:
            # every such owner's output is listened to, as backward starts at the last one
            handles: list[Any] = []

            def after(module: nn.Module, args: Any, output: Any) -> None:
                handles.pop().remove()
                doors.resume_in_backward(output)

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


def listen(doors: Doors, roots: "Iterable[nn.Module]", owners: "Iterable[nn.Module]") -> None:
    """Register the hooks on the modules whose forward opens a step and on those that hold the weights."""
    before, after, clean_first = BeforeRoot(doors), AfterRoot(doors), CleanFirst(doors)
    for root in roots:
        # prepended: FSDP gathers the weights in hooks of its own, and must gather perturbed ones
        doors.handles.append(root.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        doors.handles.append(root.register_forward_hook(after, prepend=True, always_call=True))
    doors.owners.update(owners)
    doors.look_where_they_lie()
    tied = [module for root in roots for module in root.modules() if any(map(doors.holds, module._parameters.values()))]
    for owner in dict.fromkeys((*owners, *tied)):
        doors.owners.add(owner)
        if owner not in roots:
            doors.handles.append(owner.register_forward_pre_hook(BeforeOwner(doors), prepend=True))
        doors.handles += clean_copies(owner, clean_first)
    myself = weakref.ref(doors)

    def adapted(module: nn.Module, name: str, submodule: Any) -> None:
        doors = myself()
        if doors is not None and submodule is not None and adapter_of(submodule) is not None:
            doors.adapters_changed = True

    doors.handles.append(ProcessWide(register_module_module_registration_hook(adapted)))


def clean_copies(module: nn.Module, clean_first: CleanFirst) -> "list[Any]":
    """Clean W for who reads or writes the module's state dict."""
    return [
        module.register_state_dict_pre_hook(clean_first),
        module._register_load_state_dict_pre_hook(clean_first),
    ]
