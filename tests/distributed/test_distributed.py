"""Two processes on CPU: DDP with each rank's own ε or a shared one, and FSDP2, where a rank perturbs its own rows."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed.fsdp
from helpers import batch, frozen, lora_mlp, trainable
from ranks import USABLE, shared_by_all_tests
from torch import distributed as dist
from torch import nn

from flatopt import FlatPerturbOptimizer

pytestmark = pytest.mark.skipif(not USABLE, reason="needs torch.distributed with gloo")
SIGMA, STEPS = 0.3, 4


def work(rank):
    fsdp2 = hasattr(torch.distributed.fsdp, "fully_shard")  # public from torch 2.6 on
    return {job: run(rank) for job, run in JOBS.items() if fsdp2 or not job.startswith("fsdp")}


on_two_ranks = shared_by_all_tests(work, "FSDP2 is public from torch 2.6 on")


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def make(model, **options):
    optimizer = torch.optim.SGD(trainable(model), lr=0.01, momentum=0.9)
    return FlatPerturbOptimizer(optimizer, model, **{"sigma": SIGMA, "schedule": "constant", "seed": 4, **options})


def loss_of(model, seed):
    x, y = batch(seed=seed)
    return nn.functional.cross_entropy(model(x), y)


# --- DDP -------------------------------------------------------------------------------------------------------------


def ddp_run(rank, shared, accumulation):
    """Per step this rank's perturbed weights and averaged gradients; at the end the adapters."""
    torch.manual_seed(0)
    model = lora_mlp()
    model = nn.parallel.DistributedDataParallel(model)
    optimizer = make(model, shared=shared)
    clean = frozen(model)
    weights, gradients = [], []
    for step in range(STEPS):
        for micro in range(accumulation):
            with model.no_sync() if micro < accumulation - 1 else torch.enable_grad():
                (loss_of(model, 100 * step + 10 * micro + rank) / accumulation).backward()
        weights.append({name.removeprefix("module."): value for name, value in frozen(model).items()})
        gradients.append([p.grad.clone() for p in trainable(model)])
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in clean.items())
        with torch.no_grad():
            model.eval()(batch()[0])
        model.train()
    return weights, gradients, [p.detach() for p in trainable(model)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp(on_two_ranks, shared, accumulation):
    mine, others = on_two_ranks(f"ddp {shared} {accumulation}")
    (weights, gradients, adapters), (other_weights, other_gradients, other_adapters) = mine, others
    torch.manual_seed(0)
    reference = lora_mlp()
    plain = torch.optim.SGD(trainable(reference), lr=0.01, momentum=0.9)
    for step in range(STEPS):
        for name, weight in weights[step].items():
            if weight.dim() == 2:
                assert torch.equal(weight, other_weights[step][name]) == shared, name
        assert all(torch.equal(x, y) for x, y in zip(gradients[step], other_gradients[step]))
        # the average of the gradients that one process computes at the two ranks' weights
        expected = []
        for rank, here in enumerate((weights[step], other_weights[step])):
            twin = copy.deepcopy(reference)
            twin.load_state_dict(here, strict=False)
            for micro in range(accumulation):
                (loss_of(twin, 100 * step + 10 * micro + rank) / accumulation).backward()
            expected.append([p.grad for p in trainable(twin)])
        for p, got, first, second in zip(trainable(reference), gradients[step], *expected):
            torch.testing.assert_close(got, (first + second) / 2)
            p.grad = got
        plain.step()
    assert all(torch.equal(x, y) for x, y in zip(adapters, other_adapters))
    assert all(torch.equal(x, y) for x, y in zip(adapters, trainable(reference)))


def noise_of_a_rank(rank, shared):
    model = lora_mlp(torch.float32)
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(256, 512), requires_grad=False)
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1), [{"params": [weight]}], schedule="constant", shared=shared, restore="copy"
    )
    clean = weight.detach().clone()
    with optimizer.perturbed():
        return weight.detach() - clean


def test_the_ranks_noise_is_independent(on_two_ranks):
    first, second = on_two_ranks("noise False")
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1].item()
    assert abs(correlation) < 4.9 / first.numel() ** 0.5  # one in a million


