"""flatopt.flatness amid a caller's own doings, and layers of other kinds: right, or refused by name; no weight is lost."""

import contextlib
import copy

import peft
import pytest
import torch
from helpers import batch, lora_mlp, trainable, twin_on_the_same_base
from test_flatness import Custom, assert_as_it_was, everything, loss_fn, snapshot
from torch import nn
from torch.nn.functional import cross_entropy, linear

from flatopt import FlatPerturbOptimizer, flatness, register_low_rank
from flatopt.core.weight import WeightUpdate
from flatopt.flatness.point import at_weights

BATCHES = [batch(seed=1), batch(seed=2)]
X = [torch.randn(4, 16, generator=torch.Generator().manual_seed(0))]


def square(model, batch):
    return model(batch).float().square().mean()


def measures():
    yield from everything()
    yield lambda m, f, b: flatness.quantization_test(m, f, b, formats=("int3", "int2"))


def in_bf16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return loss_fn(model, batch)


def lora(layer, **settings):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, **settings}
    return peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(**settings))


# --- autocast -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(9))
def test_autocast_around_is_autocast_in_the_loss(number):
    """autocast keeps its copies of weights that want gradients, also of the adapter, until its outermost region ends."""
    model, measure = lora_mlp(), list(measures())[number]
    model.base_model.model.first.base_layer.weight.requires_grad_(True)  # kept before it is merged
    before, expected = snapshot(model), measure(model, in_bf16, BATCHES)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            clean = loss_fn(model.eval(), BATCHES[0])
        model.train()
        found = measure(model, loss_fn, BATCHES)
        assert torch.is_autocast_enabled("cpu")
        assert torch.equal(loss_fn(model, BATCHES[0]), clean)
        assert torch.autograd.grad(loss_fn(model, BATCHES[0]), trainable(model), allow_unused=True)[0] is not None
    assert str(found) == str(expected)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("model", [lora_mlp, lambda: nn.Sequential(Custom(5, 16))], ids=["merged", "added"])
def test_the_merged_weight_is_that_of_full_precision(model):
    model = model()
    with at_weights(model, loss_fn, BATCHES) as point:
        expected = point.values(0)
    with torch.autocast("cpu", torch.bfloat16), at_weights(model, loss_fn, BATCHES) as point:
        assert torch.equal(point.values(0), expected)
        assert (point.values(0) @ torch.ones(16)).dtype == torch.float32


def test_weights_where_there_is_no_autocast():
    with at_weights(lora_mlp().to("meta"), loss_fn, BATCHES, space="adapter") as point:
        assert point.weights


# --- adapters that are off, or of several methods -----------------------------------------------------------------------


@pytest.mark.parametrize("off", ["disable_adapter", "no active adapter"])
def test_an_adapter_that_is_off_is_not_measured(off):
    model = lora(nn.Linear(16, 4))
    layer = model.base_model.model[0]
    W, bias, before = layer.base_layer.weight.detach().clone(), layer.base_layer.bias, snapshot(model)
    if off == "no active adapter":
        model.base_model.set_adapter([])
    with model.disable_adapter() if off == "disable_adapter" else contextlib.nullcontext():
        found = flatness.quantization_test(model, square, X, formats=("int3",))
    assert found.full.loss == pytest.approx(linear(X[0], W, bias).square().mean().item())
    expected = linear(X[0], flatness.rounding("int3")(W), bias).square().mean().item()
    assert found.rounded["int3"].loss == pytest.approx(expected)
    assert all(torch.equal(p, q) for p, q in zip(before[0].values(), snapshot(model)[0].values()))


@pytest.mark.parametrize("number", range(9))
def test_an_adapter_that_is_merged_and_off_is_refused(number):
    """Its next forward unmerges it, so that W moves while it is measured, and what was merged would be put back."""
    model = lora_mlp()
    model.merge_adapter()
    with model.disable_adapter():
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"model\.first\.weight is merged.*unmerge_adapter\(\) first"):
            list(measures())[number](model, loss_fn, BATCHES)
        assert_as_it_was(model, before)


def test_the_adapters_own_space_with_the_adapter_off_is_refused():
    model = lora_mlp()
    with model.disable_adapter(), pytest.raises(ValueError, match="is disabled: it has no part in the loss"):
        flatness.worst_case_sharpness(model, loss_fn, BATCHES, space="adapter")


