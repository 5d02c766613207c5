"""restore="forward": the noise enters in the layer's own forward, and W keeps every bit."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import bits, on_every_device, std_in, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatopt import FlatPerturbOptimizer
from flatopt.adapters.forwards import unsupported_reason
from flatopt.adapters.quantized import format_of, packed_name
from flatopt.core.weight import AdaptedWeight, WeightUpdate, WeightView
from flatopt.ops.noise import normals, step_key, weight_key
from flatopt.perturbation import forward
from flatopt.perturbation.forward import ForwardPlan, own_forwards

ROWS, FAN_IN, SIGMA, KEY = 32, 128, 0.1, step_key(seed=0, step=5, rank=0)


# --- layers of every format -----------------------------------------------------------------------------------------------


def plain(device="cpu", dtype=torch.float32):
    return nn.Linear(FAN_IN, ROWS).to(device, dtype).requires_grad_(False)


def bitsandbytes_4bit(kind, device="cpu", nested=False):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(FAN_IN, ROWS, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested)
    layer.load_state_dict(plain().state_dict())
    layer.support_avx512bf16_for_cpu = False  # there a forward in eval mode repacks it, to be trained no more
    return layer.to(device).requires_grad_(False)


def bitsandbytes_int8(device="cpu"):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(FAN_IN, ROWS, has_fp16_weights=False)
    layer.load_state_dict(plain().state_dict())
    return layer.to(device).requires_grad_(False)


def torchao(config, device="cpu", **options):
    quantization = pytest.importorskip("torchao.quantization")
    if "group" in options:
        options["granularity"] = quantization.granularity.PerGroup(options.pop("group"))
    net = nn.Sequential(plain(device, torch.bfloat16))
    quantization.quantize_(net, getattr(quantization, config)(**options))
    return net[0].requires_grad_(False)


def hqq(bits, axis, device="cpu"):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    return quantize.HQQLinear(plain(), config, compute_dtype=torch.float32, device=device).requires_grad_(False)


def quanto(kind, device="cpu"):
    optimum = pytest.importorskip("optimum.quanto")
    net = nn.Sequential(plain(device))
    optimum.quantize(net, weights=getattr(optimum, kind))
    optimum.freeze(net)
    return net[0].requires_grad_(False)


class Packed(nn.Module):
    """A layer in the manner of GPTQ's and AWQ's: it multiplies by a weight that only it can unpack."""

    def __init__(self, device="cpu"):
        super().__init__()
        linear = plain(device)
        self.in_features, self.out_features, self.bias = FAN_IN, ROWS, linear.bias
        self.register_buffer("scales", linear.weight.abs().amax(1, keepdim=True) / 7)
        self.register_buffer("qweight", (linear.weight / self.scales).round().to(torch.int32))

    def forward(self, x):
        return F.linear(x, self.qweight * self.scales, self.bias)


class Fp8(nn.Linear):
    """A layer in the manner of transformers' FP8Linear, in plain arithmetic."""

    def __init__(self, device="cpu"):
        super().__init__(FAN_IN, ROWS, device=device)
        self.block_size = (16, 64)
        weight = self.weight.detach()
        self.requires_grad_(False)
        self.weight_scale_inv = nn.Parameter(torch.rand(2, 2, device=device) + 0.5, requires_grad=False)
        self.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        blocks = self.weight_scale_inv.repeat_interleave(16, 0).repeat_interleave(64, 1)
        return F.linear(x.bfloat16().float(), self.weight.float() * blocks, self.bias)


def gguf(device="cpu"):
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    library = pytest.importorskip("gguf")
    linear = plain()
    kind = library.GGMLQuantizationType.Q8_0
    packed = torch.from_numpy(library.quants.quantize(linear.weight.numpy(), kind))
    layer = utils.GGUFLinear(FAN_IN, ROWS, bias=True, compute_dtype=torch.float32)
    layer.weight = utils.GGUFParameter(packed.to(device), quant_type=kind)
    layer.bias = nn.Parameter(linear.bias.to(device), requires_grad=False)
    return layer.requires_grad_(False)


