"""The garbage collector takes an optimizer whose weights move at that very moment: they come back all the same."""

import gc

import pytest
import torch
from helpers import batch, changed, lora_mlp, trainable
from torch.utils._python_dispatch import TorchDispatchMode

from flatopt import FlatPerturbOptimizer
from flatopt.perturbation.hooks import ProcessWide


class CollectAt(TorchDispatchMode):
    """The collector runs before the k-th operation."""

    def __init__(self, k):
        super().__init__()
        self.k, self.seen = k, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.seen == self.k:
            gc.collect()
        self.seen += 1
        return func(*args, **(kwargs or {}))


def garbage(model, restore):
    """The weights of an optimizer amid its step that only a cycle holds."""
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.3, schedule="constant", restore=restore
    )
    model(batch()[0])
    optimizer.itself = optimizer
    return optimizer._weights


@pytest.mark.parametrize(
    ("move", "restore"), [("suspend", "reversible"), ("resume", "reversible"), ("resume", "copy"), ("restore", "copy")]
)
def test_at_any_operation_of_a_move(model, before, move, restore):
    k, operations = 0, 1
    gc.disable()
    try:
        while k < operations:
            weights = garbage(model, restore)
            if move == "resume":
                weights.suspend()
            collect = CollectAt(k)
            with collect:
                getattr(weights, move)()
            operations = collect.seen
            gc.collect()
            assert not changed(model, before)
            assert weights.state == "clean"
            with torch.no_grad():
                model(batch()[0])
            k += max(1, operations // 4)
    finally:
        gc.enable()


def test_an_optimizer_may_end_while_torch_walks_through_its_hooks_on_all_modules():
    from torch.nn.modules import module as of_torch

    hooks = of_torch._global_parameter_registration_hooks
    model = lora_mlp()
    gc.collect()
    ProcessWide.take_off_ended()  # of tests before
    before = len(hooks)
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, total_steps=3)
    assert len(hooks) == before + 1

    def collect(module, name, parameter):
        nonlocal optimizer
        optimizer = None
        gc.collect()

    handle = of_torch.register_module_parameter_registration_hook(collect)
    hooks.move_to_end(handle.id, last=False)
    try:
        torch.nn.Linear(2, 2)
    finally:
        handle.remove()
    another = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, total_steps=3)
    assert len(hooks) == before + 1
    another.detach()
    assert len(hooks) == before
