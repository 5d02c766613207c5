"""What runs now, read off the stack and torch: marks that one hook sets and another takes off would survive an interrupt."""

import sys
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import reduction
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

_CALL = nn.Module._wrapped_call_impl.__code__
_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_TO_PROCESSES = {reduction.dump.__code__, reduction.ForkingPickler.dumps.__code__}
_FUNCTION_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__


def enclosing_forward(roots: "Mapping[nn.Module, bool]") -> "bool | None":
    """Whether the innermost forward of ``roots`` under way trains, as they say; None outside of any.

    Gradients that are off because an ``autograd.Function`` runs (reentrant checkpointing) are off for the trainer's own
    purposes.
    """
    frame: Any = sys._getframe(1)
    within_function, explicit = False, not torch.is_grad_enabled()
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            root = frame.f_locals.get("self")
            if isinstance(root, nn.Module) and root in roots:
                return roots[root] and (within_function or not explicit)
        elif not within_function:
            within_function = _is_function_forward(frame)
        frame = frame.f_back
    return None


def in_training_module() -> bool:
    """Whether the root that is called is part of a module in train mode whose forward runs (a VLM's tower in eval mode)."""
    return any(module.training for module in running_modules())


def running_modules() -> "Iterable[nn.Module]":
    """The modules whose forward, or a hook of it, runs now; the innermost first, read off the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                yield module
        frame = frame.f_back


def calls_itself(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs inside another call of it."""
    return sum(each is module for each in running_modules()) > 1


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def in_autograd_function() -> bool:
    """Whether the forward of an ``autograd.Function`` runs (reentrant checkpointing), in which gradients are off."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if _is_function_forward(frame):
            return True
        frame = frame.f_back
    return False


def _is_function_forward(frame: Any) -> bool:
    code = frame.f_code
    if code.co_name != "forward" or not code.co_argcount:
        return False
    return isinstance(frame.f_locals.get(code.co_varnames[0]), torch._C._FunctionBase)


def refuse_transforms(module: nn.Module) -> None:
    """Raise where W cannot be moved now: what is written would become part of what is traced or differentiated."""
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() or []
    if torch._C._get_tracing_state() is not None:
        within = "torch.jit.trace"
    elif any(level.key() in (functorch.TransformType.Grad, functorch.TransformType.Jvp) for level in levels):
        within = "torch.func.grad (or vjp, jvp, ...)"
    else:
        return
    raise RuntimeError(
        f"the base weights would have to move at a forward of {type(module).__name__} that runs inside {within}, where they "
        "cannot be written to. Before it, call optimizer.perturb() to train, or optimizer.restore() to read clean weights"
    )


def untraced(function: Callable[..., Any]) -> Any:
    """``torch.compiler.disable``, saying what to do to who cannot do without tracing."""
    reason = "hooks of a FlatPerturbOptimizer: call its detach() before torch.export(..., strict=True)"
    try:
        return torch.compiler.disable(function, reason=reason)
    except TypeError:  # torch 2.4
        return torch.compiler.disable(function)


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)  # torch 2.4 has none


def in_transform() -> bool:
    """Whether ``torch.func``'s transforms (vmap, grad) or ``torch.jit.trace`` are at work."""
    return bool(torch._C._functorch.get_interpreter_stack()) or torch._C._get_tracing_state() is not None


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def reads_in_backward() -> bool:
    """Whether a forward inside backward, without gradients or in eval mode, is a reader's; or repeats one made before.

    A hook's (of a tensor, a module, a parameter) reads. In what a non-reentrant checkpoint runs again gradients are on, so
    who turned them off reads, as in the first forward. What an ``autograd.Function`` runs must find what its forward found:
    a reversible layer makes its input again without gradients. So must an unpack hook of somebody's own checkpoint, which
    only its name tells from other hooks.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE:
        code = frame.f_code
        if code is _FUNCTION_BACKWARD or _is_function_forward(frame):
            return False
        if "unpack" in code.co_name:
            return code.co_filename == torch.utils.checkpoint.__file__ and not torch.is_grad_enabled()
        frame = frame.f_back
    return True


def in_function_backward() -> bool:
    """Whether the backward of an ``autograd.Function`` runs: a reentrant checkpoint's, that runs its forward again."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE:
        if frame.f_code is _FUNCTION_BACKWARD:
            return True
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__ and "unpack" in frame.f_code.co_name:
            return False  # a non-reentrant one's, that some Function's backward asked for what it saved
        frame = frame.f_back
    return False


def pickled_for_a_process() -> bool:
    """Whether what is being pickled goes to another process (a spawned worker, a queue), which shares tensors' memory."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _TO_PROCESSES:
            return True
        frame = frame.f_back
    return False


def backwards_so_far() -> int:
    """A number that grows by one with every backward, this small one included."""
    seen: list[int] = []
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.ones((), device="cpu", requires_grad=True)
        double = leaf * 2
        double.register_hook(lambda grad: seen.append(torch._C._current_graph_task_id()))
        torch.autograd.grad(double, leaf)
    return seen[0]