def test_rank_0_draws_what_one_process_draws(on_two_ranks):
    first, second = on_two_ranks("noise True")
    assert torch.equal(first, second)
    assert torch.equal(first, noise_of_a_rank(0, True))


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def sharded(model, **options):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for part in (model.base_model.model.first, model.base_model.model.second):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def all_full(model):
    return {name: full(p) for name, p in model.named_parameters()}


def fsdp_run(rank, config, dtype, options):
    """Per step the perturbed weights and the gradients, gathered; W after it; the std that Eq. 7 wants."""
    torch.manual_seed(0)
    model = sharded(lora_mlp(dtype, **config))
    optimizer = make(model, **options)
    clean = all_full(model)
    steps = []
    for step in range(STEPS):
        before = all_full(model)
        if step % 2 == 0:  # an evaluation leaves the root's weights gathered, before the first step too
            with torch.no_grad():
                model.eval()(batch(dtype=dtype)[0])
            model.train()
        for micro in range(2):
            x, y = batch(dtype=dtype, seed=10 * step + micro)  # the same on both ranks: gradients of one process
            nn.functional.cross_entropy(model(x), y).backward()
            if micro == 0:
                with torch.no_grad():  # clean weights for this one, and perturbed ones again for the next
                    model(x)
        assert optimizer.is_perturbed
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        perturbed = all_full(model)
        gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        after = all_full(model)
        assert all(torch.equal(after[name], clean[name]) for name in frozen(model)), "W did not come back"
        steps.append((before, perturbed, gradients))
    return steps, optimizer.param_groups[0]["flatopt_step"]


FSDP_RUNS = {
    "reversible fp32": ({}, torch.float32, {}),
    "reversible bf16": ({}, torch.bfloat16, {}),
    "reversible fp16": ({"target_modules": ["first", "second"]}, torch.float16, {}),
    "shared copy": ({}, torch.float32, {"shared": True, "restore": "copy"}),
    "layer": ({}, torch.float32, {"noise": "layer", "restore": "copy"}),
    "isotropic": ({}, torch.float32, {"noise": "isotropic", "restore": "copy"}),
    "dora": ({"use_dora": True}, torch.float32, {"restore": "copy"}),
}


@pytest.mark.parametrize("name", FSDP_RUNS)
def test_fsdp2(on_two_ranks, name):
    """Bit for bit back, one ε over a window, gradients as one process has them at the same weights, std of Eq. 7."""
    config, dtype, options = FSDP_RUNS[name]
    (steps, count), (others, _) = on_two_ranks(f"fsdp {name}")
    assert count == STEPS
    torch.manual_seed(0)
    twin = lora_mlp(dtype, **config)
    bases = {n for n in frozen(twin) if n.endswith("weight") and n.split(".")[2] in config.get("target_modules", n)}
    squares = []
    for step, (before, perturbed, gradients) in enumerate(steps):
        assert all(torch.equal(perturbed[name], others[step][1][name]) for name in perturbed)
        assert {name for name in before if not torch.equal(before[name], perturbed[name])} == bases
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(perturbed[name])
        twin.zero_grad()
        for micro in range(2):
            x, y = batch(dtype=dtype, seed=10 * step + micro)
            nn.functional.cross_entropy(twin(x), y).backward()
        close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
        for name, p in twin.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(gradients[name], p.grad, **close)
        if options.get("restore") != "copy":
            continue
        standard = standard_deviations(before, twin, bases, options.get("noise", "filter"))
        for name in bases:
            z = (perturbed[name] - before[name]).double() / (SIGMA * standard[name])
            top, bottom = z.chunk(2)
            squares += [top.square().sum(1), bottom.square().sum(1)]
            assert not torch.equal(top[: len(bottom)], bottom)  # the ranks' rows do not share noise, even with shared=True
            if len(top) == 16:
                assert abs(torch.corrcoef(torch.stack([top.flatten(), bottom.flatten()]))[0, 1]) < 4.9 / top.numel() ** 0.5
    if squares:
        total, elements = torch.cat(squares).sum().item(), sum(steps[0][0][name].numel() for name in bases) * STEPS
        assert abs(total / elements - 1) < 4.9 * (2 / elements) ** 0.5


