"""The noise itself, bit for bit: hashes of perturbed weights, as ``golden.json`` beside this file has them.

The same key gives the same bits, in every version of flatopt: a run that goes on from a checkpoint goes on with its noise.
Weights and factors are small integers times powers of two, so that every sum of squares is exact, in whatever order a BLAS
or a GPU adds: the hashes hold on every machine. Three paths: ``torch`` on the CPU; ``interpreter``, the Triton kernels in
Triton's interpreter; ``cuda``, the kernels on a GPU of compute capability 9.0, whose own approximations of log, sine and
cosine they use. After a change that is *meant* to change the noise, ``python tests/ops/test_golden.py`` writes a path anew.
"""

import hashlib
import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatopt import FlatPerturbOptimizer

FILE = Path(__file__).with_name("golden.json")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PATH = "interpreter" if INTERPRETED else "cuda" if CUDA else "torch"
DEVICE = "cuda" if PATH == "cuda" else "cpu"
NOISES = ("filter", "layer", "isotropic", "element")
RESTORES = ("reversible", "copy", "subtract")
ROWS, COLUMNS, RANK, SEED = 24, 40, 2, 5
TELLS_PARAMETERS = "target_parameters" in inspect.signature(LoraConfig).parameters  # from PEFT 0.17 on
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def whole(*shape: int, limit: int, multiplier: int) -> torch.Tensor:
    """Scattered integers in [-limit, limit], the same on every machine."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    scattered = (count + 11) * multiplier * 2654435761 % 4294967296 // 65536
    return (scattered % (2 * limit + 1) - limit).double().reshape(shape)


def weight(*shape: int) -> torch.Tensor:
    return whole(*shape, limit=31, multiplier=7) / 1024


class LowRank(nn.Module):
    """A frozen weight with factors, or with their product (``dense``), or with neither (``raw``)."""

    def __init__(self, kind: str, value: torch.Tensor):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(value, requires_grad=False)
        rows, fan_in = value.shape[0], value[0].numel()
        self.A = nn.Parameter(whole(RANK, fan_in, limit=2, multiplier=3).to(value.dtype) / 32)
        self.B = nn.Parameter(whole(rows, RANK, limit=1, multiplier=5).to(value.dtype) / 32)

    def low_rank_base(self):
        return self.weight

    def low_rank_delta(self):
        if self.kind == "dense":
            return (self.B @ self.A.flatten(1)).reshape(self.weight.shape)
        return self.B, self.A, 2.0


def of_peft(base: nn.Module, dtype: torch.dtype, **options) -> nn.Module:
    """``base`` under PEFT's LoRA, weights and factors exact."""
    config = {"r": RANK, "lora_alpha": 2 * RANK, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**config)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(whole(*parameter.shape, limit=2, multiplier=3) / 32)
            elif "lora_B" in name:
                parameter.copy_(whole(*parameter.shape, limit=1, multiplier=5) / 32)
            elif "magnitude" in name:
                parameter.copy_(2.0 ** whole(*parameter.shape, limit=2, multiplier=9).sub(5))
            elif not parameter.requires_grad and parameter.dim() > 1:
                parameter.copy_(weight(*parameter.shape))
    return model


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stacked = nn.Parameter(torch.zeros(3, 8, COLUMNS))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.stacked, x)


class Network(nn.Module):
    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def columns(dtype):
    from transformers.pytorch_utils import Conv1D

    return of_peft(Network(layer=Conv1D(ROWS, COLUMNS)), dtype, target_modules=["layer"], fan_in_fan_out=True)


def lora(dtype, **options):
    return of_peft(Network(layer=nn.Linear(COLUMNS, ROWS)), dtype, target_modules=["layer"], **options)


