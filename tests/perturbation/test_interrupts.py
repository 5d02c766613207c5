"""Ctrl-C and the like, at any time: none is lost, and no weight."""

import signal

import pytest
import torch
from helpers import batch, changed, frozen, lora_mlp, trainable
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatopt import FlatPerturbOptimizer
from flatopt.perturbation import interrupts
from flatopt.perturbation.interrupts import uninterrupted


def leave(number, frame):
    raise SystemExit(number)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def press(request):
    """Raises KeyboardInterrupt, or SystemExit as a job scheduler's SIGTERM does where a program handles it."""
    handler = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: leave}[request.param]
    before = signal.signal(request.param, handler)
    yield lambda: signal.raise_signal(request.param)
    assert signal.signal(request.param, before) is handler  # put back


@pytest.fixture
def run():
    model = lora_mlp()
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    return model, FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant"), frozen(model)


INTERRUPTS = (KeyboardInterrupt, SystemExit)


class PressAt(TorchDispatchMode):
    def __init__(self, k, press):
        super().__init__()
        self.left, self.press = k, press

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= func.namespace != "profiler"
        if self.left == 0:
            self.press()
        return func(*args, **(kwargs or {}))


def goes_on(model, optimizer, before):
    assert optimizer.is_perturbed is bool(changed(model, before))
    steps = optimizer.step_count
    model.train()
    model(batch()[0]).sum().backward()
    assert len(changed(model, before)) == 3
    optimizer.step()
    assert optimizer.step_count == steps + 1
    assert not optimizer.is_perturbed
    assert not changed(model, before)


def no_grad_forward(model):
    with torch.no_grad():
        model(batch()[0])


