"""Compiled parts of a model, reached by themselves: they train at W + ε and read W, without compiling anew each step."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from helpers import batch, changed, frozen, lora_mlp, skip_unless_traced_whole, trainable

from flatopt import FlatPerturbOptimizer


def wrap(model, targets=None):
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    return FlatPerturbOptimizer(optimizer, model if targets is None else targets, sigma=0.3, schedule="constant")


@pytest.fixture
def backend():
    """Counts the graphs that torch.compile makes."""
    torch._dynamo.reset()

    def count(graph, inputs):
        count.graphs += 1
        return graph.forward

    count.graphs = 0
    yield count
    torch._dynamo.reset()


def compiled_forward(inner, backend):
    inner.forward = torch.compile(inner.forward, backend=backend)
    return inner


def compiled_in_place(inner, backend):
    inner.compile(backend=backend)
    return inner


DOORS = {
    "model.forward = torch.compile(model.forward)": compiled_forward,
    "torch.compile(model)": lambda inner, backend: torch.compile(inner, backend=backend),
    "model.compile()": compiled_in_place,
    "a function around it": lambda inner, backend: torch.compile(lambda x: inner(x) * 1, backend=backend),
}


def loss_of(run):
    x, y = batch()
    return nn.functional.cross_entropy(run(x), y)


@pytest.mark.parametrize("door", DOORS)
def test_the_model_inside_compiled(door, backend):
    model = lora_mlp()
    x, before = batch()[0], frozen(model)
    with torch.no_grad():
        want = model.get_base_model()(x)
    run = DOORS[door](model.get_base_model(), backend)
    optimizer = wrap(model)
    gradients = []
    for step in range(4):
        for opened_by in (model, run) if step % 2 else (run, model):
            loss_of(opened_by)
            assert len(changed(model, before)) == 3
            with torch.no_grad():
                torch.testing.assert_close(run(x), want)
            assert not changed(model, before)
            optimizer.zero_grad()
            optimizer.perturb()
            loss_of(opened_by).backward()
            gradients.append([p.grad for p in trainable(model)])
        for a, b in zip(gradients[-1], gradients[-2]):  # both doors at the same W + ε
            torch.testing.assert_close(a, b)
        optimizer.step()
        assert not changed(model, before)
        if step == 1:
            so_far = backend.graphs
    assert backend.graphs == so_far


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.still, self.tower = lora_mlp(), lora_mlp()

    def forward(self, x):
        return self.still(x) + self.tower(x)


def test_an_eval_mode_part_of_a_compiled_training_model_breaks_no_graph(backend):
    model = Towers()
    skip_unless_traced_whole(model)
    model.still.eval()
    before, run = frozen(model), torch.compile(model, backend=backend, fullgraph=True)
    optimizer = wrap(model)
    for _ in range(3):
        loss_of(run).backward()
        assert len(changed(model, before)) == 6
        optimizer.step()
        assert not changed(model, before)
    assert backend.graphs == 1


class WithReference(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = lora_mlp()

    def forward(self, x):
        first = self.policy(x)
        with torch.no_grad():
            reference = self.policy(x)
        return first + self.policy(x), reference


def test_a_reference_inside_a_compiled_training_forward_is_clean(backend):
    model, x = WithReference(), batch()[0]
    with torch.no_grad():
        want = model(x)[1]
    before, optimizer = frozen(model), wrap(model)
    plain, _ = model(x)
    optimizer.restore()
    run = torch.compile(model, backend=backend)
    for step in range(3):
        output, reference = run(x)
        torch.testing.assert_close(reference, want)
        optimizer.step_count = 0
        torch.testing.assert_close(output, plain)
        assert optimizer.is_perturbed
        output.sum().backward()
        optimizer.step()
        optimizer.step_count = 0
        assert not changed(model, before)
        if step == 0:
            so_far = backend.graphs
    assert backend.graphs == so_far


def test_perturbed_holds_for_compiled_readers(backend):
    model, x = lora_mlp(), batch()[0]
    inner = model.get_base_model()
    run = torch.compile(inner, backend=backend)
    optimizer = wrap(model)
    with optimizer.perturbed(), torch.no_grad():
        torch.testing.assert_close(run(x), inner(x))
        noisy = run(x)
    with torch.no_grad():
        assert not torch.allclose(run(x), noisy)


def restored(optimizer, model, x):
    model(x).sum().backward()
    optimizer.restore()


def stepped(optimizer, model, x):
    model(x).sum().backward()
    optimizer.step()


def inside_perturbed(optimizer, model, x):
    with optimizer.perturbed():
        model(x)


@pytest.mark.parametrize("use", [restored, stepped, inside_perturbed])
def test_the_moves_are_never_compiled(use):
    # inductor rounds in another order: what it takes off is not what was put on
    torch._dynamo.reset()
    model = lora_mlp(torch.bfloat16)
    before, optimizer = frozen(model), wrap(model)
    run = torch.compile(use)
    for _ in range(2):
        run(optimizer, model, batch(dtype=torch.bfloat16)[0])
        assert not changed(model, before)
    torch._dynamo.reset()
