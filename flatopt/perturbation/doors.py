"""What the hooks of one optimizer share and decide by: what runs now, what ran, where the weights lie; W made as it asks."""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.raw import RAW
from ..core.sharding import fsdp_modules, is_fsdp_module
from ..core.warn import warn_user
from .gradient_cache import FirstPass
from .noise import NoiseRequest
from .stack import (
    in_backward,
    in_function_backward,
    is_distributed,
    reads_in_backward,
    refuse_transforms,
    running_modules,
)
from .tensors import all_tensors_in, before_its_backward, storage_of
from .unseen_steps import UnseenSteps
from .weights import CLEAN, PERTURBED, SUSPENDED, PerturbedWeights

_OLD_GRAPH = (
    "a backward at other noise than its forward ran at: a training forward after a backward began the next draw "
    "(draws='micro-batch' or 'mixed'), or step() ended this one. Take all backwards of a forward before the next training "
    "forward, or put the forwards that belong together inside `with optimizer.perturbed():`"
)


class Calls(threading.local):
    """The calls of roots, of each thread its own: one that is refused must leave the thread that trains as it is."""

    def __init__(self) -> None:
        self.trains: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # what each root last ran as
        self.around: list[tuple[nn.Module, bool]] = []  # roots that call themselves: what the outer call runs as
        self.inside: set[nn.Module] = set()  # roots whose forward runs; one too many after an interrupt, so only a hint


class Doors:
    """What the hooks of one optimizer share. ``perturb`` opens a step; ``is_over`` tells whether a micro-batch is whose
    noise is its own, ``next_draw`` ends it, and ``wanted`` tells whether the backward under way is of what is trained. They
    reach the optimizer weakly: hooks keep none."""

    def __init__(
        self,
        weights: PerturbedWeights,
        perturb: Callable[[], Any],
        is_over: Callable[[], bool],
        next_draw: Callable[[], Any],
        wanted: Callable[[], bool],
    ):
        self.weights: PerturbedWeights | None = weights
        self.perturb, self.is_over, self.next_draw, self.wanted = perturb, is_over, next_draw, wanted
        self.backward_began = False  # since this was last set: the training forward after it is another micro-batch's
        self.graph_is_old = False  # that of the backward under way: its forward ran at other noise
        self.calls = Calls()
        # roots run without gradients since the last step; whether by an autograd.Function (reentrant checkpointing)
        self.ran_clean: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self.opened: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # roots that trained since the last step
        self.owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules whose hooks open a step
        self.handles: list[Any] = []
        # no part of the targets, but in their memory: their hooks
        self.strangers: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
        self.wholes: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that have some of these inside and run as one
        self.others: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # models without an owner
        self.looked = False  # for strangers
        self.told_of_sharing = False  # memory with other processes
        self.first_pass = FirstPass()
        self.unseen_steps = UnseenSteps()
        self._memory: set[int] = set()
        self.reader: nn.Module | None = None  # a root that reads W inside backward
        self.within = False  # whether a root runs, the last thread says: a hint; torch.compile keeps code for each value
        self.trained = False  # whether a training forward began since this was last set
        self.adapters_changed = False  # maybe: somebody called a method that can

    # --- what a forward wants ---------------------------------------------------------------------------------------

    def settle(self, module: nn.Module, trains: bool, within: bool = False) -> None:
        """Bring W to what a forward of ``module`` needs: W + ε if it trains, W if not; ``within`` a root, asked before."""
        weights = self.weights
        assert weights is not None
        trains = trains or weights.held
        anew = trains and not within and not weights.held and self.is_over()
        if trains is weights.noisy and not weights.partly and not anew:
            return
        refuse_transforms(module)
        running = [m for m in running_modules() if is_fsdp_module(m)] if is_distributed() else []
        with weights.gathered_again(running[::-1]):
            if anew:
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
        if self.graph_is_old:
            raise RuntimeError(_OLD_GRAPH)
        if not self.backward_began and in_function_backward():
            self.backward_began = True  # the parameters that it reaches are in no graph yet
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

    def resume_in_backward(self, output: Any, inputs: Any) -> None:
        """The graph behind ``output`` was made at W + ε: its backward brings W + ε back where a reader suspended it."""
        weights, given = self.weights, all_tensors_in(inputs)
        assert weights is not None
        of_inputs = any(tensor.requires_grad for tensor in given)  # a backward may be of these alone
        before_its_backward(output, partial(self._before_backward, weights.request, weights.moved, of_inputs), given)

    def refuse_in_backward(self, output: Any) -> None:
        """The graph behind ``output`` was made at W in eval mode: its backward fails at W + ε, and should say why."""
        before_its_backward(output, self._clean_graph_in_backward)

    def _clean_graph_in_backward(self, grad: Tensor) -> None:
        weights = self.weights
        if weights is not None and weights.state == PERTURBED and not weights.held and weights.writes:
            raise RuntimeError(
                "the weights that this backward needs were modified by an inplace operation: a forward in eval mode made "
                "its graph at clean weights, or one of another model on the same base, then a training forward opened the "
                "step, or a backward under way went on. Give both as targets ([{'modules': [one, other]}], or the module "
                "around them), call optimizer.perturb() before the first forward, or run the one in eval mode without "
                "gradients; of another model, take the backward before the next forward of this one"
            )

    def _before_backward(self, noise: "NoiseRequest | None", moved: bool, of_inputs: bool, grad: Tensor) -> None:
        weights = self.weights
        if weights is None:
            return
        self.graph_is_old = weights.state != CLEAN and weights.request != noise
        if self.graph_is_old and (moved or weights.writes):
            raise RuntimeError(_OLD_GRAPH)
        self.backward_began = self.backward_began or not of_inputs or self.wanted()
        if weights.state == SUSPENDED:
            weights.resume()

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
