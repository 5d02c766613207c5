"""A run stopped and resumed on 1, 2, then 4 ranks (FSDP2) goes on with the same noise: it is keyed by global row."""

import pytest
import torch
import torch.distributed.fsdp
from helpers import batch, trainable
from ranks import USABLE, on_ranks
from torch import distributed as dist
from torch import nn

from flatopt import FlatPerturbOptimizer, register_low_rank

FSDP2 = hasattr(torch.distributed.fsdp, "fully_shard")  # public from torch 2.6 on
pytestmark = [pytest.mark.skipif(not (USABLE and FSDP2), reason="needs gloo and FSDP2"), pytest.mark.timeout(600)]
STEPS, SIGMA = 2, 0.3  # steps on each number of ranks
RESTORES = ["copy", "reversible"]


class LoRA(nn.Module):
    """Not PEFT's, which takes longer to import, seven times, than all else here."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs).requires_grad_(False)
        self.up, self.down = nn.Parameter(torch.randn(outputs, 4) / 8), nn.Parameter(torch.randn(4, inputs) / 8)

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def bases(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {n: whole(p) for n, p in model.named_parameters() if n.endswith("linear.weight")}


def train(checkpoint, world, first, steps, restore):
    """The noise of each step, from step ``first`` on; begins from the checkpoint, except at step 0, and leaves one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    register_low_rank(LoRA, base=lambda m: m.linear.weight, delta=lambda m: (m.up, m.down, 1.0))
    model = nn.Sequential(LoRA(16, 32), nn.ReLU(), LoRA(32, 32), nn.ReLU(), nn.Linear(32, 8).requires_grad_(False))
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(trainable(model), lr=0.01, momentum=0.9)
    options = {"sigma": SIGMA, "total_steps": 3 * STEPS, "schedule": "linear", "restore": restore, "shared": True}
    optimizer = FlatPerturbOptimizer(optimizer, model, seed=4 if first == 0 else 99, **options)
    states = get_state_dict(model, optimizer)
    if first:
        dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{checkpoint}/{first}")
        set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    clean, noise = bases(model), []
    for step in range(first, first + steps):
        x, y = batch(rows=8, seed=step)
        nn.functional.cross_entropy(model(x), y).backward()
        noise.append({name: weight - clean[name] for name, weight in bases(model).items()})
        optimizer.step()
        optimizer.zero_grad()
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{checkpoint}/{first + steps}")
    return noise


def work(rank, folder, world, first):
    noise = {restore: train(f"{folder}/moving {restore}", world, first, STEPS, restore) for restore in RESTORES}
    if world == 1:
        never_stopped = {restore: train(f"{folder}/staying {restore}", 1, 0, 3 * STEPS, restore) for restore in RESTORES}
        return noise, never_stopped
    return noise, None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The noise of the run that moves to more and more ranks, and of one that stays on one."""
    folder, moving, staying = tmp_path_factory.mktemp("checkpoints"), {restore: [] for restore in RESTORES}, None
    for number, world in enumerate((1, 2, 4)):
        ranks = on_ranks(tmp_path_factory.mktemp("ranks"), work, str(folder), world, number * STEPS, world=world)
        noise, never_stopped = ranks[0]
        staying = never_stopped or staying
        for restore in RESTORES:
            assert all(same(*steps) for each, _ in ranks for steps in zip(each[restore], noise[restore]))
            moving[restore] += noise[restore]
    return moving, staying


def same(some, others):
    """All but a rare element: a row's norm may be rounded otherwise in a matrix of other height."""
    assert some.keys() == others.keys()
    close = [torch.isclose(some[name], others[name], rtol=1e-4, atol=1e-7).double().mean() for name in some]
    return all(part > 0.995 for part in close)


@pytest.mark.parametrize("restore", RESTORES)
def test_a_run_resumed_on_more_ranks_goes_on_with_the_same_noise(runs, restore):
    moving, staying = runs
    assert len(moving[restore]) == len(staying[restore]) == 3 * STEPS
    for step, (here, there) in enumerate(zip(moving[restore], staying[restore])):
        assert same(here, there), f"step {step}"
        assert all(noise.any() == (step > 0) for noise in here.values())  # the schedule starts at 0
        assert not step or not same(here, moving[restore][step - 1])
