"""Training by ways that no root encloses: an inner model's method, and adapters whose base layer is elsewhere."""

import pytest
import torch
from helpers import bits, changed, frozen, lora_mlp, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer, register_low_rank


def flat(parameters, targets):
    return FlatPerturbOptimizer(torch.optim.SGD(parameters, lr=0.1), targets, sigma=0.2, schedule="constant")


def test_backward_finds_its_weights_again_after_a_reader():
    """A reader between forward and backward: the backward starts at the last layer, not at the one that opened the step."""
    pytest.importorskip("peft")
    grads = []
    for reads in (False, True):
        torch.manual_seed(3)
        model = lora_mlp()
        before, optimizer = frozen(model), flat(trainable(model), model)
        inner, x = model.base_model.model, torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
        part = nn.Sequential(inner.first, nn.ReLU(), inner.second, nn.ReLU(), inner.head)
        loss = part(x).square().mean()
        if reads:
            with torch.no_grad():
                part(x)
            assert changed(model, before) == []
        loss.backward()
        assert changed(model, before)
        grads.append([p.grad for p in trainable(model) if p.grad is not None])
        optimizer.step()
        assert changed(model, before) == []
    assert all(torch.equal(x, y) for x, y in zip(*grads))


class Takes(nn.Module):
    """Takes over the forward of a layer that it does not hold, as kohya's LoRAModule does."""

    def __init__(self, layer):
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(layer.out_features, 2)),
            nn.Parameter(torch.randn(2, layer.in_features)),
        )
        self.taken = layer.forward
        layer.forward = self.forward

    def forward(self, x):
        return self.taken(x) + x @ self.down.t() @ self.up.t()


register_low_rank(Takes, base=lambda m: (m.taken.__self__, "weight"), delta=lambda m: (m.up, m.down, 1.0))


def test_adapters_that_take_over_a_forward_elsewhere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
    clean = [bits(model[i].weight).clone() for i in (0, 2)]
    network = nn.ModuleList([Takes(model[0]), Takes(model[2])])
    optimizer = flat(network.parameters(), [{"modules": network}])

    def is_clean():
        return [torch.equal(bits(model[i].weight), w) for i, w in zip((0, 2), clean)]

    for _ in range(2):
        loss = model(torch.randn(4, 8)).square().mean()
        assert is_clean() == [False, False]
        with torch.no_grad():
            model(torch.randn(4, 8))
        assert is_clean() == [True, True]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert is_clean() == [True, True]
    assert optimizer.step_count == 2
