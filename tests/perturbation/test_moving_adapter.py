"""The noise has the scale of the merged weight as it is now, at every step: also where the adapter's matrices are copies."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatopt import FlatPerturbOptimizer


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


CASES = [(where, groups, False) for where in ("neither", "base", "adapter", "both") for groups in (1, 2)]
CASES += [("neither", 1, True), ("base", 1, True)]  # DoRA: PEFT's own forward fails on a channels_last adapter, and groups


@pytest.mark.parametrize(("channels_last", "groups", "dora"), CASES)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_an_optimizer_made_now_would_perturb_alike(channels_last, groups, dora):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    if channels_last in ("base", "both"):
        conv = conv.to(memory_format=torch.channels_last)
    model = get_peft_model(
        nn.Sequential(conv), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=dora)
    )
    layer = model.base_model.model[0]
    if channels_last in ("adapter", "both"):
        layer.lora_A.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5)
    options = {"sigma": 0.3, "schedule": "constant"}
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trained(model), lr=3.0), model, **options)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.perturb()
    found = layer.base_layer.weight.detach().clone()
    optimizer.detach()
    now = FlatPerturbOptimizer(torch.optim.SGD(trained(model), lr=0.0), model, **options)
    now.step_count = optimizer.step_count
    now.perturb()
    assert torch.equal(found, layer.base_layer.weight)
