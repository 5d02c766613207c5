"""When W is perturbed: from the first training forward of a step to ``step()``, and in no evaluation between."""

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .draw import Draw
from .noise import step_key
from .restore import RESTORES
from .sharding import fsdp_modules, local

_open = weakref.WeakSet()  # windows whose weights are perturbed now


@contextmanager
def _uninterrupted():
    # Ctrl-C waits: weights perturbed halfway could not be restored
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting = []
    signal.signal(signal.SIGINT, lambda *args: waiting.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if waiting:
        handler(*waiting[0])


@contextmanager
def _writing():
    # in inference mode a write would not move the version counter; leaving that mode turns gradients on
    with _uninterrupted(), torch.inference_mode(False), torch.no_grad():
        yield


class Window:
    """The weights perturbed for the current step, and how to restore them. Holds no reference to the optimizer."""

    def __init__(self, roots: "list[nn.Module]"):
        self._roots = roots
        self._fsdp = fsdp_modules(roots)
        self.is_open = False
        self.held = False  # inside ``with perturbed()``: forwards do not toggle
        self.one_scale = False  # inside ``step(closure)``: the adapter moves between evaluations, the noise must not
        self.suspended_by: nn.Module | None = None
        self.running = weakref.WeakSet()  # modules whose forward is under way
        self.was_suspended = weakref.WeakSet()  # modules that ran without gradients in this window
        self._draws = {}  # target -> its draw
        self._plans = []  # (name of the restore mode, draws) of what is perturbed now
        self._undo = []

    @_writing()
    def open(self, groups: "list[tuple[dict, float]]", seed: int, step: int, rank: int) -> None:
        """Perturb the targets of ``(group, sigma_t)``; all of them or, if anything raises, none."""
        if self.is_open:
            return
        if not self._fsdp and any(hasattr(type(root), "unshard") for root in self._roots):
            self._fsdp = fsdp_modules(self._roots)  # sharded since the optimizer was made
        self._reshard()
        key, index, tied, known = step_key(seed, step, rank), 0, set(), self._draws
        self._draws = {}
        try:
            for group, sigma in groups:
                kept, remade = [], []
                for target in group["targets"]:
                    index += 1
                    draw = known.get(target)
                    if draw is None or draw.index != index:
                        draw = Draw(target, index)
                    self._draws[target] = draw
                    draw.look()
                    if sigma > 0 and draw.weight.data_ptr() not in tied:
                        tied.add(draw.weight.data_ptr())
                        draw.step_key, draw.sigma, draw.noise = key, sigma, group["noise"]
                        (remade if target.remade else kept).append(draw)
                self._plans += [(name, some) for name, some in ((group["restore"], kept), ("copy", remade)) if some]
            others = set().union(*(window.modules() for window in _open))
            for draw in self._drawn() if others else ():
                if draw.target.module in others:
                    raise RuntimeError(
                        f"{draw.target.path} is already perturbed by another FlatPerturbOptimizer; one weight can have "
                        "one. Delete the other optimizer, or give the two different modules"
                    )
            for name, draws in self._plans:
                self._undo.append(RESTORES[name](draws))
            self._wrote()
        except BaseException:
            self._run_undo()
            self.let_go()
            raise
        self.was_suspended.clear()
        self.is_open = True
        _open.add(self)

    @_writing()
    def close(self) -> None:
        """Restore W; nothing to do where it is clean."""
        if not self.is_open:
            return
        self.is_open = False
        _open.discard(self)
        self._reshard()
        try:
            for draw in self._drawn():
                target, written = draw.target, draw.weight._version != draw.version
                if not target.remade and (target.parameter is not draw.parameter or (written and not target.version_moves)):
                    raise RuntimeError(
                        f"{target.path} was written to or replaced while it was perturbed, so its clean value is lost. "
                        "Reload the base weights; before changing them, call optimizer.restore()"
                    )
            if self.suspended_by is None:
                self._run_undo()
            self._follow()
        finally:
            self._undo, self.suspended_by = [], None
            self.let_go()

    @_writing()
    def suspend(self, module: nn.Module) -> None:
        """Clean W for a no-grad forward of ``module`` amid a step; :meth:`resume` puts the same perturbed bits back.

        A graph that saved the perturbed W then stays valid, so the version counters go back too. Not so with
        ``subtract``, whose bits drift: there backward raises, as it should.
        """
        self._reshard()
        self.suspended_by = module
        self.was_suspended.add(module)
        exact = not any(name == "subtract" for name, _ in self._plans)
        drawn = self._drawn() if exact else ()
        self._versions = [torch.autograd._unsafe_preserve_version_counter(draw.parameter) for draw in drawn]
        self._run_undo()
        self._follow()

    @_writing()
    def resume(self) -> None:
        self._reshard()
        self.suspended_by = None
        self._undo = [RESTORES[name](draws) for name, draws in self._plans]
        for version in self._versions:
            version.__exit__()
        self._wrote()
        self._follow()

    def _reshard(self) -> None:
        for module in self._fsdp:
            module.reshard()

    def _drawn(self) -> "Iterator[Draw]":
        return (draw for _, draws in self._plans for draw in draws)

    def modules(self) -> "set[nn.Module]":
        return {draw.target.module for draw in self._drawn()}

    def _run_undo(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._wrote()

    def _wrote(self) -> None:
        for draw in self._drawn():
            draw.version = draw.weight._version

    def _follow(self) -> None:
        # after model.to(...), or PEFT making a weight anew: what should have been moved
        for draw in self._drawn():
            if local(draw.target.parameter).data_ptr() != draw.weight.data_ptr():
                draw.target.weight.copy_(draw.weight)

    def let_go(self) -> None:
        """Keep no alias of W: it would keep the memory of a model that is moved or deleted. Nor, after a step, its scale."""
        self._plans = []
        for draw in self._draws.values():
            draw.parameter = draw.weight = None
            if not self.one_scale:
                draw.std = None


def close_around(module: nn.Module) -> None:
    """Restore every open window that has a target inside ``module``, unless it is PEFT merging for a forward under way."""
    inside = set(module.modules())
    for window in list(_open):
        if not window.running and not inside.isdisjoint(window.modules()):
            window.close()


class Ear:
    """A window's hooks on a model. Copies and pickles of the model get a deaf one: they are not being trained."""

    def __init__(self, window: Window | None = None, open_window: Callable[[], None] | None = None):
        self.window, self.open_window = window, open_window

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args) -> None:
        window = self.window
        if window is None:
            return
        if getattr(module, "_is_replica", False):
            if module.training and torch.is_grad_enabled() and not window.is_open:
                raise RuntimeError(
                    "torch.nn.DataParallel copied the weights to its GPUs before they could be perturbed. Train with "
                    "DistributedDataParallel (torchrun, accelerate launch), on one GPU (CUDA_VISIBLE_DEVICES=0), or pass "
                    "the DataParallel module itself as targets"
                )
            return
        window.running.add(module)
        if window.held or window.suspended_by is not None:
            return
        if not module.training:
            window.close()
        elif not torch.is_grad_enabled():
            if window.is_open:
                window.suspend(module)
        else:
            if torch._C._current_graph_task_id() != -1 and (not window.is_open or module in window.was_suspended):
                raise RuntimeError(
                    f"{type(module).__name__} ran its forward without gradients on clean weights and is now recomputed, in "
                    "backward, on perturbed ones: reentrant activation checkpointing around a module given in the groups. "
                    "Use use_reentrant=False, or pass the whole model as targets"
                )
            self.open_window()

    @torch.compiler.disable
    def after_forward(self, module: nn.Module, args, output) -> None:
        if self.window is None:
            return
        self.window.running.discard(module)
        if self.window.suspended_by is module:
            self.window.resume()

    @torch.compiler.disable
    def clean_first(self, *_) -> None:
        if self.window is not None:
            self.window.close()

    def __deepcopy__(self, memo: dict) -> "Ear":
        if self.window is not None and self.window.is_open:
            parameters = [draw.parameter for draw in self.window._drawn()]
            self.window.close()
            with torch.no_grad():
                for parameter in parameters:  # the copier may have passed W before it came here
                    if id(parameter) in memo:
                        memo[id(parameter)].copy_(parameter)
        return Ear()

    def __reduce__(self):
        self.clean_first()
        return Ear, ()


def listen(ear: Ear, roots: "list[nn.Module]", owners: "list[nn.Module]") -> list:
    """Register ``ear`` on the modules whose forward opens a step and on those that hold the weights."""
    handles = []
    for root in roots:
        # prepended: FSDP gathers the weights in a pre-hook of its own, and must gather perturbed ones
        handles.append(root.register_forward_pre_hook(ear.before_forward, prepend=True))
        handles.append(root.register_forward_hook(ear.after_forward, always_call=True))
    for owner in owners:
        handles.append(owner.register_state_dict_pre_hook(ear.clean_first))
        handles.append(owner._register_load_state_dict_pre_hook(ear.clean_first))
    return handles