def gptqmodel(kind, device="cpu"):
    """GPTQ's or AWQ's layer, in gptqmodel's own torch."""
    torch_layers = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{'torch' if kind == 'TorchLinear' else 'torch_awq'}")
    options = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "bias": True, "register_buffers": True}
    layer = getattr(torch_layers, kind)(in_features=FAN_IN, out_features=ROWS, **options)
    linear = plain(dtype=torch.float16)
    scales = linear.weight.view(ROWS, -1, 32).abs().amax(2) / 7
    pack = getattr(layer, "pack_original", layer.pack)  # GPTQ's other ways make tensors that autograd may not save
    pack(linear, scales, torch.full_like(scales, 8), g_idx=torch.arange(FAN_IN, dtype=torch.int32) // 32)
    return layer.to(device).requires_grad_(False)


INT4 = {"weight_dtype": getattr(torch, "int4", None)}
FORMATS = {
    "bitsandbytes nf4": partial(bitsandbytes_4bit, "nf4"),
    "bitsandbytes nf4, double quantised": partial(bitsandbytes_4bit, "nf4", nested=True),
    "bitsandbytes fp4": partial(bitsandbytes_4bit, "fp4"),
    "torchao int8": partial(torchao, "Int8WeightOnlyConfig"),
    "torchao Intx int8": partial(torchao, "IntxWeightOnlyConfig"),
    "torchao int4": partial(torchao, "IntxWeightOnlyConfig", **INT4),
    "torchao int4, groups of 32": partial(torchao, "IntxWeightOnlyConfig", **INT4, group=32),
    "torchao float8": partial(torchao, "Float8WeightOnlyConfig"),
    "HQQ 4 bit, axis 0": partial(hqq, 4, 0),
    "HQQ 4 bit, axis 1": partial(hqq, 4, 1),
    "HQQ 2 bit": partial(hqq, 2, 1),
    "quanto int8": partial(quanto, "qint8"),
    "quanto int4": partial(quanto, "qint4"),
    "quanto float8": partial(quanto, "qfloat8"),
}
ADDED = {
    "bitsandbytes int8": bitsandbytes_int8,
    "GGUF": gguf,
    "GPTQ": partial(gptqmodel, "TorchLinear"),
    "AWQ": partial(gptqmodel, "AwqTorchLinear"),
    "packed": Packed,
    "fp8": Fp8,
}


def build(make, device="cpu"):
    try:
        return make(device)
    except (RuntimeError, NotImplementedError, ImportError, AssertionError) as error:
        pytest.skip(f"not on this machine: {str(error)[:100]}")


def view_of(layer, index=3, update=None, layout="rows"):
    weight = AdaptedWeight(layer, packed_name(layer), "layer", layer, None, layout)
    return WeightView(weight, index, update=update or WeightUpdate())


def lora_update(rows=ROWS, fan_in=FAN_IN, rank=4, device="cpu"):
    return WeightUpdate(((torch.randn(rows, rank).to(device), torch.randn(rank, fan_in).to(device), 0.5),))


def perturbed(view, noise="filter", key=KEY):
    plan = ForwardPlan([view], noise)
    plan.fill_std(SIGMA)
    plan.perturb(key)
    return plan


def epsilon(shape, index=3, key=KEY, device="cpu"):
    """Standard normals of the noise, as the plans that write W draw them."""
    return normals(weight_key(key, index), *shape).to(device)


def dequantized(layer):
    name = packed_name(layer)
    return format_of(layer, name).dequantize(layer, getattr(layer, name)).float()


def std_of(weight, update):
    B, A, scaling = update.factors[0]
    return SIGMA * (weight + scaling * B @ A).norm(dim=1, keepdim=True) / weight.shape[1] ** 0.5


def inputs(dtype=torch.float32, shape=(3, 5, FAN_IN), device="cpu"):
    return torch.randn(*shape).to(device, dtype).requires_grad_()


# --- every format ---------------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_output_and_gradient_are_those_of_a_dense_layer_at_w_plus_epsilon(make, device):
    layer = build(make, device)
    dtype = layer.bias.dtype
    weight, update, x = dequantized(layer), lora_update(device=device), inputs(dtype, device=device)
    perturbed(view_of(layer, update=update))
    y = layer(x)
    y.square().sum().backward()
    gradient, x.grad = x.grad, None

    noisy = weight + std_of(weight, update) * epsilon(weight.shape, device=device)
    dense = F.linear(x, noisy.to(dtype), layer.bias)
    dense.square().sum().backward()
    exact = 1e-5 if device == "cpu" else 1e-4  # the kernels approximate log, sine and cosine
    close = {"rtol": exact, "atol": exact} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, dense, **close)
    torch.testing.assert_close(gradient, x.grad, **(close if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.5}))


