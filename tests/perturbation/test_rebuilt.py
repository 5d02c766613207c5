"""PEFT's LoRA on nn.MultiheadAttention makes its base weight anew in each forward, in other memory than was perturbed."""

import itertools

import pytest
import torch
from helpers import trainable
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model

from flatopt import FlatPerturbOptimizer

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.attend(x, x, x)[0])


def make(**options):
    torch.manual_seed(0)
    model = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["attend", "out"], init_lora_weights=False))
    inner = torch.optim.SGD(trainable(model), lr=0.0)
    return model, FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant", **options)


@torch.no_grad()
def evaluate(model):
    output = model.eval()(X)
    model.train()
    return output


def test_an_evaluation_amid_a_step_is_clean_and_leaves_it_as_it_was():
    model, optimizer = make()
    targets = optimizer.perturb_groups[0]["targets"]
    clean, expected = [target.weight.clone() for target in targets], evaluate(model)
    for _ in range(3):
        loss = model(X).sum()
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)
        assert model(X).sum() == loss  # the second micro-batch has the first one's noise
        loss.backward()
        optimizer.step()
        for target, before in zip(targets, clean):
            torch.testing.assert_close(target.weight, before, rtol=0, atol=1e-6)


CALLS = {
    "train": lambda model, optimizer: model(X).sum().backward(),
    "evaluate": lambda model, optimizer: evaluate(model),
    "state_dict": lambda model, optimizer: model.state_dict(),
    "step": lambda model, optimizer: optimizer.step(),
    "restore": lambda model, optimizer: optimizer.restore(),
}


@pytest.mark.filterwarnings("ignore:FlatPerturbOptimizer.step.. saw no training forward")
@pytest.mark.parametrize("end", ["restore", "step", "detach", "merge_and_unload"])
def test_it_comes_back_from_any_order_of_calls(end):
    for calls in itertools.product(CALLS, repeat=3):
        model, optimizer = make()
        expected = evaluate(model)
        model(X).sum().backward()
        for call in calls:
            CALLS[call](model, optimizer)
        model = model.merge_and_unload() if end == "merge_and_unload" else getattr(optimizer, end)() or model
        torch.testing.assert_close(evaluate(model), expected, rtol=0, atol=1e-4, msg=f"{calls}, {end}")
        optimizer.detach()
