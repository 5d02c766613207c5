"""functional_call, vmap, threads and inference mode in the middle of a step: right, or an error that says what to do."""

import threading

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from helpers import batch, changed, frozen, lora_mlp, trainable

from flatopt import FlatPerturbOptimizer


def amid_a_step(model, **settings):
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    optimizer = FlatPerturbOptimizer(optimizer, model, **{"sigma": 0.3, "schedule": "constant", **settings})
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    assert optimizer.is_perturbed
    return optimizer


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("restore", ["reversible", "copy"])
def test_reading_by_functional_call_on_copies_amid_a_step(model, before, restore):
    x, y = batch()
    clean = copies(model)
    with torch.no_grad():
        want = torch.func.functional_call(model, clean, (x,))
    optimizer = amid_a_step(model, restore=restore)
    loss = nn.functional.cross_entropy(model(x), y)
    perturbed = frozen(model)
    with torch.no_grad():
        assert torch.equal(want, torch.func.functional_call(model, clean, (x,)))
    assert not changed(model, before)
    loss.backward()
    assert not changed(model, perturbed)  # the same noise
    optimizer.step()
    assert not changed(model, before)
    assert not any(not torch.equal(clean[name], w) for name, w in before.items())


def test_a_training_functional_call_on_copies_leaves_copies_and_weights_as_they_were(model, before):
    x, y = batch()
    given = copies(model)
    kept = {name: p.clone() for name, p in given.items()}
    optimizer = amid_a_step(model)
    nn.functional.cross_entropy(torch.func.functional_call(model, given, (x,)), y)
    assert all(torch.equal(given[name], kept[name]) for name in kept)
    optimizer.step()
    assert not changed(model, before)


def test_a_step_that_a_functional_call_would_open(model, before):
    """The noise goes to what stands in the layers: the copies, or nothing."""
    x, y = batch()
    given = copies(model)
    kept = {name: p.clone() for name, p in given.items()}
    bare = torch.optim.SGD(trainable(model), lr=0.1)
    optimizer = FlatPerturbOptimizer(bare, model, sigma=0.3, schedule="constant")
    try:
        nn.functional.cross_entropy(torch.func.functional_call(model, given, (x,)), y)
        optimizer.restore()
    except RuntimeError as error:
        assert "replaced" in str(error)
    assert not changed(model, before)
    assert not optimizer.is_perturbed
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not changed(model, before)
    assert kept.keys() == given.keys()


def test_vmap_over_inputs(model, before):
    x, _ = batch()
    with torch.no_grad():
        want = torch.stack([model(row) for row in x])
    optimizer = amid_a_step(model)
    with torch.no_grad():
        got = torch.vmap(model)(x)
    torch.testing.assert_close(want, got)
    noisy = torch.vmap(model)(x)
    assert not torch.allclose(noisy, want)
    optimizer.step()
    assert not changed(model, before)


def test_a_step_opened_under_vmap(model, before):
    x, _ = batch()
    bare = torch.optim.SGD(trainable(model), lr=0.1)
    optimizer = FlatPerturbOptimizer(bare, model, sigma=0.3, schedule="constant")
    torch.vmap(model)(x).square().mean().backward()
    assert optimizer.is_perturbed
    optimizer.step()
    assert not changed(model, before)


def evaluated_in_another_thread(model, x):
    """What it was refused with, if it was."""
    said = []

    def evaluate():
        try:
            with torch.no_grad():
                model(x)
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    return said


def test_an_evaluation_in_another_thread_amid_a_step_is_refused(model, before):
    optimizer = amid_a_step(model)
    x, y = batch()
    said = evaluated_in_another_thread(model, x)
    assert len(said) == 1
    assert "another thread" in said[0]
    assert "on a copy of the model" in said[0]
    assert optimizer.is_perturbed
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not changed(model, before)


def test_an_evaluation_in_another_thread_that_is_refused_leaves_the_forward_under_way_as_it_is(model, before):
    optimizer, refused, (x, y) = amid_a_step(model), [], batch()
    want = [p.grad for p in trainable(model)]
    optimizer.zero_grad()

    def meanwhile(module, args):
        if threading.current_thread() is threading.main_thread():
            refused.extend(evaluated_in_another_thread(model, x))

    handle = model.get_base_model().second.register_forward_pre_hook(meanwhile)
    loss = nn.functional.cross_entropy(model(x), y)
    handle.remove()
    assert len(refused) == 1
    assert optimizer.is_perturbed
    loss.backward()
    for parameter, wanted in zip(trainable(model), want):
        assert torch.equal(parameter.grad, wanted)
    optimizer.step()
    assert not changed(model, before)


def test_an_evaluation_in_another_thread_between_steps(model):
    optimizer = amid_a_step(model)
    optimizer.step()
    x, _ = batch()
    outputs = []

    def evaluate():
        with torch.no_grad():
            outputs.append(model(x))

    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    with torch.no_grad():
        assert torch.equal(outputs[0], model(x))


@pytest.mark.parametrize("restore", ["reversible", "copy", "forward"])
def test_inference_mode_amid_a_step(model, before, restore):
    x, y = batch()
    with torch.inference_mode():
        want = model(x)
    optimizer = amid_a_step(model, restore=restore)
    loss = nn.functional.cross_entropy(model(x), y)
    with torch.inference_mode():
        got = model(x)
    assert torch.equal(want, got)
    loss.backward()
    optimizer.step()
    assert not changed(model, before)


def test_a_step_in_inference_mode_and_after_it(model, before):
    optimizer = amid_a_step(model)
    with torch.inference_mode():
        optimizer.restore()
    assert not changed(model, before)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not changed(model, before)


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = lora_mlp()
    with pytest.raises(ValueError, match=r"first.*made under torch\.inference_mode"):
        FlatPerturbOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), model, schedule="constant")


def test_weights_come_back_inside_a_users_own_kind_of_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Mine(FakeTensorMode):
        pass

    model = lora_mlp()
    before = frozen(model)
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, schedule="constant")
    model(batch()[0])
    assert optimizer.is_perturbed
    with Mine():
        optimizer.restore()
    assert not changed(model, before)
