"""accelerate: the wrapper before prepare and after it, accumulation, save_state and load_state."""

import copy

import pytest
import torch
from helpers import batch, changed, frozen, lora_mlp, trainable
from torch import nn

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")

from flatopt import FlatPerturbOptimizer  # noqa: E402


def start(wrapped, accumulation=2):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(3)
    model = lora_mlp()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    options = {"sigma": 0.1, "total_steps": 8}
    data = torch.utils.data.TensorDataset(*batch(rows=40))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    if wrapped == "before prepare":
        optimizer = FlatPerturbOptimizer(optimizer, model, **options)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    flat = optimizer.optimizer
    if wrapped == "after prepare":
        flat = optimizer = FlatPerturbOptimizer(optimizer, model, **options)
    if wrapped == "beside":  # as the callbacks do: nobody calls the wrapper
        flat = FlatPerturbOptimizer(optimizer, model, **options)
    return accelerator, model, optimizer, loader, flat


def epoch(accelerator, model, optimizer, loader):
    seen = []
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            seen.append(model.base_model.model.second.base_layer.weight.detach().clone())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return seen


def test_it_does_not_matter_where_it_is_wrapped():
    runs = []
    for wrapped in ("before prepare", "after prepare", "beside"):
        accelerator, model, optimizer, loader, flat = start(wrapped)
        before = frozen(model)
        seen = epoch(accelerator, model, optimizer, loader) + epoch(accelerator, model, optimizer, loader)
        assert flat.step_count == 6  # windows of 2, 2 and 1, twice
        assert torch.equal(seen[2], seen[3])
        assert not torch.equal(seen[3], seen[4])
        assert changed(model, before) == []
        runs.append([p.detach().clone() for p in trainable(model)])
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run))


@pytest.mark.parametrize("wrapped", ["before prepare", "after prepare"])
def test_save_state_and_load_state_go_on_bit_for_bit(tmp_path, wrapped):
    accelerator, model, optimizer, loader, flat = start(wrapped)
    epoch(accelerator, model, optimizer, loader)
    accelerator.save_state(tmp_path)
    epoch(accelerator, model, optimizer, loader)
    final = copy.deepcopy(model.state_dict())
    accelerator.load_state(tmp_path)
    assert flat.step_count == 3
    epoch(accelerator, model, optimizer, loader)
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())
