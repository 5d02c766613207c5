"""Modules that are no part of the targets but share their weights' memory (a teacher, a tied head): they read W clean."""

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_parameter_registration_hook

from ..adapters.registry import adapter_of
from ..core.warn import warn_user
from .doors import Doors
from .hooks import CleanFirst, Hook, ProcessWide, clean_copies, exported
from .stack import enclosing_forward, in_autograd_function, in_backward, running_modules


def listen_for_strangers(doors: Doors) -> None:
    """Notice each module that is given a parameter in the weights' memory from now on."""
    myself = weakref.ref(doors)

    def registered(module: nn.Module, name: str, parameter: Any) -> None:
        doors = myself()
        if doors is not None:
            _registered(doors, module, parameter)

    doors.handles.append(ProcessWide(register_module_parameter_registration_hook(registered)))
    doors.handles.append(ProcessWide(register_module_buffer_registration_hook(registered)))


def find_strangers(doors: Doors) -> None:
    """Hook every module of the process that shares the weights' memory (a teacher, a tied head): it reads W too.

    One look, before the first perturbation; those that get such a parameter later tell when they register it. A hook on
    all modules would cost each forward, and torch.compile would compile anew where it comes or goes.
    """
    doors.look_where_they_lie()
    doors.looked = True
    doors.others.clear()
    modules = _modules_of_the_process()
    scripted = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
    plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    if any(doors.holds(parameter) for module in scripted for parameter in module.parameters(recurse=False)):
        warn_user(
            "a TorchScript module shares memory with weights that FlatPerturbOptimizer perturbs, and takes no hooks: "
            "amid a step it would see their noise. Call optimizer.restore() before it runs"
        )
    for module in plain:
        if any(map(doors.holds, _read_by(module))):
            listen_to_stranger(doors, module)
    for module in plain:
        inner = module.__dict__.get("_modules", {}).get("_orig_mod", module)
        compiled = inner is not module or module.__dict__.get("_compiled_call_impl") is not None
        whole = compiled or isinstance(inner, torch.fx.GraphModule)
        if whole and inner not in doors.wholes and any(part in doors.strangers for part in inner.modules()):
            doors.wholes.add(inner)
            doors.handles.append(inner.register_forward_pre_hook(BeforeCompiledStranger(doors), prepend=True))


def _read_by(module: nn.Module) -> "Iterator[Any]":
    """The tensors a module's own forward reads: its parameters, buffers, and lists of parameters, which have no forward."""
    held = module.__dict__
    yield from held.get("_parameters", {}).values()
    yield from held.get("_buffers", {}).values()
    for child in held.get("_modules", {}).values():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield from child.__dict__.get("_parameters", {}).values()


def _modules_of_the_process() -> "list[nn.Module]":
    kinds: set[int] = set()  # by identity: a metaclass may forbid to hash its classes
    more: list[type] = [nn.Module]
    while more:
        kind = more.pop()
        if id(kind) not in kinds:
            kinds.add(id(kind))
            more += type.__subclasses__(kind)
    # among a million objects: without a step of Python's for each
    things = gc.get_objects()
    return list(itertools.compress(things, map(kinds.__contains__, map(id, map(type, things)))))


def listen_to_stranger(doors: Doors, module: nn.Module) -> None:
    if module in doors.owners or module in doors.strangers:
        return
    hook = module.register_forward_pre_hook(BeforeStranger(doors), prepend=True)
    doors.strangers[module] = [hook, *clean_copies(module, CleanFirst(doors))]


def _registered(doors: Doors, module: nn.Module, parameter: Any) -> None:
    """Somebody gives ``module`` a parameter: if it is one of ours, the module is a reader too."""
    weights = doors.weights
    if weights is None or not isinstance(parameter, Tensor) or module in doors.owners or module in doors.strangers:
        return
    doors.look_where_they_lie()  # they may have moved since the last step
    if not doors.holds(parameter):
        return
    if enclosing_forward(doors.calls.trains) is not None or any(running in doors.owners for running in running_modules()):
        return  # no reader: PEFT's target_parameters are parametrized within each forward
    if torch._guards.TracingContext.try_get() is not None:
        return  # what torch.compile traces with
    if not isinstance(module, torch.jit.ScriptModule):
        listen_to_stranger(doors, module)
    doors.look_again()  # it may be part of a graph module or a compiled one, which is not called by its parts
    if weights.noisy and not weights.held and threading.get_ident() == weights.thread and not in_backward():
        weights.suspend()


class BeforeStranger(Hook):
    """On a module that shares the weights' memory and is no part of the targets: it reads W clean. In training it follows
    the model that it is a part of (a tied head); another model's base weight, with an adapter of its own, is clean."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        doors = self.doors
        if doors is None or doors.weights is None or doors.weights.held or exported(doors):
            return
        compiling = torch.compiler.is_compiling()
        if not compiling and module.training and _is_of_another_model(doors, module):
            _train_clean(doors, module)
        elif doors.weights.noisy and not (torch.is_grad_enabled() and module.training):
            _read_clean(doors, module, compiling)


@torch.compiler.disable
def _read_clean(doors: Doors, module: nn.Module, compiled: bool) -> None:
    if in_backward():
        if not compiled and doors.in_backward(module):
            doors.read_this_once(module)
    elif not (module.training and in_autograd_function()):
        doors.settle(module, False)


def _is_of_another_model(doors: Doors, module: nn.Module) -> bool:
    """Whether ``module`` runs in, or is, a model with adapters of its own and none of the targets' weights."""
    running = list(running_modules())
    around = next((each for each in running if each is not module), module)
    whole = running[-1] if running else module
    if module not in doors.wholes and adapter_of(around) is None:
        return False
    known = doors.others.get(whole)
    if known is None:
        parts = list(whole.modules())
        known = doors.others[whole] = doors.owners.isdisjoint(parts) and any(adapter_of(part) is not None for part in parts)
    return known


def _train_clean(doors: Doors, module: nn.Module) -> None:
    """What its backward needs is W as it is now; also where a checkpoint runs it again."""
    if doors.weights is not None and in_backward():
        doors.weights.suspend()
        return
    doors.settle(module, False)
    if torch.is_grad_enabled():

        def after(module: nn.Module, args: Any, output: Any) -> None:
            handle.remove()
            doors.refuse_in_backward(output)

        handle = module.register_forward_hook(after)


class BeforeCompiledStranger(BeforeStranger):
    """The same for a compiled module as a whole, so that its graph need not break where it reads W."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any) -> None:
        super().__call__(module, args)
