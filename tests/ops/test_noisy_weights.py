"""The kernels that make W + ε, against dequantising and adding the noise by torch's operations."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", minversion="3.2", reason="the kernels need Triton 3.2")

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"
runs = (
    pytest.mark.gpu
    if DEVICE == "cuda"
    else pytest.mark.skipif(not INTERPRETED, reason="no CUDA device; these run again in Triton's interpreter below")
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CLOSE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}  # a unit in the last place


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run as they are")
def test_the_tests_below_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def noise_of(rows, per_row=True):
    std = torch.rand(rows if per_row else 1, 1, device=DEVICE) * 0.02
    return std, torch.tensor([-123456789, 987654321], dtype=torch.int32, device=DEVICE)


def check(made, clean, std, key):
    from flatopt.perturbation.noisy_layers import add_torch_noise_

    expected = add_torch_noise_(clean.clone(), std, key, False)
    assert made.dtype == clean.dtype
    off, size = (made - expected).abs(), clean.abs() + expected.abs()
    assert (off <= CLOSE[made.dtype] * size + 1e-5).all()
    if not (made.dtype == torch.bfloat16 and INTERPRETED):  # Triton's interpreter cuts bfloat16 off
        assert off.float().mean() < 0.01 * (made - clean).float().abs().mean()


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 64), (5, 518), (1, 2)])
@pytest.mark.parametrize("per_row", [True, False])
def test_noise_on_a_plain_weight(dtype, shape, per_row):
    from flatopt.ops.triton.noisy_weights import add_noise_

    weight = torch.randn(shape, dtype=dtype, device=DEVICE)
    std, key = noise_of(shape[0], per_row)
    check(add_noise_(weight.clone(), std, key), weight, std, key)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_noise_on_four_bits(dtype, kind, nested, blocksize):
    bnb = pytest.importorskip("bitsandbytes")
    from flatopt.ops.triton.noisy_weights import noisy_4bit

    shape = 40, 1000  # blocks straddle rows, and there is more than one block of blocks
    options = {"blocksize": blocksize, "compress_statistics": nested, "quant_type": kind, "requires_grad": False}
    weight = bnb.nn.Params4bit(torch.randn(shape, dtype=dtype), **options).to(DEVICE)
    std, key = noise_of(shape[0])
    check(noisy_4bit(weight, std, key), bnb.functional.dequantize_4bit(weight.data, weight.quant_state), std, key)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_noise_on_blocks(dtype, groups, zeros, halves):
    from flatopt.adapters.quantized import Blocks
    from flatopt.ops.triton.noisy_weights import noisy_blocks

    m, n = 34, 70
    low, high = (0, 16) if halves else (-128, 128)
    numbers = torch.randint(low, high, (m, n), device=DEVICE)
    scales = torch.rand(m, groups, 1, device=DEVICE) / 127
    zero = torch.randint(low // 4, high // 4, scales.shape, device=DEVICE) if zeros else None
    clean = ((numbers.view(m, groups, -1) - (zero if zeros else 0)) * scales).view(m, n).to(dtype)
    upper, lower = numbers.view(2, -1)
    elements = ((upper << 4) | lower).to(torch.uint8) if halves else numbers.to(torch.int8)
    std, key = noise_of(m)
    check(noisy_blocks(*Blocks((m, n), elements, scales, zero, halves), std, key, dtype), clean, std, key)


KEPT_AS = {
    "plain": lambda kernels: kernels.PLAIN,
    "nf4": lambda kernels: kernels.FOUR_BITS_TWICE,
    "int8": lambda kernels: kernels.BYTES,
    "torchao int4": lambda kernels: kernels.BYTES,
    "HQQ": lambda kernels: kernels.HALVES,
}


@runs
@pytest.mark.parametrize("kept", KEPT_AS)
def test_a_layers_forward_and_backward_use_them(kept, monkeypatch):
    from flatopt.adapters.quantized import blocks_of
    from flatopt.core.weight import AdaptedWeight, WeightView
    from flatopt.ops.noise import step_key
    from flatopt.ops.triton import noisy_weights as kernels
    from flatopt.perturbation import noisy_layers
    from flatopt.perturbation.forward import ForwardPlan

    layer = torch.nn.Linear(64, 24).requires_grad_(False)
    name = "W_q" if kept == "HQQ" else "weight"
    if kept == "nf4":
        bnb = pytest.importorskip("bitsandbytes")
        quantised = bnb.nn.Linear4bit(64, 24, compute_dtype=torch.float32, quant_type="nf4")
        quantised.load_state_dict(layer.state_dict())
        layer = quantised.requires_grad_(False)
    elif kept == "int8":
        quanto = pytest.importorskip("optimum.quanto")
        net = torch.nn.Sequential(layer)
        quanto.quantize(net, weights=quanto.qint8)
        quanto.freeze(net)
        layer = net[0]
    elif kept == "torchao int4":
        quantization = pytest.importorskip("torchao.quantization")
        granularity = pytest.importorskip("torchao.quantization.granularity").PerGroup(32)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
        quantization.quantize_(torch.nn.Sequential(layer), config)
    elif kept == "HQQ":
        quantize = pytest.importorskip("hqq.core.quantize")
        config = quantize.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
        layer = quantize.HQQLinear(layer, config, compute_dtype=torch.float32, device=DEVICE)
    layer = layer.to(DEVICE)
    assert kept in ("plain", "nf4") or blocks_of(layer, getattr(layer, name)) is not None
    launches = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *some, **more: (launches.append(some[4]), launch(*some, **more))[1])
    plan = ForwardPlan([WeightView(AdaptedWeight(layer, name, "layer", layer, None), 1)], "filter")
    plan.fill_std(0.1)
    plan.perturb(step_key(0, 0, 0))
    x = torch.randn(5, 64, device=DEVICE, requires_grad=True)
    outputs = []
    for device_types in ({DEVICE}, set()):
        monkeypatch.setattr(noisy_layers, "FUSED_ON", device_types)
        y = layer(x)
        y.square().sum().backward()
        outputs += [(y, x.grad)]
        x.grad = None
    assert launches == 2 * [KEPT_AS[kept](kernels)]
    for one, other in zip(*outputs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
