"""FSDP2 on uneven shards, and adapters split in other ways than W: the noise is that of the whole model at the same key."""

import itertools

import pytest
import torch
import torch.distributed.fsdp
from helpers import bits, lora_mlp, trainable
from ranks import USABLE, on_ranks
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatopt import FlatPerturbOptimizer

FSDP2 = hasattr(torch.distributed.fsdp, "fully_shard")  # public from torch 2.6 on
pytestmark = pytest.mark.skipif(not (USABLE and FSDP2), reason="needs gloo and FSDP2")
STEPS, STRIDE = 3, 5  # of the operations at which an exception comes
LAYERS = ("first", "second", "head")


def make(model, **options):
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    options = {"sigma": 0.3, "schedule": "constant", "seed": 4, "shared": True, "restore": "copy", **options}
    return FlatPerturbOptimizer(optimizer, model, **options)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def bases(model):
    return {name: getattr(model.base_model.model, name).base_layer.weight for name in LAYERS}


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for name in LAYERS:
        fully_shard(getattr(model.base_model.model, name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_parts(*parts):
    """Only these of each layer: what is left is whole on every rank."""

    def of(model, mesh):
        from torch.distributed.fsdp import fully_shard

        for name, part in itertools.product(LAYERS, parts):
            fully_shard(getattr(model.base_model.model, name).get_submodule(part), mesh=mesh)
        return model

    return of


class Calls(TorchDispatchMode):
    """Collectives by name, whoever calls them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented  # DTensor first: it calls the collectives
        name = function._schema.name
        if "c10d" in name and ("gather" in name or "reduce" in name):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def prepared(config, change):
    torch.manual_seed(0)
    model = lora_mlp(**config)
    change(model)
    return model


def nothing(model):
    pass


def noise(rank, mesh=None, config=None, change=nothing, between=nothing, split=shard, options=None):
    """Step by step the noise of the sharded and of a whole model, the collectives of perturb, and whether W came back.

    ``between``: what befalls both models after each step.
    """
    shape = mesh or (dist.get_world_size(),)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    twin, model = (prepared(config or {}, change) for _ in range(2))
    model = split(model, mesh)
    both = [(each, make(each, **(options or {}))) for each in (model, twin)]
    steps = []
    for _ in range(STEPS):
        found = []
        for each, optimizer in both:
            clean = {name: whole(weight) for name, weight in bases(each).items()}
            with Calls() as calls:
                optimizer.perturb()
            found.append({name: whole(weight) - clean[name] for name, weight in bases(each).items()})
            for p in trainable(each):
                p.grad = torch.ones_like(p)
            optimizer.step()
            found.append(all(torch.equal(whole(weight), clean[name]) for name, weight in bases(each).items()))
            found.append(calls.names)
            with torch.no_grad():
                between(each)
        steps.append(found)
    return steps


def two_adapters(model):
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=5, target_modules=list(LAYERS), init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def mixed_dtypes(model):
    for module, dtype in ((model.base_model.model.first, torch.bfloat16), (model.base_model.model.second, torch.float64)):
        module.lora_A.to(dtype)


def write_to_weights(model):
    """By operations of the weights themselves, and past these, as a checkpoint's loader may."""
    weights = bases(model)
    weights["first"].mul_(1.5)
    getattr(weights["second"], "_local_tensor", weights["second"]).mul_(0.5)


def replace_weights(model):
    for name in LAYERS:
        layer = getattr(model.base_model.model, name)
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            old = module.weight
            module._parameters["weight"] = nn.Parameter(old.detach() * 1.25, requires_grad=old.requires_grad)
    # what the optimizer steps is left behind: nothing of it matters here


BASE, A, B = "base_layer", "lora_A.default", "lora_B.default"
RUNS = {  # -> how often perturb calls a collective; None: as DTensor has it
    "8 rows of A on 3 ranks": ({"config": {"r": 8}}, 1),
    "2 rows of A on 3 ranks": ({"config": {"r": 2}}, 1),
    "1 row of A on 3 ranks": ({"config": {"r": 1}}, 1),
    "reversible": ({"options": {"restore": "reversible"}}, 1),
    "dtypes of A": ({"change": mixed_dtypes}, 3),
    "two adapters": ({"change": two_adapters}, 1),
    "dora": ({"config": {"use_dora": True}}, 1),
    "adapter whole": ({"split": shard_parts(BASE)}, 0),
    "A whole": ({"split": shard_parts(BASE, B)}, 0),
    "B whole": ({"split": shard_parts(BASE, A)}, 3),
    "weights written to": ({"between": write_to_weights}, 1),
    "weights replaced": ({"between": replace_weights}, 1),
    "layer": ({"options": {"noise": "layer"}}, None),
}


class Fault(Exception):
    """As an allocation that fails, say."""


class RaiseAt(TorchDispatchMode):
    """Raises before its ``k``-th operation."""

    def __init__(self, k):
        super().__init__()
        self.left = k

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise Fault
        return func(*args, **(kwargs or {}))


def faults(rank):
    """An exception at every fifth operation of perturb and restore, on all ranks: the last such, and what was lost."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard(prepared({"r": 8}, nothing), mesh)
    optimizer = make(model, restore="reversible")

    def now():
        return [bits(weight._local_tensor).clone() for weight in bases(model).values()]

    def same(wanted):
        return all(map(torch.equal, now(), wanted))

    clean = now()
    optimizer.perturb()
    noisy = now()
    optimizer.restore()
    told, lost = {}, []
    for move in ("perturb", "restore"):
        for k in itertools.count(1, STRIDE):
            if move == "restore":
                optimizer.perturb()
            try:
                with RaiseAt(k):
                    getattr(optimizer, move)()
            except Fault:
                told[move] = k
            lost += [] if same(noisy if optimizer.is_perturbed else clean) else [(move, k, "midway")]
            optimizer.restore()  # on all ranks, as some may be a few operations ahead
            lost += [] if same(clean) else [(move, k, "clean")]
            optimizer.perturb()
            lost += [] if same(noisy) else [(move, k, "perturbed")]
            optimizer.restore()
            running = torch.tensor(int(told.get(move) == k))
            dist.all_reduce(running)
            if not running:
                break
    return told, lost


def on_three(rank):
    return {**{name: noise(rank, **run) for name, (run, _) in RUNS.items()}, "faults": faults(rank)}


HYBRID = {  # copies of the model x ranks that share one
    "2 x 2": {"mesh": (2, 2)},
    "4 x 1": {"mesh": (4, 1)},
    "2 x 2, dora": {"mesh": (2, 2), "config": {"use_dora": True}},
}


def on_four(rank):
    return {name: noise(rank, **run) for name, run in HYBRID.items()}


def found_by(work, world):
    @pytest.fixture(scope="module")
    def found(tmp_path_factory):
        return on_ranks(tmp_path_factory.mktemp("ranks"), work, world=world)

    return found


three, four = found_by(on_three, 3), found_by(on_four, 4)


def check(steps, calls):
    for sharded, is_back, names, twin, is_twin_back, _ in steps:
        assert is_back
        assert is_twin_back
        for name in LAYERS:
            assert sharded[name].abs().sum() > 0
            torch.testing.assert_close(sharded[name], twin[name], rtol=1e-4, atol=1e-6)
        assert calls is None or len(names) == calls, names
    first, second = (step[0]["second"] for step in steps[:2])
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", RUNS)
def test_the_noise_is_that_of_the_whole_model(three, name):
    for rank in three:
        check(rank[name], RUNS[name][1])


@pytest.mark.parametrize("name", HYBRID)
def test_the_noise_is_that_of_the_whole_model_on_a_mesh_of_two_dimensions(four, name):
    for rank in four:
        check(rank[name], 0 if name == "4 x 1" else 1)


def test_no_exception_loses_a_bit(three):
    for rank in three:
        told, lost = rank["faults"]
        assert lost == []
        assert min(told["perturb"], told["restore"]) > 50
