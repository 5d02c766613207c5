"""restore="forward": the noise enters in the layer's own forward, and W keeps every bit."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatopt.adapters.quantized import format_of, packed_name
from flatopt.core.weight import AdaptedWeight, WeightUpdate, WeightView
from flatopt.noise import normals, row_keys, step_key, sub_key
from flatopt.perturbation.forward import ForwardPlan, detach, forward_reason, unsupported_reason

ROWS, FAN_IN, SIGMA, KEY = 32, 128, 0.1, step_key(seed=0, step=5, rank=0)


# --- layers of every format -----------------------------------------------------------------------------------------------


def plain(dtype=torch.float32):
    return nn.Linear(FAN_IN, ROWS).to(dtype).requires_grad_(False)


def bitsandbytes_4bit(kind, nested=False):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(FAN_IN, ROWS, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu").requires_grad_(False)


def bitsandbytes_int8():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(FAN_IN, ROWS, has_fp16_weights=False)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu").requires_grad_(False)


def torchao(config, **options):
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(plain(torch.bfloat16))
    quantization.quantize_(net, getattr(quantization, config)(**options))
    return net[0].requires_grad_(False)


def hqq(bits, axis):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    return quantize.HQQLinear(plain(), config, compute_dtype=torch.float32, device="cpu").requires_grad_(False)


def quanto(kind):
    optimum = pytest.importorskip("optimum.quanto")
    net = nn.Sequential(plain())
    optimum.quantize(net, weights=getattr(optimum, kind))
    optimum.freeze(net)
    return net[0].requires_grad_(False)


class Packed(nn.Module):
    """A layer in the manner of GPTQ's and AWQ's: it multiplies by a weight that only it can unpack."""

    def __init__(self):
        super().__init__()
        linear = plain()
        self.in_features, self.out_features, self.bias = FAN_IN, ROWS, linear.bias
        self.register_buffer("scales", linear.weight.abs().amax(1, keepdim=True) / 7)
        self.register_buffer("qweight", (linear.weight / self.scales).round().to(torch.int32))

    def forward(self, x):
        return F.linear(x, self.qweight * self.scales, self.bias)


class Fp8(nn.Linear):
    """A layer in the manner of transformers' FP8Linear, in plain arithmetic."""

    def __init__(self):
        super().__init__(FAN_IN, ROWS)
        self.block_size = (16, 64)
        weight = self.weight.detach()
        self.requires_grad_(False)
        self.weight_scale_inv = nn.Parameter(torch.rand(2, 2) + 0.5, requires_grad=False)
        self.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        blocks = self.weight_scale_inv.repeat_interleave(16, 0).repeat_interleave(64, 1)
        return F.linear(x.bfloat16().float(), self.weight.float() * blocks, self.bias)


FORMATS = {
    "bitsandbytes nf4": lambda: bitsandbytes_4bit("nf4"),
    "bitsandbytes nf4, double quantised": lambda: bitsandbytes_4bit("nf4", nested=True),
    "bitsandbytes fp4": lambda: bitsandbytes_4bit("fp4"),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
    "HQQ 4 bit, axis 0": lambda: hqq(4, axis=0),
    "HQQ 4 bit, axis 1": lambda: hqq(4, axis=1),
    "HQQ 2 bit": lambda: hqq(2, axis=1),
    "quanto int8": lambda: quanto("qint8"),
    "quanto int4": lambda: quanto("qint4"),
    "quanto float8": lambda: quanto("qfloat8"),
}
ADDED = {"bitsandbytes int8": bitsandbytes_int8, "packed": Packed, "fp8": Fp8}


def build(make):
    try:
        return make()
    except (RuntimeError, NotImplementedError, ImportError, AssertionError) as error:
        pytest.skip(f"not on this machine: {str(error)[:100]}")


def view_of(layer, index=3, update=None, layout="rows"):
    weight = AdaptedWeight(layer, packed_name(layer), "layer", layer, None, layout)
    return WeightView(weight, index, update=update or WeightUpdate())


def lora_update(rows=ROWS, fan_in=FAN_IN, rank=4):
    return WeightUpdate(((torch.randn(rows, rank), torch.randn(rank, fan_in), 0.5),))


def perturbed(view, noise="filter", key=KEY):
    plan = ForwardPlan([view], noise)
    plan.fill_std(SIGMA)
    plan.perturb(key)
    return plan


def epsilon(shape, index=3, key=KEY):
    """Standard normals of the noise, as the plans that write W draw them."""
    return normals(row_keys(sub_key(key, index), shape[0], torch.device("cpu")), 0, shape[1])


def dequantized(layer):
    name = packed_name(layer)
    return format_of(layer, name).dequantize(layer, getattr(layer, name)).float()