def test_a_reference_made_in_the_loss_with_the_adapter_off_is_refused():
    """PEFT unmerges for it, and the next move of W would be made as if it had not."""
    model = lora_mlp()

    def against_reference(model, batch):
        with torch.no_grad(), model.disable_adapter():
            reference = model(batch[0])
        return (model(batch[0]) - reference).square().mean()

    before = snapshot(model)
    for number, measure in enumerate(measures()):
        if number == 2:  # (A, B) are never merged
            assert measure(model, against_reference, BATCHES).value > 0
            continue
        with pytest.raises(ValueError, match=r"loss_fn unmerged the adapter of base_model.model.first\S*weight"):
            measure(model, against_reference, BATCHES)
        assert_as_it_was(model, before)


@pytest.mark.parametrize("other", ["loha", "lokr"])
@pytest.mark.parametrize("bias", [False, True])
def test_all_methods_on_one_weight_are_merged(other, bias):
    kinds = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 40, bias=bias)), config, mixed=True)
    model.add_adapter("b", kinds[other](r=4, target_modules=["0"], init_weights=False))
    model.set_adapter(["default", "b"])
    layer = model.base_model.model[0]
    base = layer.get_base_layer()
    merged = (
        base.weight.detach() + layer.get_delta_weight("b").detach() + layer.base_layer.get_delta_weight("default").detach()
    )
    before = snapshot(model)
    found = flatness.quantization_test(model, square, X, formats=("int3",))
    assert_as_it_was(model, before)
    assert not layer.merged
    assert not layer.base_layer.merged
    rounded = flatness.rounding("int3")(merged)
    assert found.full.loss == pytest.approx(linear(X[0], merged, base.bias).square().mean().item(), rel=1e-4)
    assert found.rounded["int3"].loss == pytest.approx(linear(X[0], rounded, base.bias).square().mean().item(), rel=1e-4)
    assert found.rounded["int3"].error == pytest.approx(((rounded - merged).norm() / merged.norm()).item(), rel=1e-4)


# --- weights and layers of other kinds ----------------------------------------------------------------------------------


MEAN_RISES = {0: "expected_sharpness", 7: "sigma_range_test"}


def test_a_quantised_base_is_refused_by_name_where_weights_have_to_move():
    bnb = pytest.importorskip("bitsandbytes")
    model = lora(bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu"))
    x = [torch.randn(2, 64)]
    for number, measure in enumerate(measures()):
        if number != 2 and number not in MEAN_RISES:
            with pytest.raises(ValueError, match=r"model\.0\.weight is quantised \(bitsandbytes nf4"):
                measure(model, square, x)
    assert flatness.worst_case_sharpness(model, square, x, space="adapter", steps=2).value > 0


@pytest.mark.parametrize("attached", [False, True])
def test_the_mean_rise_on_a_quantised_base_is_that_of_its_numbers(attached):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    packed = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    model, x = lora(packed), [torch.randn(8, 64), torch.randn(8, 64)]
    twin = lora(nn.Linear(64, 48))
    layer = twin.base_model.model[0].base_layer
    with torch.no_grad():
        layer.weight.copy_(bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state))
        layer.bias.copy_(packed.bias)
    model.train()
    bits = packed.weight.data.clone()
    if attached:
        optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, schedule="constant")
        with pytest.raises(ValueError, match=r"belongs to a FlatPerturbOptimizer.*detach"):
            flatness.expected_sharpness(model, square, x)
        optimizer.detach()
    for sigma in (0.05, 0.3):
        found = flatness.expected_sharpness(model, square, x, sigma=sigma, draws=150)
        expected = flatness.expected_sharpness(twin, square, x, sigma=sigma, draws=150)
        assert abs(found.value - expected.value) < 4 * (found.stderr + expected.stderr)
        assert found.value > 4 * found.stderr
    tests = [flatness.sigma_range_test(each, square, x, sigmas=(0.1, 1.0), draws=100) for each in (model, twin)]
    assert tests[0].clean == pytest.approx(tests[1].clean, rel=1e-4)
    assert tests[0].suggested == pytest.approx(tests[1].suggested, rel=0.2)
    assert torch.equal(packed.weight.data, bits)
    assert all(module.training for module in model.modules())
    square(model, x[0]).backward()  # it still trains


