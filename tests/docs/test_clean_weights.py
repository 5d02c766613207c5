"""docs/clean-weights.md, row by row: who sees W and who W + ε in the middle of a step."""

import copy
import io
import pickle

import pytest
import torch

pytest.importorskip("peft")
from helpers import batch, bits, lora_mlp, trainable

from flatopt import FlatPerturbOptimizer


class Spied(torch.nn.Module):
    """A model around the adapted one; ``seen`` gets the first base weight's bits at every forward of its layer."""

    def __init__(self):
        super().__init__()
        self.model, self.seen = lora_mlp(), []
        self.layer = self.model.base_model.model.first.base_layer
        self.layer.register_forward_hook(lambda module, args, output: self.seen.append(bits(module.weight).clone()))

    def forward(self, x):
        return self.model(x)

    @torch.no_grad()
    def generate(self, x):
        return self.model(x)


@pytest.fixture
def amid():
    """A spied model in the middle of a step, its optimizer, and W's clean and perturbed bits."""
    spied = Spied()
    clean = bits(spied.layer.weight).clone()
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(spied), lr=0.1), spied, sigma=0.3, schedule="constant")
    loss = spied(batch()[0]).square().mean()
    perturbed = spied.seen.pop()
    assert not torch.equal(clean, perturbed)
    return spied, optimizer, clean, perturbed, loss


TRAINING = {
    "the model": lambda spied, x: spied(x),
    "a module inside": lambda spied, x: spied.model(x),
    "get_base_model": lambda spied, x: spied.model.get_base_model()(x),
    "a submodule": lambda spied, x: spied.model.base_model.model.first(x),
}


def eval_forward(spied, x):
    spied.eval()
    spied(x)
    spied.train()


def no_grad_forward(spied, x):
    with torch.no_grad():
        spied(x)


def reference(spied, x):
    with torch.no_grad(), spied.model.disable_adapter():
        spied.model(x)


def teacher(spied, x):
    other = torch.nn.Linear(16, 32)
    other.weight = spied.layer.weight
    other.register_forward_pre_hook(lambda module, args: spied.seen.append(bits(module.weight).clone()))
    with torch.no_grad():
        other(x)


READING = {
    "eval mode": eval_forward,
    "without gradients": no_grad_forward,
    "generate": lambda spied, x: spied.generate(x),
    "a reference": reference,
    "a submodule without gradients": torch.no_grad()(lambda spied, x: spied.model.base_model.model.first(x)),
    "a teacher that shares the tensor": teacher,
}


@pytest.mark.parametrize("door", TRAINING)
def test_a_training_forward_through_any_door_opens_the_step(door):
    spied = Spied()
    clean = bits(spied.layer.weight).clone()
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(spied), lr=0.1), spied, sigma=0.3, schedule="constant")
    TRAINING[door](spied, batch()[0]).square().mean().backward()
    assert not torch.equal(spied.seen[-1], clean)
    optimizer.step()
    assert torch.equal(bits(spied.layer.weight), clean)


@pytest.mark.parametrize("reader", READING)
def test_readers_amid_a_step_see_clean_weights_and_the_noise_comes_back(reader, amid):
    spied, optimizer, clean, perturbed, loss = amid
    READING[reader](spied, batch()[0])
    assert spied.seen
    assert all(torch.equal(seen, clean) for seen in spied.seen)
    loss.backward()  # of a graph made at W + ε
    spied(batch()[0])
    assert torch.equal(spied.seen[-1], perturbed)  # the next micro-batch sees the same ε
    optimizer.step()
    assert torch.equal(bits(spied.layer.weight), clean)


def saved(spied):
    file = io.BytesIO()
    torch.save(spied.model, file)
    file.seek(0)
    return torch.load(file, weights_only=False).base_model.model.first.base_layer.weight


COPIES = {
    "state_dict": lambda spied: spied.state_dict()["model.base_model.model.first.base_layer.weight"],
    "deepcopy": lambda spied: copy.deepcopy(spied.model).base_model.model.first.base_layer.weight,
    "pickle": lambda spied: pickle.loads(pickle.dumps(spied.model)).base_model.model.first.base_layer.weight,
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_made_amid_a_step_are_clean(how, amid):
    spied, _, clean, _, _ = amid
    spied.layer._forward_hooks.clear()  # the spy does not pickle
    assert torch.equal(bits(COPIES[how](spied)), clean)


ENDING = {
    "step": lambda spied, optimizer: optimizer.step(),
    "the bare optimizer's step": lambda spied, optimizer: optimizer.optimizer.step(),
    "restore": lambda spied, optimizer: optimizer.restore(),
    "eval": lambda spied, optimizer: optimizer.eval(),
    "detach": lambda spied, optimizer: optimizer.detach(),
}


@pytest.mark.parametrize("end", ENDING)
def test_what_ends_the_step_leaves_clean_weights(end, amid):
    spied, optimizer, clean, _, loss = amid
    loss.backward()
    ENDING[end](spied, optimizer)
    assert torch.equal(bits(spied.layer.weight), clean)


def test_merging_amid_a_step_merges_into_clean_weights(amid):
    spied, _, clean, _, _ = amid
    layer = spied.model.base_model.model.first
    update = layer.get_delta_weight("default")
    merged = spied.model.merge_and_unload().first.weight
    torch.testing.assert_close(merged, clean.view(torch.float32) + update, rtol=0, atol=1e-6)


def test_an_adapter_added_amid_a_step_finds_clean_weights(amid):
    spied, _, clean, _, _ = amid
    spied.model.add_adapter("another", spied.model.peft_config["default"])
    assert torch.equal(bits(spied.layer.weight), clean)


def test_perturbed_holds_for_every_forward_inside(amid):
    spied, optimizer, _, perturbed, _ = amid
    with optimizer.perturbed():
        eval_forward(spied, batch()[0])
        no_grad_forward(spied, batch()[0])
    assert all(torch.equal(seen, perturbed) for seen in spied.seen)


def test_after_an_exception_restore_gives_back_every_bit(amid):
    spied, optimizer, clean, perturbed, _ = amid
    with pytest.raises(RuntimeError):
        spied(torch.randn(2, 3))
    assert torch.equal(bits(spied.layer.weight), perturbed)
    optimizer.restore()
    assert torch.equal(bits(spied.layer.weight), clean)


def test_a_write_by_hand_is_told_at_the_step(amid):
    spied, optimizer, clean, _, loss = amid
    loss.backward()
    second = spied.model.base_model.model.second.base_layer.weight
    with torch.no_grad():
        second.add_(1.0)
    with pytest.raises(RuntimeError, match=r"second.*was written to"):
        optimizer.step()
    assert torch.equal(bits(spied.layer.weight), clean)


def test_reading_the_parameter_by_hand_shows_the_noise(amid):
    spied, _, _, perturbed, _ = amid
    assert torch.equal(bits(spied.layer.weight), perturbed)  # the page says so