class ExpertsAsRows(nn.Module):
    """The same weight with the same update as a plain matrix, one expert's rows below the other's: for older PEFT."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(weight(3 * 8, COLUMNS).to(dtype), requires_grad=False)
        self.A = nn.Parameter((whole(3 * RANK, COLUMNS, limit=2, multiplier=3) / 32).to(dtype))
        self.B = nn.Parameter((whole(8, 3 * RANK, limit=1, multiplier=5) / 32).to(dtype))

    def low_rank_base(self):
        return self.weight

    def low_rank_delta(self):
        A, B = self.A.view(3, RANK, COLUMNS), self.B.view(8, RANK, 3)
        return 2.0 * torch.einsum("ore,eri->eoi", B, A).reshape(self.weight.shape)


def experts(dtype):
    if not TELLS_PARAMETERS:
        return ExpertsAsRows(dtype)
    return of_peft(Network(layer=Experts()), dtype, target_modules=[], target_parameters=["layer.stacked"])


# what each weight is -> (how its module is made, the name of the weight in it)
LAYERS = {
    "factors": (lambda dtype: LowRank("factors", weight(ROWS, COLUMNS).to(dtype)), "weight"),
    "dense": (lambda dtype: LowRank("dense", weight(ROWS, COLUMNS).to(dtype)), "weight"),
    "odd": (lambda dtype: LowRank("factors", weight(ROWS + 1, COLUMNS + 1).to(dtype)), "weight"),
    "conv": (lambda dtype: LowRank("factors", weight(ROWS, 8, 3, 3).to(dtype)), "weight"),
    "channels_last": (
        lambda dtype: LowRank("factors", weight(ROWS, 8, 3, 3).to(dtype).to(memory_format=torch.channels_last)),
        "weight",
    ),
    "lora": (lora, "base_model.model.layer.base_layer.weight"),
    "dora": (lambda dtype: lora(dtype, use_dora=True), "base_model.model.layer.base_layer.weight"),
    "columns": (columns, "base_model.model.layer.base_layer.weight"),
    "experts": (experts, "base_model.model.layer.base_layer.stacked" if TELLS_PARAMETERS else "weight"),
}


def digest(tensor: torch.Tensor) -> str:
    words = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(words.numpy().tobytes(), digest_size=8).hexdigest()


def hashes(dtype: str, noise: str, mode: str) -> "dict[str, str]":
    """Layer -> hash of its weight's perturbed bits; the clean bits must come back."""
    # on the kernels' path with float32 the noise is of few bits: their functions may differ in the last one by machine
    sigma = 2.0**-17 if PATH == "interpreter" and dtype == "float32" else 0.05
    models = {name: make(DTYPES[dtype]).to(DEVICE) for name, (make, _) in LAYERS.items()}
    weights = {name: dict(models[name].named_parameters())[where] for name, (_, where) in LAYERS.items()}
    clean = {name: digest(w) for name, w in weights.items()}
    trained = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    raw = nn.Parameter(weight(ROWS, COLUMNS).to(DEVICE, DTYPES[dtype]), requires_grad=False)
    weights["raw"], clean["raw"] = raw, digest(raw)
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(trained, lr=0.0),
        [{"modules": list(models.values())}, {"params": [raw]}],
        sigma=sigma,
        schedule="constant",
        noise=noise,
        restore=mode,
        seed=SEED,
    )
    optimizer.perturb()
    found = {name: digest(w) for name, w in weights.items()}
    optimizer.restore()
    if mode != "subtract":
        assert {name: digest(w) for name, w in weights.items()} == clean
    return found


def cases():
    for dtype in DTYPES:
        for noise in NOISES:
            for mode in RESTORES:
                kernels = dtype != "float64" and noise != "element"
                if PATH == "torch" or (kernels and (noise == "filter" or mode == "reversible")):  # the interpreter is slow
                    yield dtype, noise, mode


def test_the_inputs_sum_exactly():
    """The squares of all merged weights, in units of their last bit, fit a float32's mantissa."""
    total = 0.0
    for make, _ in LAYERS.values():
        total += sum(
            float((p.detach() * 1024).square().sum()) for p in make(torch.float64).parameters() if not p.requires_grad
        )
    assert total * 4 < 2**24


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize(("dtype", "noise", "mode"), list(cases()), ids=str)
def test_perturbed_bits_are_what_they_always_were(dtype, noise, mode):
    if INTERPRETED:
        pytest.importorskip("triton", minversion="3.2", reason="the kernels need Triton 3.2")
    assert hashes(dtype, noise, mode) == json.loads(FILE.read_text())[PATH][f"{dtype}, {noise}, {mode}"]


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_same_by_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton", minversion="3.2", reason="the kernels need Triton 3.2")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def main() -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known[PATH] = {f"{dtype}, {noise}, {mode}": hashes(dtype, noise, mode) for dtype, noise, mode in cases()}
    out = Path(os.environ.get("OUT", FILE.parent)) / FILE.name
    out.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{len(known[PATH])} cases of the path {PATH} written to {out}")


if __name__ == "__main__":
    main()
