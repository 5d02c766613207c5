"""Which weights are found, how a module of one's own is made known, and how an update is recognised as the same."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import Mlp, lora_mlp
from torch import nn

from flatopt.adapters.custom import CUSTOM, register_low_rank
from flatopt.adapters.peft import PEFT
from flatopt.adapters.raw import RAW
from flatopt.adapters.registry import adapter_of, find_weights, raw_weights


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 9).requires_grad_(False)
        self.up, self.down = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.randn(3, 12))


class Told(Own):
    def low_rank_base(self):
        return self.layer.weight

    def low_rank_delta(self):
        return self.up, self.down, 0.3


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("flatopt.adapters.custom._registered", {})


def register(**options):
    register_low_rank(Own, **{"base": lambda m: m.layer.weight, "delta": lambda m: (m.up, m.down, 0.3), **options})


def update_of(module):
    (weight,) = find_weights([module])
    (update,) = weight.adapter.updates([weight])
    return weight, update


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (lambda m: (m.up, m.down, 0.3), lambda m: 0.3 * m.up @ m.down),
        (lambda m: 0.3 * m.up @ m.down, lambda m: 0.3 * m.up @ m.down),
        (lambda m: [(m.up, m.down, 0.3), (m.up, m.down, torch.tensor(2.0))], lambda m: 2.3 * m.up @ m.down),
        (lambda m: [], lambda m: torch.zeros(9, 12)),
    ],
    ids=["factors", "tensor", "several", "none"],
)
def test_a_module_of_ones_own(registry, delta, expected):
    register(delta=delta)
    module = Own()
    weight, update = update_of(nn.Sequential(nn.Linear(2, 2), module))
    assert (weight.owner, weight.name, weight.path, weight.layer) == (module.layer, "weight", "1.layer.weight", module)
    told = sum((s * (B @ A) for B, A, s in update.factors), torch.zeros(9, 12))
    told = told if update.dense is None else told + update.dense
    torch.testing.assert_close(told, expected(module))
    assert update.dense is None or not update.dense.requires_grad
    assert CUSTOM.update_key([weight], [None]) is None


def test_a_module_that_tells_itself(registry):
    assert update_of(Told())[1].factors[0][2] == 0.3


def test_a_subclass_and_a_later_registration(registry):
    class Sub(Own):
        pass

    assert adapter_of(Sub()) is None
    register()
    assert adapter_of(Sub()) is CUSTOM
    register_low_rank(Sub, base=lambda m: m.layer.weight, delta=lambda m: (m.up, m.down, 7.0))
    assert update_of(Sub())[1].factors[0][2] == 7.0
    assert update_of(Own())[1].factors[0][2] == 0.3


def test_what_is_registered_comes_before_peft(registry):
    model = lora_mlp()
    layer = model.base_model.model.first
    register_low_rank(type(layer), base=lambda m: m.get_base_layer().weight, delta=lambda m: m.get_delta_weight("default"))
    assert adapter_of(layer) is CUSTOM


def test_a_base_outside_of_the_module(registry):
    outside = nn.Linear(12, 9)

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrapped = [outside]
            self.up, self.down = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.randn(3, 12))

    register_low_rank(Beside, base=lambda m: (m.wrapped[0], "weight"), delta=lambda m: (m.up, m.down, 1.0))
    weight, _ = update_of(nn.ModuleList([Beside()]))
    assert weight.owner is outside
    assert weight.path == "0.Linear.weight"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": lambda m: m.layer}, r"base\(\) of 0 \(Own\) must return an nn.Parameter .*got Linear"),
        ({"base": lambda m: m.layer.weight.clone()}, r"base\(\) of 0 \(Own\) must return an nn.Parameter .*got Tensor"),
        ({"base": lambda m: (m.layer, "wait")}, r"base\(\) of 0 \(Own\): Linear has no tensor 'wait'"),
        ({"delta": lambda m: torch.zeros(2, 2)}, r"^0.layer.weight: delta has shape \(2, 2\), its base weight \(9, 12\)"),
        ({"delta": lambda m: (m.down, m.up, 1.0)}, r"^0.layer.weight: factors B \(3, 12\) and A \(9, 3\) do not multiply"),
        ({"delta": lambda m: None}, r"^0.layer.weight: delta must be a tensor shaped like the base weight, or factors"),
        ({"delta": lambda m: (m.up, m.down)}, r"^0.layer.weight: delta must be a tensor shaped like"),
    ],
)
def test_what_does_not_fit_is_named(registry, options, message):
    register(**options)
    with pytest.raises(ValueError, match=message):
        update_of(nn.Sequential(Own()))


@pytest.mark.parametrize("options", [{"base": None}, {"delta": 3}, {"module_type": Own()}, {"module_type": int}], ids=str)
def test_registering_takes_a_class_and_callables(registry, options):
    given = {"module_type": Own, "base": lambda m: m.layer.weight, "delta": lambda m: m.delta(), **options}
    with pytest.raises(TypeError, match="register_low_rank needs"):
        register_low_rank(given.pop("module_type"), **given)


def test_raw_parameters():
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    weights = raw_weights(parameters)
    assert [w.path for w in weights] == ["params[0]", "params[1]"]
    assert all(w.parameter is p for w, p in zip(weights, parameters))
    assert RAW.updates(weights) == [(), ()] or all(not u.factors and u.dense is None for u in RAW.updates(weights))
    assert RAW.update_key(weights, [None, None]) == RAW.update_key(weights, [None, None])


def test_each_weight_is_found_once():
    model = lora_mlp()
    assert len(find_weights([model, model.base_model.model.second])) == 3
    assert find_weights([Mlp()]) == []


@pytest.mark.parametrize("adapter", [PEFT, CUSTOM, RAW])
def test_one_instance_each_also_when_pickled_and_copied(adapter):
    assert pickle.loads(pickle.dumps(adapter)) is adapter
    assert copy.deepcopy(adapter) is adapter
    assert pickle.dumps(adapter) == pickle.dumps(adapter)


def test_works_without_peft():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch; from torch import nn\n"
        "from flatopt.adapters.registry import find_weights\n"
        "assert find_weights([nn.Linear(2, 2)]) == []\n"
        "assert 'loralib' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- whether an update is the same as before ----------------------------------------------------------------------------


@pytest.fixture(params=["looked up anew", "in known places"])
def keys(request):
    """The keys of a model's updates, where the adapter may and may not go by what it kept at the call before."""
    places: list = []

    def keys(model):
        weights = find_weights([model])
        if request.param == "looked up anew" or len(places) != len(weights):
            places[:] = [None] * len(weights)
        return weights[0].adapter.update_key(weights, places)

    return keys


