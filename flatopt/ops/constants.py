"""Tensors computed once for a process: they must not depend on what was under way when they were first needed."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Made = TypeVar("Made")


def constant(make: Callable[..., Made]) -> Callable[..., Made]:
    """``make(*arguments)``, computed once: outside of FakeTensorMode, other dispatch modes and inference mode.

    ``make`` must give every dtype and device itself, as defaults may be set to others when it is called.
    """

    @functools.cache
    def made(*arguments: object) -> Made:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            return make(*arguments)

    return made


@contextmanager
def writing() -> Iterator[None]:
    """What is done inside is done to the real weights: no fake tensors, no graph, and version counters that move."""
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if fake is None and not torch.is_inference_mode_enabled():
        with torch.no_grad():
            yield
        return
    with ExitStack() as stack:
        if fake is not None:
            stack.enter_context(sys.modules["torch._subclasses.fake_tensor"].unset_fake_temporarily())
        # in inference mode a write would not move the version counter; leaving that mode turns gradients on
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
