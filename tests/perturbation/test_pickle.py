"""Copies and pickles made amid a step have clean weights, and load where flatopt is not installed."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import batch, bits, frozen, lora_mlp, trainable

from flatopt import SAM, FlatPerturbOptimizer


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def python_pickled(thing):
    file = io.BytesIO()
    pickle._Pickler(file).dump(thing)
    return pickle.loads(file.getvalue())


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = [pickled, python_pickled, saved, copy.deepcopy]
PARTS = {
    "model": "",
    "base model": "base_model.model",
    "adapted layer": "base_model.model.second",
    "base layer": "base_model.model.second.base_layer",
}


@pytest.fixture(params=["reversible", "copy", "forward"])
def run(request):
    model = lora_mlp()
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    before = frozen(model)
    return model, FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant", restore=request.param), before


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("part", PARTS)
def test_amid_a_step(run, part, copier):
    model, optimizer, before = run
    x, _ = batch()
    clean_output = model.eval()(x)
    model.train()
    loss = model(x).sum()
    original = model.get_submodule(PARTS[part])
    other = copier(original)
    for name, weight in other.named_parameters():
        clean = before.get(f"{PARTS[part]}.{name}".lstrip("."))
        if clean is not None:
            assert torch.equal(bits(weight), bits(clean)), name
    if part == "model":
        assert torch.equal(other.eval()(x), clean_output)
    for name, weight in other.named_parameters():
        assert weight.data_ptr() != original.get_parameter(name).data_ptr()
    loss.backward()  # its graph is valid again: the perturbed bits come back
    optimizer.step()
    assert all(torch.equal(bits(model.get_parameter(name)), bits(clean)) for name, clean in before.items())
    # the copy trains on without noise, and moves nothing of the original
    other.train()(x if part in ("model", "base model") else torch.ones(2, 32)).sum()
    assert not optimizer.is_perturbed


LOADS = """
import sys
sys.modules["flatopt"] = None
import torch
for model, clean, x, expected in torch.load(sys.argv[1], weights_only=False):
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in clean.items())
    assert torch.equal(model.eval()(x), expected)
    model.train()(x).sum().backward()
assert not any(name.startswith("flatopt.") for name in sys.modules)
"""


def test_loads_without_flatopt(tmp_path):
    x, _ = batch()
    all_of_them, optimizers = [], []
    for restore in ("reversible", "copy", "forward"):
        for amid in (True, False):
            model = lora_mlp()
            before, expected = frozen(model), model.eval()(x).detach()
            inner = torch.optim.SGD(trainable(model), lr=0.1)
            optimizers.append(FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant", restore=restore))
            if amid:
                model.train()(x)
            all_of_them.append((model, before, x, expected))
    torch.save(all_of_them, tmp_path / "models.pt")
    script = tmp_path / "loads.py"
    script.write_text(LOADS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # of helpers.py
    command = [sys.executable, script, tmp_path / "models.pt"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def named(thing, protocol):
    """What a pickle names of flatopt: loading it looks these up."""
    found = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            found.add(f"{module}.{name}")
            return super().find_class(module, name)

    Unpickler(io.BytesIO(pickle.dumps(thing, protocol))).load()
    return {name for name in found if name.startswith("flatopt")}


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_names_nothing_inside_of_flatopt(run, protocol):
    model, optimizer, _ = run
    raw = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    targets = [{"modules": model.base_model.model.second}, {"params": [raw]}]
    sam = SAM(torch.optim.SGD(trainable(model), lr=0.1), space="full", targets=targets)
    for amid in (False, True):
        if amid:
            model(batch()[0])
        assert named(model, protocol) == set()
        assert named(optimizer, protocol) == {"flatopt.FlatPerturbOptimizer"}
        assert named(sam, protocol) == {"flatopt.SAM"}
    optimizer.detach()
    of_raw = FlatPerturbOptimizer(optimizer.optimizer, targets, schedule="constant")
    assert named(of_raw, protocol) == {"flatopt.FlatPerturbOptimizer"}


def test_inside_perturbed_a_copy_is_what_stands_there(run):
    model, optimizer, before = run
    if optimizer.perturb_groups[0]["restore"] == "forward":
        pytest.skip("W itself is never written to")
    with optimizer.perturbed():
        other = copy.deepcopy(model)
        assert all(torch.equal(other.get_parameter(name), model.get_parameter(name)) for name in before)
    name = "base_model.model.second.base_layer.weight"
    assert not torch.equal(other.get_parameter(name), before[name])