def standard_deviations(weights, model, bases, noise):
    """Of each base weight, for sigma 1: Eq. 7 and its two relatives, on the gathered weights."""
    merged = {}
    for name in bases:
        prefix = name.removesuffix(".base_layer.weight")
        B, A = weights[f"{prefix}.lora_B.default.weight"], weights[f"{prefix}.lora_A.default.weight"]
        layer = model.get_submodule(prefix)
        merged[name] = weights[name].double() + layer.scaling["default"] * (B @ A).double()
        magnitude = weights.get(f"{prefix}.lora_magnitude_vector.default.weight")
        if magnitude is not None:
            merged[name] *= (magnitude / merged[name].norm(dim=1)).unsqueeze(1)
    everything = torch.cat([w.flatten() for w in merged.values()]).square().mean().sqrt()
    return {
        name: {
            "filter": w.square().mean(1, keepdim=True).sqrt(),
            "layer": w.square().mean().sqrt(),
            "isotropic": everything,
        }[noise]
        for name, w in merged.items()
    }


def fsdp_communication(rank):
    """How many collectives perturb and restore call."""
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(0)
    optimizer = make(sharded(lora_mlp()))
    with CommDebugMode() as perturbing:
        optimizer.perturb()
    with CommDebugMode() as restoring:
        optimizer.restore()
    counts = {str(name).split(".")[1]: count for name, count in perturbing.get_comm_counts().items() if count}
    return counts, restoring.get_total_counts()


def test_perturb_gathers_all_a_factors_at_once_and_sends_nothing_else(on_two_ranks):
    assert on_two_ranks("fsdp communication") == [({"_allgather_base_": 1}, 0)] * 2


def fsdp_exception(rank):
    """An exception between forward and backward, while the root's weights are gathered."""
    torch.manual_seed(0)
    model = sharded(lora_mlp(), reshard_after_forward=False)
    optimizer = make(model)
    clean = all_full(model)
    kept = []
    for fails in (True, False, True, False):
        loss = loss_of(model, 0)
        if fails:
            optimizer.restore()
            kept.append(all_full(model))
            optimizer.zero_grad()
            continue
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(all_full(model))
    names = frozen(model)
    return all(torch.equal(state[name], clean[name]) for state in kept for name in names)


def test_fsdp2_restores_while_weights_are_gathered(on_two_ranks):
    assert on_two_ranks("fsdp exception") == [True, True]


