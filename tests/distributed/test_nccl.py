"""DDP and FSDP2 on two GPUs with NCCL, through the kernels: noise, clean weights for readers, and W back bit for bit."""

import pytest
import torch
import torch.distributed.fsdp
from helpers import batch, lora_mlp, trainable
from ranks import on_ranks
from torch import distributed as dist
from torch import nn

from flatopt import FlatPerturbOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(600),
]
STEPS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def weights(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {n.removeprefix("module."): whole(p) for n, p in model.named_parameters() if not p.requires_grad}


def run(rank, kind, dtype, reads, device):
    """Per step W between backward and step; what readers amid it found; the adapters at the end. ``alone``: one process."""
    torch.manual_seed(0)
    model = lora_mlp(dtype).to(device)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        mesh = dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),))
        for part in (model.base_model.model.first, model.base_model.model.second, model):
            torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(trainable(model), lr=0.01, momentum=0.9)
    shared = kind != "ddp"
    optimizer = FlatPerturbOptimizer(optimizer, model, sigma=0.3, schedule="constant", seed=4, shared=shared)
    clean, perturbed, read = weights(model), [], []
    for step in range(STEPS):
        for micro in range(2):
            x, y = (t.to(device) for t in batch(dtype=dtype, seed=10 * step + micro))
            nn.functional.cross_entropy(model(x), y).backward()
            if reads and micro == 0:
                with torch.no_grad():
                    model.eval()(x)
                model.train()
                read.append([name for name, weight in weights(model).items() if not torch.equal(weight, clean[name])])
        perturbed.append(weights(model))
        optimizer.step()
        optimizer.zero_grad()
        now = weights(model)
        assert all(torch.equal(now[name], clean[name]) for name in clean), "W did not come back"
    return {"clean": clean, "perturbed": perturbed, "read": read, "adapter": [whole(p) for p in trainable(model)]}


def work(rank, device):
    return {
        (kind, name, reads): run(rank, kind, dtype, reads, device)
        for kind in ("alone", "ddp", "fsdp2")
        for name, dtype in DTYPES.items()
        for reads in (False, True)
    }


@pytest.fixture(scope="module")
def on_two_gpus(tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), work, "cuda", backend="nccl")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_gpus(on_two_gpus, kind, dtype):
    mine, others = (each[kind, dtype, False] for each in on_two_gpus)
    alone = on_two_gpus[0]["alone", dtype, False]
    bases = [name for name in mine["clean"] if name.endswith("base_layer.weight")]
    assert len(bases) == 3
    for step in range(STEPS):
        for name in bases:
            here, there = mine["perturbed"][step][name], others["perturbed"][step][name]
            assert not torch.equal(here, mine["clean"][name])
            assert torch.equal(here, there) == (kind == "fsdp2")  # each data-parallel rank draws its own
            if kind == "fsdp2" and step == 0:  # the noise of a row does not depend on who holds it
                assert (here == alone["perturbed"][0][name]).double().mean() > 0.98
    assert all(torch.equal(x, y) for x, y in zip(mine["adapter"], others["adapter"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_readers_amid_a_step_change_nothing(on_two_gpus, kind, dtype):
    for each in on_two_gpus:
        plain, reading = each[kind, dtype, False], each[kind, dtype, True]
        assert reading["read"] == [[]] * STEPS
        assert all(torch.equal(x, y) for x, y in zip(plain["adapter"], reading["adapter"]))
