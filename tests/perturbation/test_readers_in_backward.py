"""A reader that runs inside backward finds W; what backward itself runs again finds W + ε, as the forward did."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
from helpers import batch, changed, frozen, lora_mlp, trainable

from flatopt import FlatPerturbOptimizer


def wrap(model):
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    return FlatPerturbOptimizer(optimizer, model, sigma=0.3, schedule="constant")


def loss_of(model):
    x, y = batch()
    return nn.functional.cross_entropy(model(x), y)


def gradients(model):
    found = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    return found


READERS = {
    "the model, in train mode": lambda model, x: model(x),
    "the model, in eval mode": lambda model, x: evaluated(model, x),
    "an inner model": lambda model, x: model.get_base_model()(x),
    "a layer": lambda model, x: model.get_base_model().second(torch.ones(2, 32)),
    "one that raises": lambda model, x: failing(model, x),
}


def evaluated(model, x):
    model.eval()
    try:
        return model(x)
    finally:
        model.train()


def failing(model, x):
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 3))
    return model(x)


def by_tensor_hook(model, read):
    def listen(module, args, y):
        if y.requires_grad:
            y.register_hook(lambda gradient: read())

    model.get_base_model().second.register_forward_hook(listen)


def by_module_hook(model, read):
    model.get_base_model().second.register_full_backward_hook(lambda *_: read())


def by_parameter_hook(model, read):
    trainable(model)[-1].register_post_accumulate_grad_hook(lambda p: read())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("listen", [by_tensor_hook, by_module_hook, by_parameter_hook])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_hook_reads_clean_weights_and_the_gradients_are_those_without_it(model, before, reader, listen, create_graph):
    x, seen = batch()[0], []
    with torch.no_grad():
        want = READERS[reader](model, x)
    optimizer = wrap(model)

    def read():
        if reading:
            with torch.no_grad():
                seen.append(READERS[reader](model, x))

    listen(model, read)
    found = []
    for reading in (False, True):  # noqa: B007
        loss_of(model).backward(create_graph=create_graph)
        assert optimizer.is_perturbed
        found.append(gradients(model))
    assert seen
    for each in seen:
        torch.testing.assert_close(each, want)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    optimizer.step()
    assert not changed(model, before)
    assert len(model.get_base_model().second.base_layer._forward_hooks) == 0


def test_a_teacher_read_by_a_hook_is_clean(model, before):
    teacher, x = nn.Linear(16, 32), batch()[0]
    teacher.weight = model.get_base_model().first.base_layer.weight
    want, seen = teacher(x).detach(), []
    optimizer = wrap(model)
    by_tensor_hook(model, lambda: seen.append(teacher(x)))
    loss_of(model).backward()
    assert optimizer.is_perturbed
    torch.testing.assert_close(seen[0], want)
    optimizer.step()
    assert not changed(model, before)


class WithReference(nn.Module):
    """Asks its own layers for a reference without gradients, in a part that is checkpointed."""

    def __init__(self, checkpoints):
        super().__init__()
        self.net, self.checkpoints, self.seen = lora_mlp(), checkpoints, []

    def part(self, x):
        with torch.no_grad():
            reference = self.net.base_model.model(x)
        self.seen.append(reference)
        return self.net(x) * reference

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False) if self.checkpoints else self.part(x)


def test_a_reference_in_a_part_that_is_checkpointed_is_clean_both_times():
    found, x = [], batch()[0]
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = WithReference(checkpoints)
        before, want = frozen(model), model.net(x).detach()
        optimizer = wrap(model)
        model(x).square().sum().backward()
        assert len(model.seen) == 1 + checkpoints
        for each in model.seen:
            torch.testing.assert_close(each, want)
        found.append(gradients(model))
        optimizer.step()
        assert not changed(model, before)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


class Reversible(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1): keeps no activations, and makes x again from y in backward."""

    @staticmethod
    def forward(ctx, x, f, g):
        a, b = x.chunk(2, 1)
        a = a + f(b)
        b = b + g(a)
        ctx.f, ctx.g = f, g
        ctx.save_for_backward(a.detach(), b.detach())
        return torch.cat([a, b], 1)

    @staticmethod
    def backward(ctx, gradient):
        (a, b), (da, db) = ctx.saved_tensors, gradient.chunk(2, 1)
        with torch.no_grad():
            b = b - ctx.g(a)
            a = a - ctx.f(b)
        with torch.enable_grad():
            x = torch.cat([a, b], 1).requires_grad_()
            a, b = x.chunk(2, 1)
            a = a + ctx.f(b)
            b = b + ctx.g(a)
        torch.autograd.backward([a, b], [da, db])
        return x.grad, None, None