MOVES = {
    "forward": ((), lambda model, optimizer: model(batch()[0])),
    "suspend": (("forward",), lambda model, optimizer: no_grad_forward(model)),
    "resume": (("forward", "suspend"), lambda model, optimizer: model(batch()[0])),
    "step": (("forward",), lambda model, optimizer: optimizer.step()),
    "restore": (("forward",), lambda model, optimizer: optimizer.restore()),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.filterwarnings("error")
def test_at_any_operation(run, press, move):
    model, optimizer, before = run
    optimizer.optimizer.param_groups[0]["lr"] = 0.0
    for k in range(1, 10_000, 17):
        for each in MOVES[move][0]:
            MOVES[each][1](model, optimizer)
        mode = PressAt(k, press)
        interrupted = True
        try:
            with mode:
                MOVES[move][1](model, optimizer)
            interrupted = False
        except INTERRUPTS:
            pass
        assert interrupted is (mode.left <= 0)
        goes_on(model, optimizer, before)
        if not interrupted:
            return


@pytest.mark.parametrize("place", ["root", "owner", "adapter"])
@pytest.mark.parametrize("kind", ["train", "no grad", "eval"])
def test_inside_a_forward(run, press, place, kind):
    """Marks that a hook after the forward would take off stay: the state must not depend on them."""
    model, optimizer, before = run
    model(batch()[0]).sum().backward()
    inside = model.base_model.model
    module = {"root": inside.head, "owner": inside.second.base_layer, "adapter": inside.first.lora_A["default"]}[place]
    handle = module.register_forward_pre_hook(lambda *_: press())
    model.train(kind != "eval")
    with pytest.raises(INTERRUPTS), torch.set_grad_enabled(kind != "no grad"):
        model(batch()[0])
    handle.remove()
    assert optimizer.is_perturbed is (kind == "train") is bool(changed(model, before))
    goes_on(model, optimizer, before)


def test_then_merging_merges_no_noise(run, press):
    model, _optimizer, _before = run
    expected = lora_mlp()
    expected.load_state_dict(model.state_dict())
    expected = expected.merge_and_unload()
    handle = model.base_model.model.head.register_forward_pre_hook(lambda *_: press())
    with pytest.raises(INTERRUPTS):
        model(batch()[0])
    handle.remove()
    merged = model.merge_and_unload()
    assert all(torch.equal(a, b) for a, b in zip(merged.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize("move", ["restore", "suspend", "step", "detach"])
def test_a_lost_weight_is_told_beside_the_interrupt(run, press, move):
    model, optimizer, before = run
    x, _ = batch()
    model(x)
    with torch.no_grad():
        model.base_model.model.second.base_layer.weight.mul_(2)
    act = torch.no_grad()(lambda: model(x)) if move == "suspend" else getattr(optimizer, move)
    with pytest.raises(INTERRUPTS) as caught, PressAt(1, press):
        act()
    assert "second.weight was written to" in str(caught.value.__context__)
    assert changed(model, before) == ["base_model.model.second.base_layer.weight"]


def test_inside_a_closure_and_inside_backward(run, press):
    model, optimizer, before = run

    def closure():
        loss = model(batch()[0]).sum()
        press()
        return loss

    with pytest.raises(INTERRUPTS):
        optimizer.step(closure)
    assert not optimizer.is_perturbed
    goes_on(model, optimizer, before)
    loss = model(batch()[0]).sum()
    loss.register_hook(lambda grad: press())
    with pytest.raises(INTERRUPTS):
        loss.backward()
    goes_on(model, optimizer, before)


def test_one_that_waits_is_raised_also_where_the_body_raises(press):
    with pytest.raises(INTERRUPTS) as caught, uninterrupted():
        press()
        raise ValueError("of the body")
    assert isinstance(caught.value.__context__, ValueError)


def test_every_handler_runs_though_the_first_raises():
    received = []
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: received.append("term")),
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, lambda *_: received.append("usr1")),
    }
    mine = {number: signal.getsignal(number) for number in before}
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            with uninterrupted():  # as where perturb calls a plan that does the same
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGUSR1)
            assert not received
        assert sorted(received) == ["term", "usr1"]
        assert {number: signal.getsignal(number) for number in before} == mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_one_while_handlers_are_put_back(monkeypatch):
    """The one put back raises at once; those that are not yet back must not swallow signals for the rest of the program."""
    received = []
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: received.append("term")),
    }
    mine = {number: signal.getsignal(number) for number in before}
    put = interrupts.set_handler

    def press_after(number, handler):
        put(number, handler)
        if number == signal.SIGINT and handler is signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            monkeypatch.setattr(interrupts, "set_handler", press_after)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        assert received == ["term"]
        assert {number: signal.getsignal(number) for number in before} == mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_raw_parameters_without_a_forward(press):
    weights = [nn.Parameter(torch.randn(20, 30), requires_grad=False) for _ in range(2)]
    clean = [w.detach().clone() for w in weights]
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = FlatPerturbOptimizer(inner, [{"params": weights}], sigma=0.1, schedule="constant")
    with pytest.raises(INTERRUPTS), optimizer.perturbed():
        press()
    assert all(torch.equal(w, c) for w, c in zip(weights, clean))


def test_a_handler_set_inside_stays():
    before, new = signal.signal(signal.SIGUSR1, lambda *_: None), lambda *_: None
    try:
        with uninterrupted():
            signal.signal(signal.SIGUSR1, new)
        assert signal.getsignal(signal.SIGUSR1) is new
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_thousand_signals_are_all_delivered():
    received = []
    before = signal.signal(signal.SIGALRM, lambda *_: received.append(1))
    try:
        with uninterrupted():
            for _ in range(1500):
                signal.raise_signal(signal.SIGALRM)
            assert not received
        assert len(received) == 1500
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_handler_of_ours_that_was_left_hands_on_and_takes_itself_off():
    """Where a second signal raises while the first one's handlers are put back."""
    block = uninterrupted()
    before = signal.getsignal(signal.SIGINT)
    try:
        with block:
            pass
        signal.signal(signal.SIGINT, block._receive)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