@on_every_device
@pytest.mark.parametrize("make", ADDED.values(), ids=ADDED)
def test_a_layer_that_cannot_be_dequantised_gets_x_epsilon_added(make, device):
    layer = build(make, device)
    update, x = lora_update(device=device), inputs(device=device)
    with torch.no_grad():
        weight = (layer(torch.eye(FAN_IN, device=device)) - layer.bias).t()
    clean = layer(x)
    clean.sum().backward()
    clean_gradient, x.grad = x.grad, None

    perturbed(view_of(layer, update=update))
    y = layer(x)
    y.sum().backward()
    eps = std_of(weight, update) * epsilon(weight.shape, device=device)
    torch.testing.assert_close(y, clean + x @ eps.t(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y - clean, x @ eps.t(), rtol=2e-2, atol=5e-3)
    torch.testing.assert_close(x.grad - clean_gradient, eps.sum(0).expand_as(x), rtol=2e-2, atol=5e-3)


@on_every_device
@pytest.mark.parametrize("make", (FORMATS | ADDED).values(), ids=FORMATS | ADDED)
def test_switched_off_the_layer_does_what_it_did(make, device):
    layer = build(make, device)
    x = inputs(layer.bias.dtype, device=device)
    before = layer(x)
    view = view_of(layer)
    plan = perturbed(view)
    assert not torch.equal(layer(x), before)
    plan.restore()
    assert torch.equal(layer(x), before)
    own_forwards([view.weight])
    assert "forward" not in layer.__dict__
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("make", (FORMATS | ADDED).values(), ids=FORMATS | ADDED)
def test_every_format_is_known_by_name(make):
    layer = build(make)
    assert format_of(layer, packed_name(layer)).name


def test_an_empty_weight_beside_the_packed_one_is_passed_by(monkeypatch):
    layer = build(FORMATS["HQQ 4 bit, axis 1"])
    monkeypatch.setattr(type(layer), "weight", property(lambda layer: torch.empty(0)), raising=False)  # transformers 5.17
    assert packed_name(layer) == "W_q"
    assert format_of(layer, packed_name(layer)).name == "HQQ"


def test_plain_weights_need_no_noise_in_the_forward():
    assert format_of(plain(), "weight") is None
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
            torch.testing.assert_close(std.expand_as(std_in(plan, view)), std_in(plan, view))
            std = std_in(plan, view)
        rows.add_(epsilon(rows.shape) * std)
    expected = layer(x)
    expected.square().sum().backward()
    if noise == "element":  # |w| times sigma, in another order
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)
    torch.testing.assert_close(gradient, x.grad)


@pytest.mark.parametrize("noise", ["filter", "layer", "element"])
def test_an_embedding_gets_the_noise_of_its_rows(noise):
    table = nn.Embedding(ROWS, FAN_IN).requires_grad_(False)
    tokens = torch.tensor([[3, 0, 31], [3, 7, 1]])
    plan = perturbed(view_of(table), noise)
    std = std_in(plan, plan.views[0])
    std = std * table.weight.abs() if noise == "element" else std
    expected = F.embedding(tokens, table.weight + epsilon(table.weight.shape) * std)
    torch.testing.assert_close(table(tokens), expected)


