"""Modules that share the frozen tensors and are no part of the targets: they read W clean, compiled or not."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_modules

pytest.importorskip("peft")
from helpers import batch, bits, changed, frozen, lora_mlp, trainable, twin_on_the_same_base

from flatopt import FlatPerturbOptimizer
from flatopt.perturbation.hooks import ProcessWide


def wrap(model, targets=None, **settings):
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    return FlatPerturbOptimizer(optimizer, model if targets is None else targets, sigma=0.3, schedule="constant", **settings)


@pytest.fixture
def count():
    """Counts what torch.compile compiles."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    backend.compiled = compiled
    yield backend
    torch._dynamo.reset()


def compiled_in_place(teacher, backend):
    teacher.compile(backend=backend)
    return teacher


TEACHERS = {
    "eager": lambda teacher, backend: teacher,
    "compiled": lambda teacher, backend: torch.compile(teacher, backend=backend),
    "compiled, fullgraph": lambda teacher, backend: torch.compile(teacher, backend=backend, fullgraph=True),
    "compiled in place": compiled_in_place,
}


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("student", ["eager", "compiled"])
def test_a_teacher_beside_torch_compile(model, count, kind, student):
    x, y = batch()
    teacher = TEACHERS[kind](twin_on_the_same_base(model), count)
    with torch.no_grad():
        want = teacher(x).clone()
    before, run = frozen(model), model if student == "eager" else torch.compile(model, backend=count)
    optimizer = wrap(model)
    for step in range(4):
        for _ in range(2):
            loss = nn.functional.cross_entropy(run(x), y)
            assert optimizer.is_perturbed
            with torch.no_grad():
                assert torch.equal(teacher(x), want)
            loss.backward()
            assert optimizer.is_perturbed
        optimizer.step()
        optimizer.zero_grad()
        assert not changed(model, before)
        if step == 0:
            so_far = len(count.compiled)
    assert len(count.compiled) == so_far


@pytest.mark.parametrize("mode", ["no_grad", "eval"])
def test_a_teacher_made_amid_a_step(model, mode):
    x, y = batch()
    with torch.no_grad():
        want = twin_on_the_same_base(model)(x)
    optimizer = wrap(model)
    loss = nn.functional.cross_entropy(model(x), y)
    teacher = twin_on_the_same_base(model).train(mode != "eval")
    with torch.set_grad_enabled(mode == "eval"):
        assert torch.equal(teacher(x), want)
    loss.backward()
    assert optimizer.is_perturbed


class WithTeacher(nn.Module):
    """Calls its teacher inside its own training forward."""

    def __init__(self, teacher, part):
        super().__init__()
        self.student, self.taught = lora_mlp(), None
        teacher = twin_on_the_same_base(self.student)
        self.teacher = teacher if part else [teacher]

    def forward(self, x):
        first = self.student(x)
        with torch.no_grad():
            self.taught = (self.teacher if isinstance(self.teacher, nn.Module) else self.teacher[0])(x)
        return first + self.student(x)


@pytest.mark.parametrize("part", [True, False])
def test_a_teacher_inside_the_students_training_forward(part):
    model = WithTeacher(lora_mlp, part)
    before, (x, y) = frozen(model), batch()
    with torch.no_grad():
        model(x)
    want = model.taught
    optimizer = wrap(model)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x), y)
        assert torch.equal(model.taught, want)
        assert optimizer.is_perturbed
        loss.backward()
        optimizer.step()
        assert not changed(model, before)


COPIES = {
    "state_dict": lambda teacher: teacher.state_dict()["first.weight"],
    "deepcopy": lambda teacher: copy.deepcopy(teacher).first.weight,
    "deepcopy of a layer": lambda teacher: copy.deepcopy(teacher.first).weight,
    "pickle": lambda teacher: pickle.loads(pickle.dumps(teacher)).first.weight,
    "pickle of a layer": lambda teacher: pickle.loads(pickle.dumps(teacher.first)).weight,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("same_object", [True, False])
def test_copies_of_a_teacher_made_amid_a_step(model, how, same_object):
    teacher = twin_on_the_same_base(model)
    if not same_object:
        teacher.first.weight = nn.Parameter(teacher.first.weight.data, requires_grad=False)
    clean = bits(teacher.first.weight).clone()
    optimizer = wrap(model)
    model(batch()[0])
    assert not torch.equal(bits(teacher.first.weight), clean)
    assert torch.equal(bits(COPIES[how](teacher)), clean)
    optimizer.restore()


def test_what_is_loaded_into_a_teacher_amid_a_step_is_there_after_it(model):
    teacher = twin_on_the_same_base(model)
    optimizer = wrap(model)
    model(batch()[0])
    teacher.load_state_dict({name: torch.ones_like(p) for name, p in teacher.state_dict().items()})
    model(batch()[0])
    assert optimizer.is_perturbed
    optimizer.step()
    assert (model.get_base_model().first.base_layer.weight == 1).all()


def test_a_decoder_that_shares_weights_and_trains_under_a_checkpoint(model):
    """Its forward runs without gradients inside an autograd.Function, and again in backward: at the same W."""
    from torch.utils.checkpoint import checkpoint

    decoder, x = twin_on_the_same_base(model), batch()[0].requires_grad_()
    gradients = []
    for reentrant in (False, True):
        optimizer = wrap(model)
        model(batch()[0])
        checkpoint(decoder, x, use_reentrant=reentrant).square().mean().backward()
        gradients.append(x.grad)
        x.grad = None
        optimizer.detach()
    assert torch.equal(*gradients)


def test_no_hook_stays_behind(model):
    teacher = twin_on_the_same_base(model)
    parts = [*teacher.modules(), *model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) for m in parts]
    gc.collect()
    ProcessWide.take_off_ended()  # of other tests' optimizers
    registering = len(torch_modules._global_parameter_registration_hooks)
    optimizer = wrap(model)
    model(batch()[0])
    assert len(teacher.first._forward_pre_hooks) == 1
    assert not torch_modules._global_forward_pre_hooks  # they cost every forward, and torch.compile sees them come and go
    optimizer.detach()
    gc.collect()
    assert hooks == [len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) for m in parts]
    assert len(torch_modules._global_parameter_registration_hooks) == registering


