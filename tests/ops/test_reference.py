"""The library beside its reference twin: the same standard deviations, and from the same normals the same bits."""

import peft
import pytest
import torch
from made_weights import weight_view
from torch import nn

from flatopt import FlatPerturbOptimizer
from flatopt.core.weight import WeightUpdate
from flatopt.ops import normals, reference, reversible, step_key, sub_key
from flatopt.ops.norms import standard_deviations

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS, SIGMA, SEED = 120, 0.1, 11


def lora_regression(dtype):
    """Two LoRA layers that learn a random linear map, with base weights in ``dtype``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 17), nn.Tanh(), nn.Linear(17, 4)).to(dtype)
    model = peft.get_peft_model(net, peft.LoraConfig(r=3, target_modules=["0", "2"], lora_alpha=6))
    with torch.no_grad():
        net[0].base_layer.weight[3] *= 30  # rows in different binades
        net[0].base_layer.weight[5] *= 1e-3
    x = torch.randn(16, 30)
    return model, x, x @ torch.randn(30, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_run_side_by_side(dtype):
    model, x, y = lora_regression(dtype)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    clean = [layer.base_layer.weight.clone() for layer in layers]
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = FlatPerturbOptimizer(torch.optim.AdamW(adapters, lr=0.01), model, sigma=SIGMA, total_steps=STEPS, seed=SEED)
    moved = total = 0
    for step in range(STEPS):
        sigma = SIGMA * 0.5 * (1 - torch.cos(torch.tensor(torch.pi * step / STEPS, dtype=torch.float64))).item()
        expected = []
        for index, (layer, weight) in enumerate(zip(layers, clean)):
            if step == 0:
                expected.append(weight)  # the cosine schedule starts at 0
                continue
            A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            view = weight_view(weight, WeightUpdate(((B, A, layer.scaling["default"]),)))
            (found,) = standard_deviations([view], "filter", sigma, [view])
            std = reference.standard_deviation(weight, layer.get_delta_weight("default"), sigma)
            torch.testing.assert_close(found.double(), std, rtol=2e-5, atol=0)
            torch.testing.assert_close(
                reversible.grid(found, sigma, dtype).step.double(), reference.grid_step(found, sigma, dtype)
            )
            z = normals(sub_key(step_key(SEED, step, 0), index + 1), *weight.shape)
            expected.append(reference.toggled(weight, *reversible.grid(found, sigma, dtype), z))
        loss = nn.functional.mse_loss(model(x.to(dtype)).float(), y)
        for layer, weight, want in zip(layers, clean, expected):
            got = layer.base_layer.weight
            assert torch.equal(got, want), f"step {step}"
            moved, total = moved + (got != weight).sum().item(), total + weight.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, weight in zip(layers, clean):
            assert torch.equal(layer.base_layer.weight, weight), f"step {step}"
    assert moved / total > 0.5  # it was noise that was compared


@pytest.mark.parametrize("rho", [0.01, 0.05, 0.2, 0.6, 1.0, 2.3, 7.0, 40.0])
def test_rounding_offset_keeps_the_power(rho):
    """Against numerical integration over the half normal; the library's table against the twin's bisection."""
    cell = (torch.arange(4_000_000, dtype=torch.float64) + 0.5) / 4_000_000
    z = torch.special.ndtri(0.5 + cell / 2)
    delta = reference.rounding_offset(rho)
    power = torch.floor(rho * z + delta).clamp_min(0).square().mean().item()
    assert power == pytest.approx(rho**2, rel=2e-3)
    sigma, dtype = 0.05, torch.bfloat16
    step = 2.0 ** (torch.tensor(sigma).log2().floor().item())
    grid = reversible.grid(torch.tensor([[rho * step]]), sigma, dtype)
    rho_there = grid.rho.item()
    assert grid.delta.item() == pytest.approx(reference.rounding_offset(rho_there), abs=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_twin_is_an_involution_too(dtype):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(64, 200, generator=generator) * 10 ** torch.linspace(-4, 1, 64).unsqueeze(1)).to(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    z = torch.randn(64, 200, generator=generator)
    std = reference.standard_deviation(weight.nan_to_num(0, 0, 0), torch.zeros(64, 200), 0.1).float()
    grid = reversible.grid(std, 0.1, dtype)
    there = reference.toggled(weight, *grid, z)
    back = reference.toggled(there, *grid, z)
    bits = reversible.BITS[dtype]
    assert torch.equal(back.view(bits), weight.view(bits))
    assert (there.view(bits) != weight.view(bits)).double().mean() > 0.8