def fsdp_conv1d(rank):
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard
    from transformers.pytorch_utils import Conv1D

    model = get_peft_model(nn.Sequential(Conv1D(8, 4)), LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    try:
        make(model)
    except ValueError as error:
        return str(error)


def test_weights_sharded_along_their_inputs_raise(on_two_ranks):
    for message in on_two_ranks("fsdp conv1d"):
        assert "model.0.weight is sharded along its inputs" in message
        assert "leave it out" in message


def fsdp_resume(rank):
    """Through torch.distributed.checkpoint, into new objects."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def build(seed):
        torch.manual_seed(0)
        model = sharded(lora_mlp())
        return model, make(model, seed=seed)

    def train(model, optimizer, steps):
        for step in steps:
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build(4)
    train(model, optimizer, range(2))
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id="dcp")
    train(model, optimizer, range(2, 5))
    resumed, other = build(77)
    states = get_state_dict(resumed, other)
    dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id="dcp")
    set_state_dict(resumed, other, model_state_dict=states[0], optim_state_dict=states[1])
    train(resumed, other, range(2, 5))
    first, second = all_full(model), all_full(resumed)
    return other.param_groups[0]["flatopt_seed"], all(torch.equal(first[name], second[name]) for name in first)


def test_fsdp2_resumes_bit_for_bit(on_two_ranks):
    assert on_two_ranks("fsdp resume") == [(4, True), (4, True)]


READS = ("first", "before backward", "before the step", "before both")


def fsdp_reads(rank, options, when):
    """Gradients and adapters of a run, without readers and with one here and there; whether readers found W clean."""
    torch.manual_seed(0)
    model = lora_mlp()
    reference = copy.deepcopy(model).eval()
    optimizer = make(model) if when == "wrapped first" else None
    names = {id(p): name for name, p in model.named_parameters()}
    sharded(model, **options)
    if optimizer is None:
        optimizer = make(model)
    else:  # as accelerate does: the optimizer gets the shards of its parameters
        shards = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [shards[names[id(p)]] for p in group["params"]]
    clean, start, runs = all_full(model), copy.deepcopy(model.state_dict()), {}
    for where in ("never", *READS):
        model.load_state_dict(start)
        optimizer.state.clear()
        optimizer.step_count, seen, gradients = 0, [], []

        def read(now, where=where, seen=seen):
            if now == where or (where == "before both" and now != "first"):
                with torch.no_grad():
                    found = model.eval()(batch()[0])
                model.train()
                for mine, shard in zip(trainable(reference), (p for g in optimizer.param_groups for p in g["params"])):
                    mine.data = full(shard)  # not by the model, which would shard again what was gathered
                seen.append(torch.allclose(found, reference(batch()[0]), atol=1e-6))

        for step in range(3):
            read("first")
            for micro in range(2):
                loss = loss_of(model, 10 * step + micro + 5 * rank)
                read("before backward")
                loss.backward()
                read("before the step")
            gradients.append([full(p.grad) for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
            optimizer.zero_grad()
            now = all_shards_full(model)
            assert all(torch.equal(now[name], clean[name]) for name in frozen(model)), "W did not come back"
        runs[where] = gradients, seen
    return runs


def all_shards_full(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return all_full(model)


@pytest.mark.parametrize("when", ["sharded first", "wrapped first"])
@pytest.mark.parametrize("reshards", [True, False, None])
def test_reading_amid_a_step_of_fsdp2_changes_nothing(on_two_ranks, when, reshards):
    for runs in on_two_ranks(f"fsdp reads {when} {reshards}"):
        expected, _ = runs["never"]
        for where in READS:
            gradients, seen = runs[where]
            assert seen == [True] * len(seen)
            assert len(seen) == {"first": 3, "before both": 12}.get(where, 6)
            for step, wanted in zip(gradients, expected):
                assert all(torch.equal(got, want) for got, want in zip(step, wanted)), where


def fsdp_inside(rank):
    """The module given to fully_shard lies around the target, so its forward begins first."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, perturbed = lora_mlp(), []
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    targets = [{"modules": model.base_model.model.first}]
    optimizer = FlatPerturbOptimizer(optimizer, targets, sigma=SIGMA, schedule="constant")
    clean = all_full(model)

    def changed():
        now = all_shards_full(model)
        return [name for name in frozen(model) if not torch.equal(now[name], clean[name])]

    for step in range(2):
        loss_of(model, step).backward()
        perturbed.append(changed())
        optimizer.step()
        optimizer.zero_grad()
    return perturbed, changed()


def test_targets_inside_a_module_given_to_fully_shard(on_two_ranks):
    for perturbed, left in on_two_ranks("fsdp inside"):
        assert perturbed == [["base_model.model.first.base_layer.weight"]] * 2
        assert left == []


JOBS = {
    **{f"ddp {s} {n}": partial(ddp_run, shared=s, accumulation=n) for s in (False, True) for n in (1, 2)},
    **{f"noise {shared}": partial(noise_of_a_rank, shared=shared) for shared in (False, True)},
    **{f"fsdp {n}": partial(fsdp_run, config=c, dtype=d, options=o) for n, (c, d, o) in FSDP_RUNS.items()},
    **{
        f"fsdp reads {when} {r}": partial(fsdp_reads, options={} if r is None else {"reshard_after_forward": r}, when=when)
        for when in ("sharded first", "wrapped first")
        for r in (True, False, None)
    },
    "fsdp inside": fsdp_inside,
    "fsdp communication": fsdp_communication,
    "fsdp exception": fsdp_exception,
    "fsdp conv1d": fsdp_conv1d,
    "fsdp resume": fsdp_resume,
}