NOT_MERGED = {
    "grouped convolution": (lambda: lora(nn.Conv2d(8, 12, 3, groups=4), r=4), torch.randn(2, 8, 5, 5)),
    "aLoRA": (lambda: lora(nn.Linear(16, 4), alora_invocation_tokens=[1]), X[0]),
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("kind", NOT_MERGED)
def test_an_adapter_that_peft_cannot_merge_is_named(kind):
    """There is no merged weight: LoRA on a grouped convolution, for one, reads inputs of all groups."""
    if kind == "aLoRA" and "alora_invocation_tokens" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT has no aLoRA")
    make, x = NOT_MERGED[kind]
    model = make()
    before = snapshot(model)
    for number, measure in enumerate(measures()):
        if number != 2:
            with pytest.raises(ValueError, match=r"model\.0\.weight: PEFT cannot merge its adapter .*'modules'"):
                measure(model, square, [x])
            assert_as_it_was(model, before)


def test_a_weight_that_each_forward_makes_anew_is_refused():
    """A move of it would be wiped out, and every loss that of the unmoved weights."""
    model = lora(nn.Linear(16, 4))
    nn.utils.parametrizations.weight_norm(model.base_model.model[0].base_layer)
    with pytest.raises(ValueError, match="is computed anew in each forward"):
        flatness.quantization_test(model, square, X)


class Rescaled(Custom):
    """DoRA as torchtune has it: a magnitude a row, and no way to merge."""

    def forward(self, x):
        V = self.weight + self.up @ self.down
        return x @ (V * (3 / V.norm(dim=1, keepdim=True))).t()


register_low_rank(
    Rescaled,
    base=lambda m: m.weight,
    delta=lambda m: WeightUpdate(factors=((m.up, m.down, 1.0),), row_norm=torch.full((len(m.weight),), 3.0)),
)


def test_dora_that_is_not_merged_is_refused():
    with pytest.raises(ValueError, match=r"0\.weight is rescaled by its adapter"):
        flatness.hessian_trace(nn.Sequential(Rescaled(4, 16)), square, X)


class Own(Custom):
    """A module with merge() and unmerge() of its own."""

    merged = False

    def merge(self):
        raise AssertionError("not PEFT's")

    unmerge = merge


def test_own_modules_that_can_merge_are_measured_unmerged():
    torch.manual_seed(0)
    one, other = nn.Sequential(Custom(4, 16)), nn.Sequential(Own(4, 16))
    other.load_state_dict(one.state_dict())
    for measure in measures():
        assert str(measure(other, square, X)) == str(measure(one, square, X))


def test_loralibs_layers_which_merge_themselves_in_eval_are_left_as_they_were():
    loralib = pytest.importorskip("loralib")
    model = nn.Sequential(loralib.Linear(16, 4, r=2))
    nn.init.normal_(model[0].lora_B)
    loralib.mark_only_lora_as_trainable(model)
    merged = copy.deepcopy(model).eval()[0].weight.detach()
    before = snapshot(model.train())
    for measure in measures():
        measure(model, square, X)
        assert_as_it_was(model, before)
        assert not model[0].merged
    found = flatness.quantization_test(model, square, X, formats=("int3",))
    rounded = flatness.rounding("int3")(merged)
    assert found.rounded["int3"].loss == pytest.approx(linear(X[0], rounded, model[0].bias).square().mean().item(), rel=1e-4)


# --- the caller ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
def test_a_loss_that_trains_is_told(attached):
    """In train mode it would be measured with dropout, and an attached optimizer would put its noise on W."""
    model = lora_mlp(lora_dropout=0.5)
    if attached:
        optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model)), model, sigma=0.1, schedule="constant")

    def trains(model, batch):
        model.train()
        return loss_fn(model, batch)

    before = snapshot(model)
    for measure in measures():
        with pytest.raises(ValueError, match=r"loss_fn put the model into train mode.*model\.train\(\)"):
            measure(model, trains, BATCHES)
        assert_as_it_was(model, before)
    assert not (attached and optimizer.is_perturbed)


