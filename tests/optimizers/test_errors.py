"""Every error names the module or the value, says the way out, and leaves every weight as it was."""

import contextlib
import re
import warnings

import peft
import pytest
import torch
from helpers import Mlp, batch, bits, changed, frozen, trainable
from peft import LoraConfig, get_peft_model
from torch import nn

from flatopt import FlatPerturbOptimizer, register_low_rank


def wrap(targets, **options):
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return FlatPerturbOptimizer(inner, targets, **{"schedule": "constant", **options})


def raises(*parts, error=ValueError):
    """Expect ``error`` with all of ``parts`` in its message, in that order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr("flatopt.adapters.custom._registered", {})


class Own(nn.Module):
    """A low-rank module by the protocol, for any weight and delta."""

    def __init__(self, weight=None, delta=None):
        super().__init__()
        self.weight = weight if weight is not None else nn.Parameter(torch.randn(5, 16), requires_grad=False)
        self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 16))
        self.delta = delta or (lambda m: (m.up, m.down, 1.0))

    def low_rank_base(self):
        return self.weight

    def low_rank_delta(self):
        return self.delta(self)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


# --- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, None, "adamw", nn.Linear(1, 1)], ids=str)
def test_optimizer(model, optimizer):
    with raises("optimizer must be a constructed torch.optim.Optimizer", "got", error=TypeError):
        FlatPerturbOptimizer(optimizer, model, schedule="constant")


def test_an_optimizer_that_is_wrapped_already(model):
    with raises("already", "several target groups", error=TypeError):
        FlatPerturbOptimizer(wrap(model), model, schedule="constant")


@pytest.mark.parametrize("schedule", ["cosine", "linear", lambda t: t])
def test_total_steps_missing(model, schedule):
    optimizer = wrap(model, schedule=schedule)  # it may be set later: asked for by the first perturbation
    before = frozen(model)
    with raises("schedule", "needs total_steps", "epochs * len(loader) // accumulation", "'constant'"):
        model(batch()[0])
    assert not changed(model, before)
    optimizer.total_steps = 10
    model(batch()[0])


def test_total_steps_missing_by_default(model):
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model)
    with raises("schedule 'cosine' needs total_steps"):
        optimizer.perturb()


@pytest.mark.parametrize("total_steps", [0, -3, 1.5, "100", float("nan"), float("inf"), [10]], ids=str)
def test_total_steps(model, total_steps):
    with raises("total_steps must be a positive integer, got", repr(total_steps)):
        wrap(model, total_steps=total_steps)


@pytest.mark.parametrize("seed", [0.5, "zero", None, float("nan")], ids=str)
def test_seed(model, seed):
    with raises("seed must be an integer, got", repr(seed)):
        wrap(model, seed=seed)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf"), "0.1", None, torch.ones(2)], ids=str)
def test_sigma(model, sigma):
    with raises("sigma must be a finite number >= 0, got", repr(sigma)):
        wrap(model, sigma=sigma)


@pytest.mark.parametrize("value", ["cosin", None, 3, ["cosine"]], ids=str)
@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("schedule", ("cosine", "linear", "constant", "callable")),
        ("noise", ("filter", "layer", "isotropic", "element")),
        ("restore", ("reversible", "copy", "subtract")),
    ],
)
def test_choices(model, name, choices, value):
    with raises(f"{name} must be one of", *choices, repr(value)):
        wrap(model, **{name: value})
    with raises(f"{name} must be one of", *choices, repr(value)):
        wrap([{"modules": model, name: value}])


@pytest.mark.parametrize("targets", [None, "model", [], [nn.Linear(2, 2)], {"modules": nn.Linear(2, 2)}, 3], ids=str)
def test_targets(targets):
    with raises("targets must be a module, or a non-empty list of dicts", "'modules'", error=TypeError):
        wrap(targets)


@pytest.mark.parametrize("key", ["lr", "module", "rho"])
def test_an_unknown_key_of_a_group(model, key):
    with raises("'modules' or 'params'", "'sigma', 'schedule', 'noise', 'restore'", "got", repr(key)):
        wrap([{"modules": model, key: 0.1}])


@pytest.mark.parametrize("keys", [(), ("modules", "params")])
def test_a_group_has_modules_or_params(model, keys):
    with raises("either 'modules' or 'params'"):
        wrap([{**dict.fromkeys(keys, model), "sigma": 0.1}])


@pytest.mark.parametrize(
    ("key", "value"), [("modules", []), ("modules", "first"), ("modules", 3), ("params", [1.0])], ids=str
)
def test_what_a_group_lists(key, value):
    with raises(f"'{key}' of a target group must be", "got", error=TypeError):
        wrap([{key: value}])


@pytest.mark.parametrize(
    "change",
    [{"sigma": -1.0}, {"noise": "white"}, {"restore": "undo"}, {"schedule": "step"}, {"schedule": "cosine"}],
    ids=str,
)
def test_a_group_that_is_changed_for_the_worse_during_training(model, change):
    before = frozen(model)
    optimizer = wrap(model)
    optimizer.perturb_groups[0].update(change)
    (name,) = change
    with raises(name):
        model(batch()[0])
    assert not changed(model, before)
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")], ids=str)
def test_what_a_schedule_returns(model, value):
    before = frozen(model)
    wrapped = wrap(model, schedule=lambda t: value, total_steps=10)
    with raises("schedule returned", str(value), "progress 0.0"):
        model(batch()[0])
    assert not changed(model, before)
    assert not wrapped.is_perturbed


# --- which weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "empty",
    [
        Mlp,
        lambda: get_peft_model(Mlp(), peft.IA3Config(target_modules=["first"], feedforward_modules=["first"])),
    ],
    ids=["plain", "ia3"],
)
def test_nothing_found(empty):
    found = empty()
    with raises("no low-rank module", type(found).__name__, "get_peft_model", "register_low_rank", "'params'"):
        wrap(found)


def test_nothing_left_by_an_earlier_group(model):
    with raises("no low-rank module", "earlier group"):
        wrap([{"modules": model}, {"modules": model.base_model.model.second}])


class Params4bit(nn.Parameter):
    """As bitsandbytes has it: packed bytes, and the state to unpack them."""

    quant_state = object()


class Packed(torch.Tensor):
    """As torchao has it: a subclass that says bf16 and keeps int8."""


def linear_of(weight):
    layer = nn.Linear(16, 5)
    layer.weight = weight
    return layer


QUANTISED = {
    "int8": (lambda: nn.Parameter(torch.zeros(5, 16, dtype=torch.int8), requires_grad=False), "int8"),
    "float8": (lambda: nn.Parameter(torch.zeros(5, 16).to(torch.float8_e4m3fn), requires_grad=False), "float8_e4m3fn"),
    "4 bit": (lambda: Params4bit(torch.zeros(40, 1, dtype=torch.uint8), requires_grad=False), "Params4bit"),
    "4 bit in bf16": (lambda: Params4bit(torch.zeros(40, 1, dtype=torch.bfloat16), requires_grad=False), "Params4bit"),
    "subclass": (lambda: nn.Parameter(torch.zeros(5, 16).as_subclass(Packed), requires_grad=False), "Packed"),
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("where", ["peft", "own", "raw"])
def test_quantised(model, kind, where):
    weight, word = QUANTISED[kind]
    weight = weight()
    if where == "peft":
        model.base_model.model.second.base_layer.weight = weight
        targets, path = model, "second.weight"
    elif where == "own":
        targets, path = nn.Sequential(nn.ReLU(), Own(weight)), "1.weight"
    else:
        targets, path = [{"params": [nn.Parameter(torch.ones(2), requires_grad=False), weight]}], "params[1]"
    before = frozen(model)
    with raises(path, word, "[{'modules': [...]}]"):
        wrap(targets)
    assert not changed(model, before)


def test_packed_layers_that_have_no_weight(model):
    del model.base_model.model.second.base_layer.weight
    model.base_model.model.second.base_layer.qweight = nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)
    with raises("base_model.model.second", "quantised", "int32", "unquantised"):
        wrap(model)


def test_merged(model):
    model.merge_adapter()
    with raises("base_model.model.first", "merged", "unmerge_adapter()"):
        wrap(model)
    model.unmerge_adapter()
    wrap(model)


def test_merged_during_training(model):
    optimizer = wrap(model)
    model(batch()[0]).sum().backward()
    optimizer.step()
    model.base_model.model.second.merge()
    before = frozen(model)
    with raises("base_model.model.second", "merged", "layer.unmerge()"):
        model(batch()[0])
    assert not changed(model, before)
    model.base_model.model.second.unmerge()
    model(batch()[0]).sum().backward()
    optimizer.step()


def test_meta(model):
    model.to("meta")
    with raises("base_model.model.first", "meta device", "Load the model's weights"):
        wrap(model)


def test_offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    before = frozen(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with raises("base_model.model.first", "offload"):
        wrap(model)
    for name, w in before.items():
        module = model.get_submodule(name.rpartition(".")[0])
        assert torch.equal(bits(module._hf_hook.weights_map[name.rpartition(".")[2]]), bits(w))


def test_offloaded_between_forwards(model):
    # hooks that move a real weight in and out for each forward, as with offload_buffers or a custom map
    class Hook:
        offload = True

    model.base_model.model.second.base_layer._hf_hook = Hook()
    with raises("base_model.model.second", "offloaded by accelerate", "one device"):
        wrap(model)


def test_size_0():
    weight = nn.Parameter(torch.empty(0), requires_grad=False)
    with raises("0.weight", "size 0 on this rank", "ZeRO-3", "FSDP2"):
        wrap(nn.Sequential(Own(weight)))
    with raises("params[0]", "size 0"):
        wrap([{"params": weight}])


def test_trainable(model):
    model.base_model.model.second.base_layer.weight.requires_grad_(True)
    with raises("base_model.model.second", "trainable", "requires_grad_(False)", "[{'modules': [...]}]"):
        wrap(model)
    with raises("params[0]", "trainable"):
        wrap([{"params": trainable(model)}])


def test_trainable_during_training(model):
    optimizer = wrap(model)
    weight = model.base_model.model.head.base_layer.weight.requires_grad_(True)
    before = frozen(model)
    clean = weight.detach().clone()
    with raises("base_model.model.head", "trainable"):
        model(batch()[0])
    assert not changed(model, before)
    assert torch.equal(weight, clean)
    assert not optimizer.is_perturbed


def test_dora_on_a_grouped_convolution():
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of groups > 1
        try:
            model = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), config)
        except RuntimeError as error:
            pytest.skip(f"PEFT {peft.__version__} cannot make one: {error}")
    with raises("base_model.model.0", "grouped", "Use LoRA", "[{'modules': [...]}]"):
        wrap(model)


SIZES = {"OFTConfig": {"oft_block_size": 4, "r": 0}, "BOFTConfig": {"boft_block_size": 4}, "HRAConfig": {}}


@pytest.mark.parametrize("method", SIZES)
def test_adapters_that_are_no_update(method):
    model = get_peft_model(Mlp(), getattr(peft, method)(target_modules=["second"], **SIZES[method]))
    with raises("base_model.model.second", method[:-6].lower(), "Leave it out", "[{'modules': [...]}]"):
        wrap(model)


# --- modules of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module_type", ["Own", Own(), int, None], ids=str)
def test_registering_no_module_class(module_type):
    with raises("register_low_rank needs an nn.Module class", error=TypeError):
        register_low_rank(module_type, base=lambda m: m.weight, delta=lambda m: None)


def test_registering_no_functions():
    with raises("register_low_rank needs callables", "base(module)", "delta(module)", error=TypeError):
        register_low_rank(Own, base="weight", delta=lambda m: None)


@pytest.mark.parametrize(
    "value", [None, torch.ones(5, 16), nn.Parameter(torch.ones(5, 16))], ids=["None", "tensor", "foreign"]
)
def test_base_that_is_no_parameter_of_the_module(value):
    register_low_rank(Own, base=lambda m: value, delta=lambda m: (m.up, m.down, 1.0))
    with raises("base() of 1 (Own)", "must return an nn.Parameter of that module", type(value).__name__):
        wrap(nn.Sequential(nn.ReLU(), Own()))


DELTAS = {
    "wrong shape": (lambda m: torch.zeros(16, 5), ("(16, 5)", "(5, 16)")),
    "factors swapped": (lambda m: (m.down, m.up, 1.0), ("(2, 16)", "(5, 2)", "(5, 16)")),
    "factors of two ranks": (lambda m: (m.up, m.down[:1], 1.0), ("(5, 2)", "(1, 16)")),
    "no scaling": (lambda m: (m.up, m.down), ("factors (B, A, scaling)",)),
    "nothing": (lambda m: None, ("factors (B, A, scaling)",)),
    "modules": (lambda m: (nn.Linear(1, 1), nn.Linear(1, 1), 1.0), ("factors (B, A, scaling)",)),
}


@pytest.mark.parametrize("kind", DELTAS)
def test_delta_that_does_not_fit(kind):
    delta, parts = DELTAS[kind]
    model = nn.Sequential(Own(), nn.Sequential(Own(delta=delta)))
    before = frozen(model)
    optimizer = wrap(model)
    with raises("1.0.weight", *parts):
        optimizer.perturb()
    assert not changed(model, before)
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("restore", ["reversible", "copy", "subtract"])
@pytest.mark.parametrize("split", [False, True], ids=["one group", "two groups"])
def test_a_delta_that_raises_midway_leaves_all_weights_clean(restore, split):
    broken = True

    def delta(module):
        if broken:
            raise KeyError("in delta")
        return module.up, module.down, 1.0

    first, second = Own(), Own(delta=delta)
    model = nn.Sequential(first, second)
    before = frozen(model)
    optimizer = wrap([{"modules": first}, {"modules": second}] if split else model, restore=restore)
    with pytest.raises(KeyError, match="in delta"):
        optimizer.perturb()
    if restore != "subtract" or not split:  # taking noise off again by subtraction is not exact
        assert not changed(model, before)
    assert not optimizer.is_perturbed
    broken = False
    with optimizer.perturbed():
        assert len(changed(model, before)) == 2
    if restore != "subtract":
        assert not changed(model, before)


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm = nn.Linear(16, 12), norm

    def forward(self, x):
        return self.norm(self.first(x))


def normed(norm):
    model = get_peft_model(Normed(norm), LoraConfig(r=2, target_modules=["first"])).train()
    return model, FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.1, schedule="constant")


def test_running_statistics_gathered_at_noise_are_told_once():
    model, optimizer = normed(nn.Sequential(nn.BatchNorm1d(12), nn.BatchNorm1d(12)))
    for told in (True, False):
        match = r"norm\.0 \(BatchNorm1d\) and 1 more is in train mode: .*update_bn"
        with pytest.warns(UserWarning, match=match) if told else contextlib.nullcontext():
            model(torch.randn(8, 16)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["eval", "no statistics", "LayerNorm", "sigma 0"])
def test_other_norms_are_not(kind):
    norm = {"eval": nn.BatchNorm1d(12).eval(), "LayerNorm": nn.LayerNorm(12)}.get(kind, nn.BatchNorm1d(12))
    if kind == "no statistics":
        norm = nn.BatchNorm1d(12, track_running_stats=False)
    model, optimizer = normed(norm)
    if kind == "eval":
        norm.eval()
    if kind == "sigma 0":
        optimizer.perturb_groups[0]["sigma"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(8, 16)).sum().backward()
        optimizer.step()


def test_statistics_can_be_gathered_anew_at_clean_weights():
    """The way out that the message names, amid a step too."""
    norm, data = nn.BatchNorm1d(12), [torch.randn(64, 16) for _ in range(4)]
    model, optimizer = normed(norm)
    with pytest.warns(UserWarning, match="update_bn"):
        model(data[0]).sum().backward()
    found = []
    for _ in range(2):
        torch.optim.swa_utils.update_bn(data, model)
        found.append(norm.running_mean.clone())
        optimizer.detach()
    assert torch.equal(*found)
    assert found[0].any()