def test_a_weight_stored_transposed_gets_the_noise_of_its_rows():
    layers = pytest.importorskip("transformers.pytorch_utils")
    layer = layers.Conv1D(ROWS, FAN_IN).requires_grad_(False)
    update, x = lora_update(), inputs()
    perturbed(view_of(layer, update=update, layout="columns"))
    rows = layer.weight.t()
    expected = F.linear(x, rows + epsilon(rows.shape) * std_of(rows, update), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_isotropic_noise_has_one_std_for_all_weights():
    layers = [plain(), bitsandbytes_4bit("nf4")]
    plan = ForwardPlan([view_of(layer, index=i + 1) for i, layer in enumerate(layers)], "isotropic")
    plan.fill_std(SIGMA)
    weights = [layers[0].weight, dequantized(layers[1])]
    rms = torch.cat([w.flatten() for w in weights]).square().mean().sqrt()
    for view in plan.views:
        torch.testing.assert_close(std_in(plan, view), (SIGMA * rms).view(1, 1))


@pytest.mark.parametrize("make", [Packed, partial(bitsandbytes_4bit, "nf4")], ids=["packed", "nf4"])
@pytest.mark.parametrize("kind", ["none", "factors", "two", "dense", "row_norm"])
@pytest.mark.parametrize("batched_on", [{"cuda"}, {"cuda", "cpu"}], ids=["one by one", "together"])
def test_the_std_follows_the_merged_weight(make, kind, batched_on, monkeypatch):
    monkeypatch.setattr(forward, "BATCHED_ON", batched_on)
    layer = make()
    weight = (layer(torch.eye(FAN_IN)) - layer.bias).t().detach()
    (one,), (two,) = lora_update().factors, lora_update(rank=2).factors
    dense = torch.randn(ROWS, FAN_IN)
    added = {"none": 0, "factors": one[2] * one[0] @ one[1], "dense": dense, "row_norm": 0}
    added["two"] = added["factors"] + two[2] * two[0] @ two[1]
    norm = torch.rand(ROWS) if kind == "row_norm" else (weight + added[kind]).norm(dim=1)
    updates = {
        "none": WeightUpdate(),
        "factors": WeightUpdate((one,)),
        "two": WeightUpdate((one, two)),
        "dense": WeightUpdate(dense=dense),
        "row_norm": WeightUpdate(row_norm=norm),
    }
    plan = perturbed(view_of(layer, update=updates[kind]))
    torch.testing.assert_close(std_in(plan, plan.views[0]).flatten(), SIGMA * norm / FAN_IN**0.5, rtol=1e-4, atol=1e-5)


# --- a step ---------------------------------------------------------------------------------------------------------------


def nf4(device="cpu"):
    return bitsandbytes_4bit("nf4", device)


def test_every_forward_of_a_step_sees_the_same_noise_and_the_next_step_another():
    layer, x = nf4(), inputs()
    plan = perturbed(view_of(layer))
    first = layer(x)
    assert torch.equal(layer(x), first)
    plan.restore()
    plan.perturb(KEY)  # after an evaluation amid the step
    assert torch.equal(layer(x), first)
    plan.restore()
    plan.perturb(step_key(0, 6, 0))
    assert not torch.equal(layer(x), first)


def test_an_evaluation_amid_a_step_leaves_its_graph_valid():
    layer, x = nf4(), inputs()
    plan = perturbed(view_of(layer))
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    y = layer(x)
    plan.restore()
    with torch.no_grad():
        layer(x)
    plan.perturb(KEY)
    y.sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("change", ["key", "std", "weight"])
def test_backward_through_a_noise_that_is_gone_raises(change):
    layer, x = plain(), inputs()
    plan = perturbed(view_of(layer))
    y = layer(x)
    if change == "key":
        plan.perturb(step_key(0, 6, 0))
    elif change == "std":
        plan.fill_std(SIGMA / 2)
    else:
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputation_sees_the_same_noise(reentrant):
    layer, x = nf4(), inputs()
    perturbed(view_of(layer))
    torch.tanh(layer(x)).square().sum().backward()
    expected, x.grad = x.grad, None
    y = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(layer(x)), x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [plain, nf4, partial(quanto, "qint8")], ids=["plain", "nf4", "quanto"])
def test_nothing_of_the_size_of_the_weight_is_saved_for_backward(make):
    layer = build(make)
    view, x = view_of(layer), inputs(shape=(2, FAN_IN))
    perturbed(view)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    parameter = view.weight.parameter
    assert all(t is parameter or t.data_ptr() == parameter.data_ptr() or t.numel() <= 2 * ROWS for t in saved)


def test_the_bias_and_the_gradient_of_the_gradient():
    layer = plain(dtype=torch.float64)
    layer.bias.requires_grad_(True)
    perturbed(view_of(layer))
    x = inputs(torch.float64, shape=(2, 3, FAN_IN))
    assert torch.autograd.gradcheck(lambda x, b: layer(x) ** 2, (x, layer.bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x) ** 2, (x,), fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 4, 6, 7)])
def test_gradients_of_a_convolution(shape):
    layer = nn.Sequential(conv("Conv1d" if len(shape) == 3 else "Conv2d", padding=1).double())[0]
    layer.bias.requires_grad_(True)
    perturbed(view_of(layer))
    x = inputs(torch.float64, shape=shape)
    assert torch.autograd.gradcheck(lambda x, b: layer(x) ** 2, (x, layer.bias), fast_mode=True)