def test_inside_perturbed_is_refused():
    model = lora_mlp()
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model)), model, sigma=0.1, schedule="constant")
    clean = snapshot(model)
    with optimizer.perturbed():
        before = snapshot(model)
        for measure in measures():
            with pytest.raises(RuntimeError, match=r"is held at W \+ ε by `with optimizer.perturbed\(\)`.*outside"):
                measure(model, loss_fn, BATCHES)
        assert_as_it_was(model, before)
        assert optimizer.is_perturbed
    assert_as_it_was(model, clean)
    flatness.quantization_test(model, loss_fn, BATCHES, formats=("int3",))


@pytest.mark.parametrize("number", range(9))
def test_inside_inference_mode(number):
    model, measure = lora_mlp(), list(measures())[number]
    before, expected = snapshot(model), measure(model, loss_fn, BATCHES)
    with torch.inference_mode():
        found = measure(model, loss_fn, BATCHES)
        assert torch.is_inference_mode_enabled()
    assert str(found) == str(expected)
    assert_as_it_was(model, before)
    cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()


# --- amid another's step ------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """Keeps the model where torch does not find it: a list."""

    def __init__(self, model):
        super().__init__()
        self.models = [model]

    def forward(self, x):
        return self.models[0](x)


def on_the_same_base(model):
    """Another adapter, on the same tensors."""
    return peft.get_peft_model(
        twin_on_the_same_base(model), peft.LoraConfig(r=4, target_modules=["first", "second", "head"])
    )


WITH_TARGETS = {
    "expected_sharpness": {"draws": 2},
    "worst_case_sharpness": {"steps": 2},
    "hessian_trace": {"draws": 2},
    "loss_curve": {"points": 3},
    "sigma_range_test": {"sigmas": (0.1, 5.0), "draws": 2, "threshold": 1e-3},
    "quantization_test": {"formats": ("int3", "int2")},
}


@pytest.mark.filterwarnings("ignore:the loss rises by")
@pytest.mark.parametrize("restore", ["reversible", "copy"])
@pytest.mark.parametrize("where", ["not among its modules", "raw parameters", "another model on the same base"])
@pytest.mark.parametrize("measure", WITH_TARGETS)
def test_measured_amid_a_step_the_weights_come_back_wherever_they_are_found(measure, where, restore):
    model = lora_mlp()
    layers = [getattr(model.get_base_model(), name).base_layer for name in ("first", "second", "head")]
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.3, schedule="constant", restore=restore
    )
    measured, targets = {
        "not among its modules": lambda: (Around(model), model),
        "raw parameters": lambda: (model, [{"params": [layer.weight for layer in layers]}]),
        "another model on the same base": lambda: (on_the_same_base(model), None),
    }[where]()

    def found():
        return str(getattr(flatness, measure)(measured, loss_fn, BATCHES, targets=targets, **WITH_TARGETS[measure]))

    before, expected = [layer.weight.clone() for layer in layers], found()
    loss_fn(model.train(), BATCHES[0]).backward()
    assert not torch.equal(layers[0].weight, before[0])
    assert found() == expected
    assert model.training
    optimizer.step()
    optimizer.detach()
    assert all(torch.equal(layer.weight, b) and not layer.weight.requires_grad for layer, b in zip(layers, before))


@pytest.mark.parametrize("measure", ["worst_case_sharpness", "hessian_trace"])
def test_a_trained_model_that_is_no_part_of_what_was_given_is_told(measure):
    model = lora_mlp().train()
    layer = model.get_base_model().first.base_layer
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.3, schedule="constant")
    before = layer.weight.clone()
    loss_fn(model, BATCHES[0]).backward()
    options = {"targets": [{"params": [layer.weight]}], **WITH_TARGETS[measure]}
    with pytest.raises(ValueError, match="calls one that is in train mode"):
        getattr(flatness, measure)(Around(model), loss_fn, BATCHES, **options)
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("restore", ["reversible", "copy"])
def test_another_model_on_the_same_base_is_merged_amid_a_step(restore):
    model = lora_mlp()
    other, weight = on_the_same_base(model), model.get_base_model().first.base_layer.weight
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.3, schedule="constant", restore=restore
    )
    before = weight.clone()
    loss_fn(model.train(), BATCHES[0]).backward()
    other.merge_adapter()  # B is zero
    optimizer.step()
    assert torch.equal(weight, before)
