"""quantization_test: its roundings against formulas and other libraries' quantisers, and no trace left on the model."""

import copy

import pytest
import torch
from helpers import batch, bits, lora_mlp
from torch import nn
from torch.nn.functional import cross_entropy

from flatopt import flatness

BATCHES = [batch(seed=1), batch(seed=2)]


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def both(model, batch):
    logits = model(batch[0])
    return cross_entropy(logits, batch[1]), (logits.argmax(1) == batch[1]).float().mean()


@pytest.mark.parametrize("bits_", [3, 4, 8])
@pytest.mark.parametrize("group", [None, 32, 48, 1000])
def test_symmetric_rounding_is_its_formula(bits_, group):
    w = torch.randn(5, 128)
    got = flatness.rounding(f"int{bits_}" + (f"/{group}" if group else ""))(w)
    for row, rounded in zip(w, got):
        for piece, result in zip(row.split(group or 128), rounded.split(group or 128)):
            scale = piece.abs().max() / (2 ** (bits_ - 1) - 1)
            assert torch.allclose(result, (piece / scale).round() * scale)
            assert len(result.unique()) <= 2**bits_ - 1


def test_asymmetric_rounding_uses_all_levels_between_the_extremes_and_zero():
    w = torch.linspace(-1, 4, 256).view(1, -1)
    got = flatness.rounding("uint4")(w)
    assert len(got.unique()) == 16
    assert (got - w).abs().max() <= 5 / 15 * 0.51
    positive = flatness.rounding("uint4/64")(w.abs() + 1)
    assert (positive - w.abs() - 1).abs().max() <= 5 / 15 * 0.51  # the range still holds 0


@pytest.mark.parametrize("name", ["int4/32", "uint3/32", "nf4/64", "int8"])
def test_zeros_and_values_on_the_grid_stay(name):
    round_to = flatness.rounding(name)
    assert torch.equal(round_to(torch.zeros(3, 40)), torch.zeros(3, 40))
    once = round_to(torch.randn(3, 64))
    assert torch.allclose(round_to(once), once, atol=1e-6)


def test_nf4_is_what_bitsandbytes_does():
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(16, 256)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.allclose(flatness.rounding("nf4/64")(w), theirs, atol=1e-6)


def test_int4_loses_a_little_more_than_ggufs_q4_0():
    quants, np = pytest.importorskip("gguf.quants"), pytest.importorskip("numpy")
    from gguf import GGMLQuantizationType

    w = torch.randn(64, 256)
    packed = quants.quantize(w.numpy(), GGMLQuantizationType.Q4_0)
    theirs = torch.from_numpy(np.array(quants.dequantize(packed, GGMLQuantizationType.Q4_0)))
    ours = flatness.rounding("int4/32")(w)
    assert 0.95 < ((ours - w).norm() / (theirs - w).norm()).item() < 1.15


def test_uint4_is_what_torchao_does():
    quantization = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(256, 16, bias=False)
    w = linear.weight.detach().clone()
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=quantization.PerGroup(64),
        mapping_type=quantization.MappingType.ASYMMETRIC,
    )
    quantization.quantize_(linear, config)
    assert torch.allclose(flatness.rounding("uint4/64")(w), linear.weight.dequantize(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_at_each_format_is_that_of_the_merged_and_rounded_model(dtype):
    model = lora_mlp().to(dtype)
    data = [(x.to(dtype), y) for x, y in BATCHES]
    found = flatness.quantization_test(model, both, data, formats=("int8", "int3/8"))
    merged = copy.deepcopy(model).merge_and_unload().eval()
    expected = [both(merged, b) for b in data]
    assert found.full.loss == pytest.approx(sum(loss.item() for loss, _ in expected) / 2)
    assert found.full.accuracy == pytest.approx(sum(a.item() for _, a in expected) / 2)
    assert found.full.error == 0
    adapted = {n.removesuffix(".base_layer").removeprefix("base_model.model.") for n, _ in model.named_modules()
               if n.endswith(".base_layer")}  # fmt: skip
    for name in ("int8", "int3/8"):
        rounded = copy.deepcopy(merged)
        with torch.no_grad():
            for path, module in rounded.named_modules():
                if path in adapted:
                    module.weight.copy_(flatness.rounding(name)(module.weight.float()))
        expected = sum(loss_fn(rounded, b).item() for b in data) / 2
        assert found.rounded[name].loss == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert found.rounded["int8"].error < 0.02 < found.rounded["int3/8"].error


def test_leaves_no_trace_also_when_the_loss_raises():
    model = lora_mlp().train()
    before, modes = {n: bits(t).clone() for n, t in model.state_dict().items()}, [m.training for m in model.modules()]
    flatness.quantization_test(model, loss_fn, BATCHES)
    assert all(torch.equal(bits(t), before[n]) for n, t in model.state_dict().items())

    calls = []

    def fails(model, batch):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("boom")
        return loss_fn(model, batch)

    with pytest.raises(RuntimeError, match="boom"):
        flatness.quantization_test(model, fails, BATCHES)
    assert all(torch.equal(bits(t), before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


def test_accuracy_is_none_where_loss_fn_gives_none_and_functions_of_your_own_are_formats():
    found = flatness.quantization_test(lora_mlp(), loss_fn, BATCHES, formats={"half": lambda w: w / 2})
    assert found.full.accuracy is None
    assert found.rounded["half"].error == pytest.approx(0.5)
    with pytest.raises(ValueError, match="format 'wrong' must return"):
        flatness.quantization_test(lora_mlp(), loss_fn, BATCHES, formats={"wrong": lambda w: w[:1]})


@pytest.mark.parametrize("name", ["int1", "int9", "int4/0", "fp4", "nf4/", "int4-64"])
def test_a_format_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match="is none of"):
        flatness.rounding(name)


def test_raw_parameters_and_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 3, 5, 5)
    model(x)
    model.requires_grad_(False)
    w = model[0].weight.clone()
    seen = []
    flatness.quantization_test(
        model,
        lambda m, b: (seen.append(m[0].weight.clone()), m(b).square().mean())[1],
        [x],
        formats=("int4",),
        targets=[{"params": [model[0].weight]}],
    )
    expected = flatness.rounding("int4")(w.flatten(1)).view_as(w)
    assert torch.equal(seen[0], w)
    assert torch.allclose(seen[1], expected, atol=1e-6)
    assert torch.equal(model[0].weight, w)
