"""Whoever steps, loads or wraps what, in which order: the noise is right, or it is said what is wrong."""

import gc
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from helpers import batch, changed, frozen, lora_mlp, trainable

from flatopt import FlatPerturbOptimizer


@pytest.fixture
def bare(model):
    return torch.optim.SGD(trainable(model), lr=0.01)


def wrap(optimizer, model, **settings):
    return FlatPerturbOptimizer(optimizer, model, **{"sigma": 0.3, "schedule": "constant", **settings})


def backward(model):
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()


def noise(model, before):
    now = dict(model.named_parameters())
    return torch.cat([(now[name].detach() - w).flatten() for name, w in before.items()])


@pytest.fixture
def nothing_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def said(act, times=3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            act()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


# --- who steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_said")
def test_the_bare_optimizer_is_stepped(model, before, bare):
    optimizer = wrap(bare, model)
    seen = []
    for step in range(3):
        backward(model)
        seen.append(noise(model, before))
        bare.step()
        bare.zero_grad()
        assert not changed(model, before)
        assert optimizer.step_count == step + 1
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_step_that_a_scaler_skips_keeps_the_noise_and_does_not_count(model, before, bare, wrapped):
    optimizer = wrap(bare, model)
    stepped = optimizer if wrapped else bare
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    x, y = batch()
    counts = []
    for step in range(3):
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step == 1:
            trainable(model)[0].grad.fill_(float("inf"))
        scaler.step(stepped)
        scaler.update()
        stepped.zero_grad()
        counts.append(optimizer.step_count)
    optimizer.restore()
    assert counts == [1, 1, 2]
    assert not changed(model, before)


@pytest.mark.parametrize("order", ["prepare, then wrap", "wrap, then prepare"])
def test_accelerate_counts_optimizer_steps(model, before, bare, order):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    if order == "prepare, then wrap":
        prepared, prepared_bare = accelerator.prepare(model, bare)
        stepped = optimizer = wrap(prepared_bare, prepared)
    else:
        optimizer = wrap(bare, model)
        prepared, stepped = accelerator.prepare(model, optimizer)
    x, y = batch()
    for micro_batch in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
            stepped.step()
            stepped.zero_grad()
        assert optimizer.step_count == (micro_batch + 1) // 2
    optimizer.restore()
    assert not changed(model, before)


class GroupByGroup(torch.optim.Optimizer):
    """Steps the wrapped optimizer once a group, its param groups cut down to that one each time, as ZeRO-1/2 do."""

    def __init__(self, inner):
        self.optimizer = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        groups = self.optimizer.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups


@pytest.mark.usefixtures("nothing_said")
def test_a_step_for_each_group_counts_once(model, before):
    half = len(trainable(model)) // 2
    parts = [{"params": trainable(model)[:half]}, {"params": trainable(model)[half:]}]
    optimizer = wrap(GroupByGroup(torch.optim.SGD(parts, lr=0.01)), model)
    for step in range(3):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_count == step + 1
        assert not changed(model, before)


class Composite(torch.optim.Optimizer):
    """Two optimizers behind one front, as where Muon and Adam share the parameters."""

    def __init__(self, params):
        self.parts = [torch.optim.SGD(params[::2], lr=0.01), torch.optim.AdamW(params[1::2], lr=0.01)]
        super().__init__(params, {})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class ClosureHandedOn(Composite):
    def step(self, closure=None):
        return [part.step(closure) for part in self.parts][-1]


class WithoutInit(Composite):
    def __init__(self, params):
        self.parts = [torch.optim.SGD(params[::2], lr=0.01), torch.optim.AdamW(params[1::2], lr=0.01)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state, self.defaults = {}, {}


@pytest.mark.parametrize("kind", [Composite, ClosureHandedOn, WithoutInit])
@pytest.mark.parametrize("stepped", ["wrapper", "bare"])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.usefixtures("nothing_said")
def test_an_optimizer_of_several_parts(model, before, kind, stepped, closure):
    bare = kind(trainable(model))
    optimizer = wrap(bare, model)
    at = []

    def evaluate():
        backward(model)
        at.append(noise(model, before))
        return torch.zeros(())

    for step in range(2):
        backward(model)
        (bare if stepped == "bare" else optimizer).step(*[evaluate] * closure)
        assert optimizer.step_count == step + 1
        assert not changed(model, before)
    assert all(a.any() for a in at)
    assert len(at) == 2 * closure * (2 if kind is ClosureHandedOn else 1)


def test_parts_that_are_stepped_by_themselves_are_said_once(model):
    bare = Composite(trainable(model))
    optimizer = wrap(bare, model)

    def step():
        backward(model)
        for part in bare.parts:
            part.step()

    told = said(step)
    assert len(told) == 1
    assert "SGD is stepped, which has parameters of the Composite" in told[0]
    assert optimizer.step_count == 0


def test_an_optimizer_that_lacks_what_torch_gives_it_is_refused(model):
    class Lacking(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": params}]

    with pytest.raises(TypeError, match=r"Lacking did not call torch\.optim\.Optimizer\.__init__"):
        wrap(Lacking(trainable(model)), model)


class Hookless(torch.optim.SGD):
    """Its step is not the one that torch's hooks hang on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.step = lambda closure=None: type(self).step.__wrapped__(self)


def test_an_optimizer_without_hooks_is_said_once(model, before):
    optimizer = wrap(Hookless(trainable(model), lr=0.01), model)

    def step():
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        assert not changed(model, before)

    told = said(step)
    assert len(told) == 1
    assert "Hookless steps without running torch's step hooks" in told[0]
    assert optimizer.step_count == 3


def test_an_update_by_hand_is_said_once(model, before, bare):
    optimizer = wrap(bare, model)

    def by_hand():
        for _ in range(6):
            backward(model)
            with torch.no_grad():
                for p in trainable(model):
                    p.sub_(p.grad)
                    p.grad = None

    told = said(by_hand, times=1)
    assert ["no step of the optimizer that FlatPerturbOptimizer wraps is seen" in text for text in told] == [True]
    assert said(by_hand, times=1) == []
    optimizer.restore()
    assert not changed(model, before)


def test_another_optimizer_over_the_same_parameters_is_said_once(model, before, bare):
    optimizer = wrap(bare, model)
    other = torch.optim.AdamW(trainable(model), lr=0.01)

    def step():
        backward(model)
        other.step()
        other.zero_grad()

    told = said(step)
    assert len(told) == 1
    assert "AdamW" in told[0]
    assert "SGD" in told[0]
    optimizer.detach()
    assert not changed(model, before)
    assert not said(other.step)


def test_an_optimizer_of_other_parameters_is_let_be(model, before, bare):
    optimizer = wrap(bare, model)
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    backward(model)
    assert not said(other.step)
    assert optimizer.is_perturbed
    optimizer.step()
    assert not changed(model, before)


# --- loading, clearing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping, the bare one", "after wrapping, the wrapper"])
def test_loading_goes_on_with_the_noise(model, before, bare, when):
    optimizer = wrap(bare, model, seed=7)
    for _ in range(2):
        backward(model)
        optimizer.step()
    state = optimizer.state_dict()
    backward(model)
    want = noise(model, before)
    optimizer.detach()
    bare = torch.optim.SGD(trainable(model), lr=0.01)
    if when == "before wrapping":
        bare.load_state_dict(state)
    optimizer = wrap(bare, model)
    if when != "before wrapping":
        (bare if "bare" in when else optimizer).load_state_dict(state)
    assert (optimizer.seed, optimizer.step_count) == (7, 2)
    backward(model)
    assert torch.equal(noise(model, before), want)


def test_seed_and_step_survive_clear(model, before, bare):
    optimizer = wrap(bare, model, seed=5)
    for _ in range(2):
        backward(model)
        optimizer.step()
    params = list(trainable(model))
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": params})
    backward(model)
    optimizer.step()
    assert (optimizer.seed, optimizer.step_count) == (5, 3)
    assert optimizer.param_groups[0]["flatopt_step"] == 3
    assert not changed(model, before)


# --- wrapping twice, taking over, detaching -----------------------------------------------------------------------------


def test_a_double_wrap_is_refused_through_accelerate_too(model, bare):
    accelerate = pytest.importorskip("accelerate")
    optimizer = wrap(bare, model)
    for doubled in (optimizer, accelerate.Accelerator(cpu=True).prepare(optimizer)):
        with pytest.raises(TypeError, match="FlatPerturbOptimizer already, or wraps one"):
            wrap(doubled, model)


def test_the_newest_takes_over_and_the_old_one_says_so(model, before, bare):
    old = wrap(bare, model)
    backward(model)
    made = []
    told = said(lambda: made.append(wrap(torch.optim.SGD(trainable(model), lr=0.01), model)), times=1)
    assert len(told) == 1
    assert "takes over" in told[0]
    assert not changed(model, before)
    backward(model)
    made[0].step()
    with pytest.raises(RuntimeError, match="detached, since a newer"):
        old.step()
    assert not changed(model, before)


def test_detach_leaves_a_bare_optimizer_and_model(model, before, bare):
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    optimizer = wrap(bare, model)
    backward(model)
    optimizer.detach()
    optimizer.detach()
    assert not changed(model, before)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert not bare._optimizer_step_pre_hooks
    assert not bare._optimizer_step_post_hooks
    backward(model)
    assert not changed(model, before)
    bare.step()
    assert not said(lambda: wrap(bare, model).detach(), times=2)


def test_a_with_block_detaches_after_an_error_too(model, before, bare):
    with pytest.raises(KeyError), wrap(bare, model) as optimizer:
        backward(model)
        assert optimizer.is_perturbed
        raise KeyError
    assert not changed(model, before)
    backward(model)
    assert not changed(model, before)


def test_global_hooks_go_with_the_last_optimizer(model, bare):
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    gc.collect()  # what earlier tests left
    there = len(_global_optimizer_pre_hooks)
    optimizer = wrap(bare, model)
    optimizer.detach()
    assert len(_global_optimizer_pre_hooks) == there
    optimizer = wrap(bare, model)
    del optimizer
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == there


# --- the schedule's length ----------------------------------------------------------------------------------------------


def test_steps_past_the_end_warn_once(model, before, bare):
    optimizer = wrap(bare, model, schedule="linear", total_steps=2)

    def step():
        backward(model)
        optimizer.step()

    assert not said(step, times=2)
    told = said(step, times=3)
    assert len(told) == 1
    assert "step 2 is past total_steps=2" in told[0]
    assert not changed(model, before)


def test_total_steps_may_be_set_later(model, before, bare):
    optimizer = wrap(bare, model, schedule="linear")
    with pytest.raises(ValueError, match="needs total_steps"):
        backward(model)
    assert not changed(model, before)
    optimizer.total_steps = 4
    backward(model)
    optimizer.step()
    assert not changed(model, before)
    assert optimizer.step_count == 1


# --- what is passed on --------------------------------------------------------------------------------------------------


def test_is_second_order_is_there_where_the_wrapped_optimizer_has_it(model):
    class SecondOrder(torch.optim.SGD):
        is_second_order = True

    assert wrap(SecondOrder(trainable(model), lr=0.1), model).is_second_order is True
    del model
    other = lora_mlp()
    optimizer = wrap(torch.optim.SGD(trainable(other), lr=0.1), other)
    assert not hasattr(optimizer, "is_second_order")


class Hessian(torch.optim.SGD):
    """Steps by the Hessian's diagonal, as AdaHessian: through the graph of the gradients."""

    is_second_order = True
    found = ()

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self.param_groups[0]["params"]
        ones = [torch.ones_like(p) for p in parameters]
        self.found = torch.autograd.grad([p.grad for p in parameters], parameters, ones)
        with torch.no_grad():
            for parameter, second in zip(parameters, self.found):
                parameter -= 0.1 * parameter.grad / (1 + second.abs())
                parameter.grad = None  # it and the parameter hold each other
        return loss


@pytest.mark.parametrize("how", ["step", "step after an evaluation", "step(closure)"])
def test_a_second_order_optimizer_goes_through_the_graph_at_noise(model, before, how):
    (x, y), bare = batch(), Hessian(trainable(model), lr=0.1)
    optimizer = wrap(bare, model)

    def closure():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward(create_graph=True)
        return loss

    for step in range(2):
        with optimizer.perturbed():
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), trainable(model), create_graph=True)
            want = torch.autograd.grad(grads, trainable(model), [torch.ones_like(g) for g in grads])
        if how == "step(closure)":
            assert optimizer.step(closure) > 0
        else:
            closure()
            if how == "step after an evaluation":
                with torch.no_grad():
                    model(x)
            optimizer.step()
        assert not changed(model, before)
        assert optimizer.step_count == step + 1
        for found, wanted in zip(bare.found, want):
            torch.testing.assert_close(found, wanted)


def test_a_private_method_of_the_wrapped_class_names_the_way(model):
    class Private(torch.optim.SGD):
        def _get_lr(self):
            return 0.1

    optimizer = wrap(Private(trainable(model), lr=0.1), model)
    with pytest.raises(AttributeError, match=r"'_get_lr'; the Private it wraps has: use optimizer\.optimizer"):
        optimizer._get_lr()
    assert optimizer.optimizer._get_lr() == 0.1
    with pytest.raises(AttributeError, match="object has no attribute 'nonsense'"):
        _ = optimizer.nonsense


# --- steps without noise are told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["the wrapper", "the wrapped"])
def test_a_closure_that_runs_the_model_in_eval_mode_is_told(model, before, bare, by):
    optimizer = wrap(bare, model.eval())

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
        loss.backward()
        return loss

    stepped = optimizer if by == "the wrapper" else optimizer.innermost
    told = said(lambda: stepped.step(closure))
    assert len(told) == 1
    assert "saw no training forward" in told[0]
    assert not changed(model, before)


def test_a_closure_that_trains_and_then_evaluates_is_not(model, before, bare):
    optimizer = wrap(bare, model)

    def closure():
        backward(model)
        with torch.no_grad():
            return nn.functional.cross_entropy(model.eval()(batch()[0]), batch()[1])

    assert said(lambda: (model.train(), optimizer.step(closure))) == []
    assert not changed(model, before)


def test_a_schedule_of_one_step_that_begins_at_0_is_told(model, bare):
    optimizer = wrap(bare, model, schedule="cosine", total_steps=1)
    told = said(lambda: backward(model))
    assert len(told) == 1
    assert "the only step has no noise" in told[0]
    optimizer.detach()
    wrap(bare, model, schedule="constant", total_steps=1)
    assert said(lambda: backward(model)) == []


def test_a_loaded_seed_that_is_another_is_told(model, bare):
    saved = wrap(bare, model, seed=3).state_dict()
    optimizer = wrap(torch.optim.SGD(trainable(lora_mlp()), lr=0.01), lora_mlp(), seed=7)
    told = said(lambda: optimizer.load_state_dict(saved))
    assert len(told) == 1
    assert "seed, 3" in told[0]
    assert "seed=7" in told[0]
    assert optimizer.seed == 3


def test_a_wrapped_seed_that_is_another_is_told(model, bare):
    wrap(bare, model, seed=3).detach()
    told = said(lambda: wrap(bare, model, seed=7).detach(), times=1)
    assert ["seed, 3" in text and "seed=7" in text for text in told] == [True]
    assert said(lambda: wrap(bare, model).detach(), times=1) == []


def test_a_sigma_in_percent_is_told(model, bare):
    told = said(lambda: wrap(bare, model, sigma=5).detach(), times=1)
    assert ["larger than the weights" in text for text in told] == [True]


def test_detached_by_hand_says_so(model, bare):
    optimizer = wrap(bare, model)
    optimizer.detach()
    with pytest.raises(RuntimeError, match=r"detach\(\) was called"):
        optimizer.perturb()


def test_an_optimizer_that_nobody_keeps_is_told_of_once():
    model = lora_mlp()
    bare = torch.optim.SGD(trainable(model), lr=0.1)
    FlatPerturbOptimizer(bare, model, sigma=0.3, schedule="constant")
    gc.collect()
    before = frozen(model)
    for told in (True, False):
        model(batch()[0]).sum().backward()
        with pytest.warns(UserWarning, match="around this SGD is gone, as nothing kept it") if told else nullcontext():
            bare.step()
    assert not changed(model, before)


def test_nor_one_in_whose_place_another_is_by_now():
    """A notebook's cell that is run again; a sweep over sigma."""
    model = lora_mlp()
    bare = torch.optim.SGD(trainable(model), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sigma in (0.1, 0.2):
            optimizer = FlatPerturbOptimizer(bare, model, sigma=sigma, schedule="constant")
            backward(model)
            optimizer.step()
            del optimizer
            gc.collect()


@pytest.mark.parametrize("how", ["detach", "with", "another around it"])
def test_one_that_is_done_with_is_not(how):
    model = lora_mlp()
    bare = torch.optim.SGD(trainable(model), lr=0.1)
    optimizer = FlatPerturbOptimizer(bare, model, sigma=0.3, schedule="constant")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "another around it":
            warnings.filterwarnings("ignore", message=".*the new one takes over")
            optimizer = FlatPerturbOptimizer(bare, model, sigma=0.3, schedule="constant")
        elif how == "with":
            with optimizer:
                pass
        else:
            optimizer.detach()
        if how != "another around it":
            del optimizer
        gc.collect()
        for _ in range(2):
            model(batch()[0]).sum().backward()
            bare.step()