class Net(nn.Module):
    def __init__(self, reversible):
        super().__init__()
        self.first, self.second, self.reversible = nn.Linear(8, 8), nn.Linear(8, 8), reversible

    def forward(self, x):
        if self.reversible:
            return Reversible.apply(x.requires_grad_(), self.first, self.second)
        a, b = x.chunk(2, 1)
        a = a + self.first(b)
        return torch.cat([a, b + self.second(a)], 1)


def test_a_reversible_layer_makes_its_input_again_at_noise():
    from peft import LoraConfig, get_peft_model

    found = []
    for reversible in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
        model = get_peft_model(Net(reversible), config)
        before, optimizer = frozen(model), wrap(model)
        model(batch()[0].clone()).square().sum().backward()
        found.append(gradients(model))
        optimizer.step()
        assert not changed(model, before)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_an_unpack_hook_makes_what_it_did_not_keep_at_noise(model, before):
    x, found = batch()[0], []
    optimizer, layer = wrap(model), model.get_base_model().first

    def unpack(packed):
        with torch.no_grad():
            return torch.relu(layer(x)) if packed is None else packed

    for keeps in (True, False):
        y = layer(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t if keeps or t.shape != (8, 32) else None, unpack):  # noqa: B023
            hidden = torch.relu(y)
        model.get_base_model().second(hidden).square().sum().backward()
        found.append(layer.lora_A.default.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*found)
    optimizer.step()
    assert not changed(model, before)


def test_a_checkpoint_is_run_again_as_ever_after_a_reader_that_was_interrupted(model, before):
    optimizer, presses = wrap(model), [True]

    def press(module, args):
        if torch._C._current_graph_task_id() != -1 and presses.pop():
            raise KeyboardInterrupt

    def step(reads):
        y = checkpoint(model, batch()[0], use_reentrant=False)
        if reads:
            y.register_hook(lambda gradient: model(batch()[0]) and None)
        y.square().sum().backward()

    handle = model.get_base_model().second.register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        step(reads=True)
    handle.remove()
    model.zero_grad()
    step(reads=False)
    optimizer.step()
    assert not changed(model, before)


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.get_base_model()], ids=["root", "inner"])
def test_the_gradient_of_what_a_hook_read_in_eval_mode_is_refused_with_the_reason(model, before, part):
    optimizer, x = wrap(model), batch()[0]

    def read():
        with torch.enable_grad():
            torch.autograd.grad(evaluated(part(model), x).sum(), trainable(model))

    trainable(model)[-1].register_post_accumulate_grad_hook(lambda p: read())
    with pytest.raises(RuntimeError, match=r"a forward in eval mode made its graph at clean weights.*without gradients"):
        loss_of(model).backward()
    optimizer.restore()
    assert not changed(model, before)


COMPILED = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="aot_eager"),
    "model.compile()": lambda model: model.compile(backend="aot_eager") or model,
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_read_by_a_hook_is_clean(model, before, how):
    torch._dynamo.reset()
    x, seen, found = batch()[0], [], []
    with torch.no_grad():
        want = model(x)
    run, optimizer = COMPILED[how](model), wrap(model)

    def read():
        with torch.no_grad():
            seen.append(run(x))

    for reading in (False, True):
        y = run(x)
        if reading:
            y.register_hook(lambda gradient: read())
        nn.functional.cross_entropy(y, batch()[1]).backward()
        found.append(gradients(model))
    torch.testing.assert_close(seen, [want])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
    optimizer.step()
    assert not changed(model, before)
    torch._dynamo.reset()


def test_a_hook_that_reads_what_fsdp2_has_gathered_is_refused(model, before, monkeypatch):
    optimizer = wrap(model)
    by_tensor_hook(model, lambda: model(batch()[0]))
    loss = loss_of(model)
    monkeypatch.setattr("flatopt.perturbation.doors.fsdp_modules", lambda roots: [model])
    with pytest.raises(RuntimeError, match=r"by a hook inside backward.*Call it after the backward"):
        loss.backward()
    optimizer.restore()
    assert not changed(model, before)
