"""The real FSDP1, DeepSpeed and tensor parallelism on two ranks: what leaves no rows on a rank is refused by its name."""

import contextlib
import importlib.util

import pytest
import torch
from helpers import batch, lora_mlp, trainable
from ranks import USABLE, shared_by_all_tests
from torch import distributed as dist
from torch import nn

from flatopt import FlatPerturbOptimizer

pytestmark = pytest.mark.skipif(not USABLE, reason="needs torch.distributed with gloo")
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
DTENSOR = importlib.util.find_spec("torch.distributed.tensor.placement_types") is not None
STEPS = 2


def make(model, optimizer=None, targets=None):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    targets = model if targets is None else targets
    return FlatPerturbOptimizer(optimizer, targets, sigma=0.1, schedule="constant", shared=True)


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def loss_of(model, step):
    x, y = batch(seed=step)
    return nn.functional.cross_entropy(model(x), y)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(called, model, optimizer=None, backward=torch.Tensor.backward, step=None, targets=None):
    """The layers whose base weight each forward found perturbed, those that did not come back, and the steps counted."""
    flat = make(model, optimizer, targets)
    layers = {n.split(".")[-1]: m.base_layer for n, m in model.named_modules() if hasattr(m, "base_layer")}
    clean = {name: whole(layer.weight) for name, layer in layers.items()}

    def moved():
        return [name for name, layer in layers.items() if not torch.equal(whole(layer.weight), clean[name])]

    noisy = []
    for i in range(STEPS):
        loss = loss_of(called, i)
        noisy.append(moved())
        backward(loss)
        (step or flat.step)()
        flat.zero_grad()
    return noisy, moved(), flat.step_count


# --- FSDP1 -----------------------------------------------------------------------------------------------------------


def fsdp1(keeps_parameters):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def wrap(model):
        # one dtype and no mix of frozen and trainable parameters in a unit, without the originals
        policy = None if keeps_parameters else lambda module, recurse, **_: recurse or isinstance(module, nn.Linear)
        return FSDP(model, use_orig_params=keeps_parameters, auto_wrap_policy=policy, device_id=torch.device("cpu"))

    after = lora_mlp()
    wrapped = wrap(after)
    told = {"after": refusal(lambda: make(wrapped)), "after, given the inner module": refusal(lambda: make(after))}
    before = lora_mlp()
    optimizer = torch.optim.AdamW(trainable(before), lr=1e-2)
    with make(before, optimizer):
        wrapped = wrap(before)
        told["before"] = refusal(lambda: loss_of(wrapped, 0))
    return told


def ignored_by_fsdp1():
    """The way out that the refusal names: base layers in ``ignored_states``."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = lora_mlp()
    bases = [p for p in model.parameters() if not p.requires_grad]
    wrapped = FSDP(model, use_orig_params=True, ignored_states=bases, device_id=torch.device("cpu"))
    return train(wrapped, model)


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def engine(model, stage, optimizer):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled: gloo is fast enough here
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def adamw(model):
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def zero_3(initialised):
    """``zero.Init`` splits the weights as they are made, ``deepspeed.initialize`` those that are there."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 3}}
    told = {}
    with deepspeed.zero.Init(config_dict_or_path=config) if initialised else contextlib.nullcontext():
        model = lora_mlp()
    if initialised:
        told["before initialize"] = refusal(lambda: make(model))
    optimizer = adamw(model)
    run = engine(model, 3, optimizer)
    told["after initialize"] = refusal(lambda: make(run, optimizer))
    told["the inner module"] = refusal(lambda: make(run.module, optimizer))
    if not initialised:
        model = lora_mlp()
        flat = make(model)
        with flat:
            run = engine(model, 3, flat.optimizer)
            told["made before, at the first forward"] = refusal(lambda: loss_of(run, 0))
    return told


def zero(stage):
    """The frozen base is whole on each rank; the engine steps the optimizer."""
    model = lora_mlp()
    optimizer = adamw(model)
    run = engine(model, stage, optimizer)
    return train(run, model, optimizer, run.backward, run.step)


# --- tensor parallelism ----------------------------------------------------------------------------------------------