@pytest.mark.parametrize("make", [plain, nf4], ids=["plain", "nf4"])
def test_autocast_computes_in_the_type_the_layer_itself_would(make):
    layer, x = make(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        clean = layer(x)
        perturbed(view_of(layer))
        noisy = layer(x)
    assert noisy.dtype == clean.dtype
    noisy.float().sum().backward()
    assert x.grad.dtype == torch.float32


# --- whoever handles the layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain, nf4], ids=["plain", "nf4"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_model_has_no_noise(make, copied):
    net, x = nn.Sequential(make()), inputs()
    clean = net(x)
    plan = perturbed(view_of(net[0]))
    twin = copied(net)
    assert torch.equal(twin(x), clean)
    assert not torch.equal(net(x), clean)
    plan.restore()
    assert torch.equal(copied(twin)(x), clean)


@pytest.mark.parametrize("make", [plain, nf4], ids=["plain", "nf4"])
def test_state_dict_and_parameters_keep_every_bit(make):
    net = nn.Sequential(make())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    perturbed(view_of(net[0]))
    net(inputs()).sum().backward()
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if tensor.dim())


def test_accelerates_hooks_go_on_around_the_noise():
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def pre_forward(self, module, x):
            return (2 * x,), {}

    layer, x = plain(), inputs()
    hooks.add_hook_to_module(layer, Doubled())
    view = view_of(layer)
    plan = perturbed(view)
    y = layer(x)
    expected = F.linear(2 * x, layer.weight + epsilon(layer.weight.shape) * std_in(plan, view), layer.bias)
    torch.testing.assert_close(y, expected)
    own_forwards([view.weight])
    assert torch.equal(layer(x), F.linear(2 * x, layer.weight, layer.bias))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_new_plan_takes_the_layer_over():
    layer, x = plain(), inputs()
    first = perturbed(view_of(layer))
    first.restore()
    view = view_of(layer, index=4)
    plan = perturbed(view)
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight + epsilon((ROWS, FAN_IN), 4) * std_in(plan, view), layer.bias)
    )
    own_forwards([view.weight])
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("make", [plain, nf4, partial(torchao, "Int8WeightOnlyConfig")], ids=["plain", "nf4", "torchao"])
def test_compiled_without_a_break_once_for_all_steps(make):
    layer = build(make)
    net = nn.Sequential(layer, nn.Tanh())
    compilations, x = [], inputs(layer.bias.dtype)

    def backend(graph, example):
        from torch._dynamo.backends.debugging import aot_eager

        compilations.append(graph)
        return aot_eager(graph, example)

    plan = perturbed(view_of(layer))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for step in range(4):
        plan.restore()
        plan.fill_std(0.1 + 0.01 * step)
        plan.perturb(step_key(0, step, 0))
        y = compiled(x)
        y.float().square().sum().backward()
        gradient, x.grad = x.grad, None
        expected = net(x)
        expected.float().square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradient, x.grad)
        x.grad = None
    assert len(compilations) == 1
    plan.restore()
    assert torch.equal(compiled(x), net(x))