def same_memory(a, b):
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_an_equal_key_is_an_update_of_the_same_tensors(options):
    model = lora_mlp(**options)
    weights = find_weights([model])
    places = [None] * len(weights)
    key, before = PEFT.update_key(weights, places), PEFT.updates(weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # as a step does
    assert PEFT.update_key(weights, places) == PEFT.update_key(weights, [None] * len(weights)) == key
    for old, new in zip(before, PEFT.updates(weights)):
        assert all(same_memory(a, b) for x, y in zip(old.factors, new.factors) for a, b in zip(x[:2], y[:2]))
        assert [s for *_, s in old.factors] == [s for *_, s in new.factors]
        assert old.row_norm is None or same_memory(old.row_norm, new.row_norm)


def replaced(layer):
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach().clone())


def other_memory(layer):
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.clone()


def fewer_ranks(layer):
    layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data[:2]


def another_type(layer):
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach().view(torch.int32), False)


def another_linear(layer):
    layer.lora_B["default"] = copy.deepcopy(layer.lora_B["default"])


def another_dict(layer):
    layer.lora_A._modules = dict(layer.lora_A._modules, default=copy.deepcopy(layer.lora_A["default"]))


@pytest.mark.parametrize(
    "change",
    [
        replaced,
        other_memory,
        fewer_ranks,
        another_type,
        another_linear,
        another_dict,
        lambda layer: (layer.lora_A.pop("default"), layer.lora_B.pop("default")),
        lambda layer: layer.merge(),
        lambda layer: layer.scaling.update(default=3.0),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.set_adapter("other"),
        lambda layer: layer.set_adapter(["default", "other"]),
    ],
    ids=[
        "replaced",
        "other memory",
        "fewer ranks",
        "type",
        "linear",
        "dict",
        "taken out",
        "merged",
        "scaling",
        "disabled",
        "other adapter",
        "both adapters",
    ],
)
def test_what_changes_the_update_changes_the_key(change, keys):
    from peft import LoraConfig

    model = lora_mlp()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["second"]))
    before = keys(model)
    held = [p.data for p in model.parameters()]
    assert keys(model) == before
    change(model.base_model.model.second)
    after = keys(model)
    assert [a == b for a, b in zip(after, before)] == [True, False, True]
    assert len(held)


@pytest.mark.parametrize("knows_variants", [True, False])
def test_another_magnitude_changes_the_key(knows_variants, keys):
    model = lora_mlp(use_dora=True)
    layer = model.base_model.model.second
    if not knows_variants:  # PEFT before 0.16
        layer.__dict__.pop("lora_variant", None)
    before = keys(model)
    assert keys(model) == before
    magnitude = layer.lora_magnitude_vector["default"]
    held, magnitude.weight = magnitude.weight, nn.Parameter(magnitude.weight.detach().clone())
    assert [a == b for a, b in zip(keys(model), before)] == [True, False, True]
    assert PEFT.updates(find_weights([model]))[1].row_norm is not None
    assert held is not None


def test_the_key_of_two_adapters_of_embeddings_and_of_none_is_known_too(keys):
    from peft import LoraConfig, get_peft_model

    model = lora_mlp()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["second"]))
    model.base_model.set_adapter(["default", "other"])
    assert keys(model) == keys(model)
    model.base_model.set_adapter("other")  # which two of the layers do not have
    assert keys(model) == keys(model)
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 8)), LoraConfig(r=2, target_modules=["0"]))
    assert keys(model) == keys(model)


@pytest.mark.parametrize("kind", ["adalora", "vera", "grouped", "two dora"])
def test_a_computed_update_is_never_the_same(kind, keys):
    from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model

    if kind == "grouped":
        model = get_peft_model(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))
    elif kind == "two dora":
        model = lora_mlp(use_dora=True)
        model.add_adapter("other", LoraConfig(r=4, target_modules=["first", "second", "head"], use_dora=True))
        model.base_model.set_adapter(["default", "other"])
    else:
        options = {"total_step": 9} if kind == "adalora" else {}
        model = get_peft_model(
            Mlp(), (AdaLoraConfig if kind == "adalora" else VeraConfig)(target_modules=["second"], r=4, **options)
        )
    assert all(a != b for a, b in zip(keys(model), keys(model)))