def std_of(weight, update):
    B, A, scaling = update.factors[0]
    return SIGMA * (weight + scaling * B @ A).norm(dim=1, keepdim=True) / weight.shape[1] ** 0.5


def inputs(dtype=torch.float32, shape=(3, 5, FAN_IN)):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# --- every format ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_output_and_gradient_are_those_of_a_dense_layer_at_w_plus_epsilon(make):
    layer = build(make)
    dtype = layer.bias.dtype
    weight, update, x = dequantized(layer), lora_update(), inputs(dtype)
    plan = perturbed(view_of(layer, update=update))
    y = layer(x)
    y.square().sum().backward()
    gradient, x.grad = x.grad, None

    noisy = weight + std_of(weight, update) * epsilon(weight.shape)
    dense = F.linear(x, noisy.to(dtype), layer.bias)
    dense.square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, dense, **close)
    torch.testing.assert_close(gradient, x.grad, **(close if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.5}))


@pytest.mark.parametrize("make", ADDED.values(), ids=ADDED)
def test_a_layer_that_cannot_be_dequantised_gets_x_epsilon_added(make):
    layer = build(make)
    update, x = lora_update(), inputs()
    with torch.no_grad():
        weight = (layer(torch.eye(FAN_IN)) - layer.bias).t()
    clean = layer(x)
    clean.sum().backward()
    clean_gradient, x.grad = x.grad, None

    plan = perturbed(view_of(layer, update=update))
    y = layer(x)
    y.sum().backward()
    eps = std_of(weight, update) * epsilon(weight.shape)
    torch.testing.assert_close(y, clean + x @ eps.t(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y - clean, x @ eps.t(), rtol=2e-2, atol=5e-3)
    torch.testing.assert_close(x.grad - clean_gradient, eps.sum(0).expand_as(x), rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("make", (FORMATS | ADDED).values(), ids=FORMATS | ADDED)
def test_switched_off_the_layer_does_what_it_did(make):
    layer = build(make)
    x = inputs(layer.bias.dtype)
    before = layer(x)
    view = view_of(layer)
    plan = perturbed(view)
    assert not torch.equal(layer(x), before)
    plan.restore()
    assert torch.equal(layer(x), before)
    detach([view.weight])
    assert "forward" not in layer.__dict__
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("make", (FORMATS | ADDED).values(), ids=FORMATS | ADDED)
def test_every_format_is_known_by_name(make):
    layer = build(make)
    assert forward_reason(view_of(layer).weight)


def test_plain_weights_need_no_noise_in_the_forward():
    assert forward_reason(view_of(plain()).weight) is None
    assert unsupported_reason(view_of(plain()).weight, "filter") is None


# --- the same noise as in place -------------------------------------------------------------------------------------------


def conv(kind, **options):
    return getattr(nn, kind)(4, 8, 3, **options).requires_grad_(False)


PLAIN = {
    "linear": (plain, (3, 5, FAN_IN)),
    "conv1d": (lambda: conv("Conv1d", stride=2, padding=1), (2, 4, 12)),
    "conv2d": (lambda: conv("Conv2d", padding="same", groups=2), (2, 4, 6, 7)),
    "conv2d, reflect": (lambda: conv("Conv2d", padding=1, padding_mode="reflect"), (2, 4, 6, 7)),
    "conv2d, channels_last": (lambda: conv("Conv2d", dilation=2).to(memory_format=torch.channels_last), (2, 4, 6, 7)),
    "conv2d, one image": (lambda: conv("Conv2d"), (4, 6, 7)),
    "conv3d": (lambda: conv("Conv3d"), (2, 4, 5, 6, 7)),
}


@pytest.mark.parametrize(("make", "shape"), PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("noise", ["filter", "layer", "element"])
def test_an_fp32_weight_gets_the_noise_of_copy_bit_for_bit(make, shape, noise):
    layer = make()
    view, x = view_of(layer), inputs(shape=shape)
    plan = perturbed(view, noise)
    y = layer(x)
    y.square().sum().backward()
    gradient, x.grad = x.grad, None
    plan.restore()

    with torch.no_grad():  # restore="copy"
        rows = view.weight.rows(layer.weight)
        if noise == "element":
            std = SIGMA * rows.abs()
        else:
            sums = rows.square().sum(1, keepdim=True)
            std = SIGMA * ((sums / rows.shape[1]).sqrt() if noise == "filter" else (sums.sum() / rows.numel()).sqrt())
        if noise != "element":
            torch.testing.assert_close(std.expand_as(plan.std_of(view)), plan.std_of(view))
            std = plan.std_of(view)
        rows.add_(epsilon(rows.shape) * std)
    expected = layer(x)
    expected.square().sum().backward()
    if noise == "element":  # |w| times sigma, in another order
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)
    torch.testing.assert_close(gradient, x.grad)