def test_layers_that_a_fused_kernel_passes_over_are_named_once():
    layers = [plain(), plain()]
    plan = ForwardPlan(
        [WeightView(AdaptedWeight(layer, "weight", f"layers.{i}", layer, None), i) for i, layer in enumerate(layers)],
        "filter",
    )
    plan.fill_std(SIGMA)

    def step(number):
        plan.perturb(step_key(0, number, 0))
        x = layers[0](inputs())
        F.linear(x[..., :1].expand(*x.shape[:-1], FAN_IN), layers[1].weight)  # as such a kernel reads it
        plan.restore()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(0)
    with pytest.warns(UserWarning, match=r"1 of 2 layers .* did not run it .*: layers\.1\. .*fused kernels"):
        step(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(2)


# --- the optimizer --------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.B, self.A = layer, nn.Parameter(torch.randn(ROWS, 4)), nn.Parameter(torch.randn(4, FAN_IN))

    def low_rank_base(self):
        return self.layer.weight

    def low_rank_delta(self):
        return self.B, self.A, 0.5

    def forward(self, x):
        return self.layer(x) + 0.5 * x @ self.A.t() @ self.B.t()


@pytest.mark.parametrize("noise", ["filter", "layer", "isotropic", "element"])
def test_a_run_with_noise_in_the_forward_is_the_run_with_a_copy(noise):
    runs = []
    for restore in ("copy", "forward"):
        torch.manual_seed(0)
        net = nn.Sequential(Adapted(plain()), nn.Tanh())
        bare = torch.optim.AdamW([net[0].A, net[0].B], lr=1e-2)
        optimizer = FlatPerturbOptimizer(bare, net, sigma=0.3, schedule="constant", noise=noise, restore=restore)
        for _ in range(4):
            net(torch.randn(8, FAN_IN)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([net[0].A.detach().clone(), net[0].B.detach().clone()])
        optimizer.detach()
        assert "forward" not in net[0].layer.__dict__
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_every_format_trains_under_the_optimizer(make):
    layer = build(make)
    if packed_name(layer) != "weight":
        pytest.skip("PEFT's own layers hold it")
    net, x = nn.Sequential(Adapted(layer)).to(layer.bias.dtype), torch.randn(8, FAN_IN, dtype=layer.bias.dtype)
    bare = torch.optim.SGD([net[0].A, net[0].B], lr=1e-3)
    with FlatPerturbOptimizer(bare, net, sigma=0.3, schedule="constant") as optimizer:
        clean = net.eval()(x)
        outputs = []
        for _ in range(2):
            outputs.append(net.train()(x))
            outputs[-1].float().sum().backward()
            assert torch.equal(net.eval()(x), clean)
            assert torch.equal(net.train()(x), outputs[-1])
            net[0].A.grad = net[0].B.grad = None  # the noise alone is to change
            optimizer.step()
        assert not torch.equal(outputs[0], clean)
        assert not torch.equal(outputs[0], outputs[1])


PEFTS_OWN = {**FORMATS, **{name: make for name, make in ADDED.items() if name not in ("packed", "fp8")}}


def packed_bits(module):
    """Everything a module keeps, as bits by name; torchao's and quanto's tensors, which wrap others, taken apart."""
    found, left = {}, [(name, t) for name, t in module.state_dict().items() if isinstance(t, torch.Tensor)]
    while left:
        name, tensor = left.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            left += [(f"{name}.{inner}", getattr(tensor, inner)) for inner in tensor.__tensor_flatten__()[0]]
        else:
            found[name] = bits(tensor).clone()
    return found


def off(one, other):
    """How far ``one`` is from ``other``, as a share of it."""
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def precision(layer):
    """How exact a layer computes. Noise is some 0.3 of its output in the test below."""
    if type(layer.weight if hasattr(layer, "weight") else None).__name__ == "Int8Params":
        return 3e-2  # it rounds its inputs to 8 bits
    return 1e-4 if layer.bias.dtype == torch.float32 else 1e-2


@torch.no_grad()
def quiet(model, x):
    return model.eval()(x)


@on_every_device
@pytest.mark.parametrize("make", PEFTS_OWN.values(), ids=PEFTS_OWN)
def test_every_format_trains_through_peft_as_its_numbers_do_with_a_copy(make, device):
    peft = pytest.importorskip("peft")
    layer, dense = build(make, device), plain(device)
    dtype, close, packed = layer.bias.dtype, precision(layer), packed_bits(layer)
    with torch.no_grad():
        dense.bias.copy_(layer.bias)
        known = format_of(layer, packed_name(layer)).dequantize is not None
        dense.weight.copy_(dequantized(layer) if known else (layer(torch.eye(FAN_IN, device=device)) - layer.bias).t())
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    net = nn.Sequential(layer)
    net.register_parameter("another", nn.Parameter(torch.zeros(1, device=device), requires_grad=False))  # PEFT looks for one
    try:
        model = peft.get_peft_model(net, config)
    except (TypeError, ValueError, AttributeError) as error:
        pytest.skip(f"PEFT: {str(error)[:100]}")
    twin = peft.get_peft_model(nn.Sequential(dense), config)
    for parameter, other in zip(trainable(model), trainable(twin), strict=True):
        other.data.copy_(parameter)
    options = {"sigma": 0.3, "schedule": "constant"}
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=1e-3), model, **options)
    reference = FlatPerturbOptimizer(torch.optim.SGD(trainable(twin), lr=1e-3), twin, restore="copy", **options)

    for _ in range(2):
        batches = [inputs(dtype, (8, FAN_IN), device) for _ in range(2)]
        cleans = [(model.eval()(x), twin.eval()(x.float()), quiet(model, x)) for x in batches]
        for x, (clean, clean_twin, without_gradients) in zip(batches, cleans):
            y = model.train()(x)
            y.float().square().sum().backward()
            z = x.detach().float().requires_grad_()
            expected = twin.train()(z)
            expected.square().sum().backward()
            assert off(y, expected) < close
            assert off(x.grad, z.grad) < close
            assert off(y - clean, expected - clean_twin) < 8 * close < off(clean, y)

            assert torch.equal(model.eval()(x), clean)
            assert torch.equal(quiet(model, x), without_gradients)
            assert torch.equal(checkpoint(model.train(), x, use_reentrant=False), y)
        for parameter, other in zip(trainable(model), trainable(twin), strict=True):
            assert off(parameter.grad, other.grad) < close
        optimizer.step(), reference.step()
        optimizer.zero_grad(), reference.zero_grad()
    now = packed_bits(layer)
    assert now.keys() == packed.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in packed.items())
    optimizer.detach(), reference.detach()