def tensor_parallel(inputs_too):
    """torch's own, on base layers: ``first`` split along its outputs, ``second`` along its inputs."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = lora_mlp(target_modules=["first", "second"])
    plan = {"first": ColwiseParallel(output_layouts=Replicate())}
    if inputs_too:
        plan["second"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {f"base_model.model.{name}.base_layer": style for name, style in plan.items()})
    return model


def along_inputs():
    model = tensor_parallel(inputs_too=True)
    told = {"all": refusal(lambda: make(model))}
    return told, train(model, model, targets=[{"modules": model.base_model.model.first}])


def along_outputs():
    model = tensor_parallel(inputs_too=False)
    return train(model, model)


def replicated(adapted):
    """The noise of two steps on ``head``, which each rank has whole, beside ``first``, which is split."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = lora_mlp(target_modules=adapted)
    first = model.base_model.model.first
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parallelize_module(getattr(first, "base_layer", first), mesh, ColwiseParallel(output_layouts=Replicate()))
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    optimizer = FlatPerturbOptimizer(optimizer, model, sigma=0.1, schedule="constant")
    weight, noise = model.base_model.model.head.base_layer.weight, []
    clean = weight.detach().clone()
    for step in range(STEPS):
        loss_of(model, step).backward()
        noise.append(weight.detach() - clean)
        optimizer.step()
    return noise


JOBS = {
    "fsdp1, parameters kept": (fsdp1, True),
    "fsdp1, flat parameters": (fsdp1, False),
    "fsdp1, bases ignored": (ignored_by_fsdp1,),
    "tensor parallel, inputs": (along_inputs,),
    "tensor parallel, outputs": (along_outputs,),
    "tensor parallel, the split one too": (replicated, ["first", "head"]),
    "tensor parallel, a whole one alone": (replicated, ["head"]),
    "zero 1": (zero, 1),
    "zero 2": (zero, 2),
    "zero 3": (zero_3, False),
    "zero 3, zero.Init": (zero_3, True),
}


def work(rank):
    results = {}
    for name, (job, *args) in JOBS.items():
        if (DEEPSPEED or not name.startswith("zero")) and (DTENSOR or not name.startswith("tensor")):
            torch.manual_seed(0)
            results[name] = job(*args)
    return results


on_two_ranks = shared_by_all_tests(work, "needs deepspeed, or torch.distributed.tensor (public from torch 2.5 on)")


@pytest.mark.parametrize("job", ["fsdp1, parameters kept", "fsdp1, flat parameters", "zero 3", "zero 3, zero.Init"])
def test_flat_shards_are_refused_by_name(on_two_ranks, job):
    name, way_out = ("FSDP1", "FSDP2") if "fsdp1" in job else ("ZeRO-3", "ZeRO-2")
    for told in on_two_ranks(job):
        for when, message in told.items():
            assert message is not None, when
            assert "base_model.model.first.weight cannot be perturbed" in message, when
            assert name in message, when
            assert way_out in message, when


@pytest.mark.parametrize("job", ["fsdp1, bases ignored", "zero 1", "zero 2"])
def test_the_ways_out_work(on_two_ranks, job):
    for noisy, left, count in on_two_ranks(job):
        assert noisy == [["first", "second", "head"]] * STEPS
        assert left == []
        assert count == STEPS


def test_tensor_parallelism_along_inputs_is_refused_and_may_be_left_out(on_two_ranks):
    for told, (noisy, left, count) in on_two_ranks("tensor parallel, inputs"):
        assert "base_model.model.second.weight is sharded along its inputs (tensor parallelism" in told["all"]
        assert "leave it out with [{'modules': [...]}]" in told["all"]
        assert (noisy, left, count) == ([["first"]] * STEPS, [], STEPS)


def test_tensor_parallelism_along_outputs_works(on_two_ranks):
    for noisy, left, count in on_two_ranks("tensor parallel, outputs"):
        assert (noisy, left, count) == ([["first", "second"]] * STEPS, [], STEPS)


@pytest.mark.parametrize("adapted", ["the split one too", "a whole one alone"])
def test_the_ranks_of_one_forward_have_one_noise_on_a_whole_weight(on_two_ranks, adapted):
    mine, others = on_two_ranks(f"tensor parallel, {adapted}")
    for here, there in zip(mine, others):
        assert here.any()
        assert torch.equal(here, there)
    assert not torch.equal(mine[0], mine[1])
