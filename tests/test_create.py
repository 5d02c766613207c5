"""create_flat_optimizer, and timm's factory beside it."""

import pytest
import torch
from helpers import Mlp, batch, frozen, lora_mlp, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer, create_flat_optimizer


def train(model, optimizer, steps=4):
    for step in range(steps):
        x, y = batch(seed=step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trainable(model)]


def model():
    torch.manual_seed(3)
    return lora_mlp()


def test_it_equals_the_two_lines_it_replaces():
    ours, theirs = model(), model()
    options = {"weight_decay": 0.1, "betas": (0.8, 0.9)}
    flat = {"sigma": 0.2, "seed": 7, "total_steps": 4, "noise": "layer", "restore": "copy", "schedule": "linear"}
    optimizer = create_flat_optimizer(ours, torch.optim.AdamW, lr=1e-2, **flat, **options)
    assert isinstance(optimizer, FlatPerturbOptimizer)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trainable(ours)}
    bare = torch.optim.AdamW(trainable(theirs), lr=1e-2, **options)
    expected = train(theirs, FlatPerturbOptimizer(bare, theirs, **flat))
    assert all(torch.equal(x, y) for x, y in zip(train(ours, optimizer), expected))


def test_a_model_with_nothing_to_train_or_to_perturb_is_refused():
    closed = model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter.*is_trainable=True"):
        create_flat_optimizer(closed, torch.optim.AdamW, lr=1e-2, total_steps=4)
    with pytest.raises(ValueError, match="no low-rank module"):
        create_flat_optimizer(Mlp(), torch.optim.AdamW, lr=1e-2, total_steps=4)
    with pytest.raises(TypeError, match=r"must be a class, such as torch\.optim\.AdamW, got 'adamw'"):
        create_flat_optimizer(model(), "adamw", lr=1e-2, total_steps=4)


def test_arguments_that_are_no_model_and_no_class_are_told():
    for wrong in (model().parameters(), torch.optim.AdamW):  # the latter: the two changed places
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got"):
            create_flat_optimizer(wrong, torch.optim.AdamW, lr=1e-2, total_steps=4)
    with pytest.raises(TypeError, match=r"must be a class, such as torch\.optim\.AdamW, got None"):
        create_flat_optimizer(model(), None, lr=1e-2, total_steps=4)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lookahead_adamw"])
def test_timms_optimizers(name):
    timm = pytest.importorskip("timm.optim")
    network = model()
    before, start = frozen(network), [p.detach().clone() for p in trainable(network)]
    bare = timm.create_optimizer_v2(network, opt=name, lr=1e-2)
    optimizer = FlatPerturbOptimizer(bare, network, sigma=0.2, schedule="constant")
    seen = []
    layer = network.base_model.model.second.base_layer
    layer.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().clone()))
    end = train(network, optimizer)
    assert not any(torch.equal(w, layer.weight) for w in seen)
    assert all(torch.equal(p, before[n]) for n, p in network.named_parameters() if n in before)
    assert not all(torch.equal(x, y) for x, y in zip(start, end))
    assert optimizer.step_count == 4