# --- refused by name ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_the_same_noise_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, tokens):
            return 2 * super().forward(tokens)

    assert "Scaled.forward" in unsupported_reason(view_of(Scaled(8, 4)).weight, "filter")
    assert "element" in unsupported_reason(view_of(Packed()).weight, "element")
    with pytest.raises(ValueError, match=r"layer cannot get noise in the forward: .*reversible"):
        ForwardPlan([view_of(Scaled(8, 4))], "filter")


def test_dora_with_dropout_is_refused():
    peft = pytest.importorskip("peft")
    for dropout, refused in ((0.0, False), (0.1, True)):
        config = peft.LoraConfig(target_modules=["0"], use_dora=True, lora_dropout=dropout)
        layer = peft.get_peft_model(nn.Sequential(plain()), config).base_model.model[0]
        weight = AdaptedWeight(layer.base_layer, "weight", "layer", layer, None)
        assert (unsupported_reason(weight, "filter") is not None) == refused


def test_dora_gets_the_same_noise_and_divides_by_the_norm_of_the_clean_weight():
    """In place it divides by that of the perturbed one: docs/quantized-bases.md says by how much that differs."""
    peft = pytest.importorskip("peft")
    x, found, weight = torch.randn(8, FAN_IN), {}, plain().weight
    for restore in ("copy", "forward"):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
        base = nn.Linear(FAN_IN, ROWS, bias=False)
        base.weight = nn.Parameter(weight.detach().clone())
        model = peft.get_peft_model(nn.Sequential(base), config)
        bare = torch.optim.SGD(trainable(model), lr=1e-3)
        optimizer = FlatPerturbOptimizer(bare, model, sigma=0.3, schedule="constant", restore=restore)
        with optimizer.perturbed():
            found[restore] = model(x).detach()
            (plan,) = optimizer._weights._plans
        layer = model.base_model.model[0]
    update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach() * layer.scaling["default"]
    merged, magnitude = weight.detach() + update, layer.lora_magnitude_vector["default"].weight.detach().unsqueeze(1)
    noise = std_in(plan, plan.views[0]) * normals(weight_key(step_key(0, 0, 0), plan.views[0].index), ROWS, FAN_IN)
    for restore, divisor in (("copy", merged + noise), ("forward", merged)):
        expected = x @ ((merged + noise) * magnitude / divisor.norm(dim=1, keepdim=True)).t()
        torch.testing.assert_close(found[restore], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "name"), [(plain, "input"), (bitsandbytes_int8, "x")])
def test_a_layer_called_by_keyword(make, name):
    net, x = Adapted(make().requires_grad_(False)), torch.randn(8, FAN_IN)
    bare, clean = torch.optim.SGD([net.A, net.B], lr=1e-3), net.layer(x)
    optimizer = FlatPerturbOptimizer(bare, net, sigma=0.3, schedule="constant", restore="forward")
    with optimizer.perturbed():
        torch.testing.assert_close(net.layer(**{name: x}), net.layer(x))
        assert not torch.equal(net.layer(x), clean)
