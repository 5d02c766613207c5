"""A weight that somebody wrote to amid a step costs that weight alone: all others come back, and the error names it."""

import copy

import pytest
import torch
from helpers import batch, changed, frozen, lora_mlp, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer

NAME = "base_model.model.second.base_layer.weight"


def under_no_grad(owner):
    with torch.no_grad():
        owner.weight.mul_(1.5)


def through_data(owner):
    owner.weight.data[3, 2] += 1.0


def replaced(owner):
    owner.weight = nn.Parameter(torch.ones_like(owner.weight), requires_grad=False)


def one_bit(owner):
    owner.weight.data.view(torch.int32)[0, 0] ^= 1


@pytest.mark.parametrize("end", ["step", "restore", "eval forward", "state_dict"])
@pytest.mark.parametrize("write", [under_no_grad, through_data, replaced, one_bit])
def test_all_others_come_back_and_the_next_step_is_right(write, end):
    model = lora_mlp()
    before = frozen(model)
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    optimizer = FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant")
    x, _ = batch()
    model(x).sum().backward()
    owner = model.base_model.model.second.base_layer
    write(owner)
    ends = {
        "step": optimizer.step,
        "restore": optimizer.restore,
        "eval forward": lambda: model.eval()(x),
        "state_dict": model.state_dict,
    }
    with pytest.raises(RuntimeError, match=r"second\.weight was (written to|replaced) while"):
        ends[end]()
        model.train()
        assert write is replaced  # which may only be swapped out for the reader: told if it is not back when W is next used
        model(x)
    model.train()
    assert set(changed(model, before)) <= {NAME}
    assert not optimizer.is_perturbed
    with torch.no_grad():
        owner.weight.copy_(before[NAME])  # reloaded, as the error says
    for _ in range(2):
        model(x).sum().backward()
        assert optimizer.is_perturbed
        assert NAME in changed(model, before)
        optimizer.step()
        assert not changed(model, before)


def test_every_lost_weight_is_named():
    model = lora_mlp()
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.2, schedule="constant")
    before = frozen(model)
    optimizer.perturb()
    under_no_grad(model.base_model.model.first.base_layer)
    through_data(model.base_model.model.head.base_layer)
    with pytest.raises(RuntimeError, match=r"first\.weight.*head\.weight"):
        optimizer.restore()
    assert NAME not in changed(model, before)
    optimizer.restore()


@pytest.mark.parametrize("restore", ["reversible", "subtract"])
@pytest.mark.parametrize("write", [under_no_grad, through_data])
def test_the_noise_after_it_has_the_scale_of_what_was_written(write, restore):
    def wrap(model):
        inner = torch.optim.SGD(trainable(model), lr=0.0)
        return FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant", restore=restore, seed=3)

    model = lora_mlp()
    optimizer, (x, _) = wrap(model), batch()
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    model(x).sum().backward()
    write(model.base_model.model.second.base_layer)
    with pytest.raises(RuntimeError, match="was written to while it was perturbed"):
        optimizer.restore()
    twin = copy.deepcopy(model)
    anew = wrap(twin)
    anew.step_count = optimizer.step_count
    optimizer.perturb(), anew.perturb()
    for one, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(one, other)