# --- another adapter on the same base, trained by an optimizer of its own ------------------------------------------------


def other_adapter_on(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        twin_on_the_same_base(model), LoraConfig(r=4, target_modules=["first", "second", "head"], init_lora_weights=False)
    )


def gradients_of(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in trainable(model)]


@pytest.mark.parametrize("restore", ["reversible", "copy", "forward"])
@pytest.mark.parametrize("order", ["forward backward", "forwards first", "after the backward"])
def test_another_model_on_the_same_base_trains_at_clean_weights(order, restore):
    torch.manual_seed(0)
    actor = lora_mlp().train()
    critic, before, (x, _) = other_adapter_on(actor).train(), frozen(actor), batch()
    expected = gradients_of(critic, x)
    optimizer = wrap(actor, restore=restore)
    critic.zero_grad()
    for _ in range(2):
        loss = actor(x).square().mean()
        if order == "after the backward":
            loss.backward()
        value = critic(x).square().mean()
        if order == "forwards first":
            value.backward()
            loss.backward()
        else:
            value.backward()
            if order == "forward backward":
                loss.backward()
        for gradient, parameter in zip(expected, trainable(critic)):
            assert torch.equal(parameter.grad, gradient)
        noisy = [p.grad.clone() for p in trainable(actor)]
        critic.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    assert not changed(actor, before)
    assert not all(map(torch.allclose, noisy, gradients_of(actor.eval(), x)))


def test_its_backward_after_that_of_the_perturbed_one_is_refused():
    actor = lora_mlp().train()
    critic, (x, _) = other_adapter_on(actor).train(), batch()
    optimizer = wrap(actor)
    loss, value = actor(x).square().mean(), critic(x).square().mean()
    loss.backward()
    with pytest.raises(RuntimeError, match="or one of another model on the same base"):
        value.backward()
    optimizer.step()


def reentrant(model):
    return lambda x: torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("restore", ["reversible", "copy"])
@pytest.mark.parametrize("kind", ["compiled", "reentrant", "a layer of it"])
def test_another_model_trains_at_clean_weights_whoever_runs_it(kind, restore):
    torch.manual_seed(0)
    actor = lora_mlp().train()
    critic, before, (x, _) = other_adapter_on(actor).train(), frozen(actor), batch()
    expected = gradients_of(critic, x)
    if kind == "a layer of it":
        first = critic.get_base_model().first
        whole = critic.get_base_model()
        whole.forward = lambda x: whole.head(torch.tanh(whole.second(torch.tanh(reentrant(first)(x)))))
        expected = gradients_of(critic, x)
    run = {"compiled": lambda: torch.compile(critic, backend="aot_eager"), "reentrant": lambda: reentrant(critic)}.get(
        kind, lambda: critic
    )()
    optimizer = wrap(actor, restore=restore)
    try:
        for _ in range(2):
            critic.zero_grad()
            loss = actor(x).square().mean()
            run(x).square().mean().backward()
            for gradient, parameter in zip(expected, trainable(critic)):
                torch.testing.assert_close(parameter.grad, gradient)
            loss.backward()
            optimizer.step()
    finally:
        torch._dynamo.reset()
    assert not changed(actor, before)


def test_a_tied_layer_with_an_adapter_of_its_own_follows_its_model():
    from peft import LoraConfig, get_peft_model

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    model = get_peft_model(Tied(), LoraConfig(r=2, target_modules=["first", "last"])).train()
    inner, seen = model.base_model.model, []
    optimizer = wrap(model, targets=[{"modules": inner.first}])
    clean = inner.first.base_layer.weight.clone()
    inner.last.register_forward_hook(lambda *_: seen.append(not torch.equal(inner.first.base_layer.weight, clean)))
    for _ in range(2):
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
    assert seen == [True, True]
