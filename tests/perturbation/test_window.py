"""When W is perturbed: from the first training forward of a step to ``step()``, with one draw, and at no other time."""

import copy
import gc
import math
import warnings

import pytest
import torch
from helpers import batch, bits, changed, frozen, lora_mlp, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatopt import FlatPerturbOptimizer

EXACT = ["reversible", "copy"]
MODES = [*EXACT, "subtract"]


def wrap(model, **options):
    options = {"sigma": 0.2, "schedule": "constant", **options}
    inner = torch.optim.SGD(trainable(model), lr=options.pop("lr", 0.1))
    return FlatPerturbOptimizer(inner, options.pop("targets", model), **options)


def loss_of(model, seed=0):
    x, y = batch(seed=seed)
    return nn.functional.cross_entropy(model(x), y)


def noise_now(model, before):
    return {name: p.detach() - before[name] for name, p in model.named_parameters() if name in before}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("restore", MODES)
def test_one_draw_a_step_for_all_micro_batches(model, before, restore):
    optimizer = wrap(model, restore=restore)
    steps = []
    for _ in range(3):
        start = frozen(model)
        draws = []
        for micro in range(3):
            loss_of(model, micro).backward()
            draws.append(noise_now(model, start))
        assert same(draws[0], draws[1])
        assert same(draws[0], draws[2])
        steps.append(draws[0])
        optimizer.step()
        optimizer.zero_grad()
    for name in before:
        if "base_layer.weight" in name:
            assert not any(torch.equal(a[name], b[name]) for a, b in [steps[:2], steps[1:], steps[::2]])
    if restore != "subtract":
        assert not changed(model, before)


def test_perturbed_exactly_between_forward_and_step(model, before):
    optimizer = wrap(model)
    for _ in range(2):
        assert not changed(model, before)
        assert not optimizer.is_perturbed
        loss = loss_of(model)
        assert len(changed(model, before)) == 3
        assert optimizer.is_perturbed
        optimizer.zero_grad()  # many loops call it here: it means nothing
        assert optimizer.is_perturbed
        loss.backward()
        assert optimizer.is_perturbed
        assert all(p.grad is not None for p in trainable(model))
        optimizer.step()
    assert not changed(model, before)


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_an_evaluation_sees_clean_weights_and_moves_no_noise(model, before, how):
    x = batch()[0]
    clean = model.eval()(x).detach()
    model.train()
    plain, tried = copy.deepcopy(model), model
    gradients = []
    for net, evaluates in ((plain, False), (tried, True)):
        optimizer = wrap(net)
        loss_of(net, 0).backward()
        if evaluates:
            if how == "eval":
                assert torch.equal(net.eval()(x), clean)
                net.train()
            else:
                with getattr(torch, how)():
                    assert torch.equal(net(x), clean)
        loss_of(net, 1).backward()
        gradients.append([p.grad.clone() for p in trainable(net)])
        optimizer.step()
        assert not changed(net, before)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("restore", EXACT)
def test_backward_after_an_eval_forward_finds_the_noise_its_graph_was_made_at(model, before, restore):
    gradients = []
    for evaluate in (False, True):
        optimizer = wrap(model, restore=restore, seed=3)
        loss = loss_of(model)
        if evaluate:
            model.eval()(batch()[0])
            assert not changed(model, before)
            assert not optimizer.is_perturbed
            model.train()
        loss.backward()
        assert optimizer.is_perturbed
        gradients.append([p.grad.clone() for p in trainable(model)])
        optimizer.restore()
        optimizer.zero_grad()
        optimizer.detach()
        assert not changed(model, before)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_backward_of_gradients_after_an_eval_forward_needs_perturb(model, before):
    optimizer = wrap(model)

    def penalty():
        return sum(g.square().sum() for g in torch.autograd.grad(loss_of(model), trainable(model), create_graph=True))

    penalty().backward()
    want = [p.grad for p in trainable(model)]
    for told in (False, True):
        optimizer.zero_grad()
        now = penalty()
        model.eval()(batch()[0])
        model.train()
        if told:
            optimizer.perturb()
            now.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                now.backward()
    for parameter, wanted in zip(trainable(model), want):
        torch.testing.assert_close(parameter.grad, wanted)
    optimizer.step()
    assert not changed(model, before)


def test_an_eval_forward_before_backward_raises_with_subtract(model):
    optimizer = wrap(model, restore="subtract")
    loss = loss_of(model)
    model.eval()(batch()[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()


@pytest.mark.parametrize("restore", MODES)
def test_restoring_while_a_graph_needs_w_raises(model, before, restore):
    optimizer = wrap(model, restore=restore)
    loss = loss_of(model)
    optimizer.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # and so does a backward after the step
    loss = loss_of(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_from_before_perturbing_raises(model):
    optimizer = wrap(model)
    model.eval()
    loss = loss_of(model)  # at clean weights, with a graph
    model.train()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="modified by an inplace operation: a forward in eval mode made its graph"):
        loss.backward()


@pytest.mark.parametrize("noise", ["filter", "layer", "int4"])
def test_autocast_does_not_change_what_w_is_moved_by(noise):
    found, options = [], {"sigma": 1.0, "draws": "mixed"} if noise == "int4" else {"sigma": 0.3}
    for enabled in (False, True):
        torch.manual_seed(0)
        model = lora_mlp()
        clean, optimizer = frozen(model), wrap(model, noise=noise, restore="copy", **options)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss_of(model)
            assert torch.is_autocast_enabled("cpu") is enabled
        found.append(frozen(model))
        assert changed(model, clean)
        model.state_dict()
        assert not changed(model, clean)
        optimizer.perturb()  # after a reader, outside of the region
        assert not changed(model, found[-1])
        optimizer.detach()
    assert same(*found)


def test_a_no_grad_forward_with_subtract_raises_in_backward(model):
    wrap(model, restore="subtract")  # it drifts, so the weights of the graph do not come back
    optimizer = wrap(model, restore="subtract")
    loss = loss_of(model)
    with torch.no_grad():
        model(batch()[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()


def test_a_step_without_a_forward_warns_once_and_says_why(model, before):
    optimizer = wrap(model, total_steps=10)
    loss_of(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    with pytest.warns(UserWarning, match="no training forward") as caught:
        optimizer.step()
    (warning,) = [w for w in caught if "no training forward" in str(w.message)]
    for reason in ("eval mode", "submodule", "raw parameters", "perturb()", "step(closure)", "called twice"):
        assert reason in str(warning.message)
    assert warning.filename == __file__  # points at the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.param_groups[0]["flatopt_step"] == 1  # such steps draw nothing and do not count


def test_a_step_without_a_forward_still_steps(model):
    optimizer = wrap(model)
    adapter = [p.detach().clone() for p in trainable(model)]
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="no training forward"):
        optimizer.step()
    assert all(torch.allclose(p, a - 0.1) for p, a in zip(trainable(model), adapter))


def test_an_eval_mode_forward_is_no_training_forward(model, before):
    optimizer = wrap(model)
    model.eval()
    loss_of(model).backward()
    assert not changed(model, before)
    with pytest.warns(UserWarning, match="eval mode"):
        optimizer.step()


# --- closures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", EXACT)
def test_a_closure_is_evaluated_at_perturbed_weights(model, before, restore):
    optimizer = wrap(model, restore=restore)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        seen.append((loss.item(), len(changed(model, before)), torch.is_grad_enabled()))
        return loss

    with torch.no_grad():
        result = optimizer.step(closure)
    assert not changed(model, before)
    assert seen == [(result.item(), 3, True)]
    assert not optimizer.is_perturbed
    # the same as a plain loop
    twin = lora_mlp()
    twin.load_state_dict(model.state_dict())
    plain = wrap(twin, restore=restore)
    plain.param_groups[0]["flatopt_step"] = 1
    optimizer.step(closure)
    loss_of(twin).backward()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("restore", EXACT)
def test_lbfgs_sees_the_same_noise_in_all_its_evaluations(model, before, restore):
    inner = torch.optim.LBFGS(trainable(model), lr=0.5, max_iter=6)
    optimizer = FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant", restore=restore)
    draws = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        draws.append(noise_now(model, before)["base_model.model.first.base_layer.weight"])
        return loss

    first = optimizer.step(closure)
    assert len(draws) > 2
    assert all(torch.equal(draw, draws[0]) for draw in draws)  # although the adapter moved, and the merged norms with it
    assert not changed(model, before)
    assert loss_of(model.eval()).item() < first.item()
    count = len(draws)
    model.train()
    optimizer.step(closure)
    assert nn.functional.cosine_similarity(draws[count].flatten(), draws[0].flatten(), dim=0).abs() < 0.2  # 512: 4.5 sd


def test_a_closure_that_raises_leaves_clean_weights(model, before):
    optimizer = wrap(model)

    def closure():
        loss_of(model)
        assert optimizer.is_perturbed
        raise KeyError("in the closure")

    with pytest.raises(KeyError, match="in the closure"):
        optimizer.step(closure)
    assert not changed(model, before)
    assert not optimizer.is_perturbed
    loss_of(model).backward()
    optimizer.step()
    assert not changed(model, before)


def test_after_a_closure_that_raises_the_scale_is_found_anew(model, before):
    optimizer = wrap(model)

    def closure():
        loss_of(model)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    optimizer.perturb_groups[0]["restore"] = "copy"  # exactly linear in the scale
    sizes = []
    for sigma in (0.2, 0.4):
        optimizer.perturb_groups[0]["sigma"] = sigma
        optimizer.perturb()
        sizes.append({name: eps.double().norm() for name, eps in noise_now(model, before).items()})
        optimizer.restore()
    for name, size in sizes[0].items():
        torch.testing.assert_close(sizes[1][name], 2 * size, rtol=1e-4, atol=0)


def test_a_weight_merged_into_and_trained_on_has_the_scale_of_its_new_value(model, before):
    # ReLoRA: merge for good, start anew; PEFT merges through .data
    optimizer = wrap(model, restore="copy")
    optimizer.perturb()
    optimizer.step()
    for layer in (module for module in model.modules() if hasattr(module, "base_layer")):
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(20)
        layer.merge()
        layer.merged_adapters.clear()
        nn.init.zeros_(layer.lora_B["default"].weight)
    merged = frozen(model)
    assert changed(model, before)
    optimizer.perturb()
    for name, eps in noise_now(model, merged).items():
        expected = 0.2 * merged[name].square().mean().sqrt()
        assert 0.8 < eps.square().mean().sqrt() / expected < 1.2 or "bias" in name, name


def test_noise_goes_by_the_place_in_the_groups(model, before):
    layers = model.base_model.model
    groups = [{"modules": layers.first}, {"modules": layers.second}]
    optimizer = wrap(model, targets=groups)
    optimizer.perturb()
    optimizer.restore()
    del optimizer.perturb_groups[0]
    optimizer.perturb()
    edited = noise_now(model, before)
    optimizer.restore()
    fresh = wrap(model, targets=groups[1:])
    fresh.perturb()
    assert same(edited, noise_now(model, before))


def test_a_forward_before_a_closure_is_the_same_window(model, before):
    optimizer = wrap(model)
    loss_of(model).backward()
    first = noise_now(model, before)

    def closure():
        assert same(noise_now(model, before), first)
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert optimizer.param_groups[0]["flatopt_step"] == 1


# --- by hand ------------------------------------------------------------------------------------------------------------


def test_perturb_and_restore_are_idempotent(model, before):
    optimizer = wrap(model)
    optimizer.restore()
    optimizer.perturb()
    first = frozen(model)
    optimizer.perturb()
    assert not changed(model, first)
    assert optimizer.is_perturbed
    optimizer.restore()
    optimizer.restore()
    assert not changed(model, before)
    optimizer.perturb()
    assert not changed(model, first)  # still the same step: the same draw
    optimizer.step()
    optimizer.perturb()
    assert len([n for n in changed(model, first) if "weight" in n]) == 3
    optimizer.restore()


def test_perturbed_holds_in_eval_mode_and_without_gradients(model, before):
    optimizer = wrap(model)
    x = batch()[0]
    model.eval()
    clean = model(x)
    with optimizer.perturbed() as same_optimizer, torch.no_grad():
        assert same_optimizer is optimizer
        noisy = model(x)
        assert torch.equal(model(x), noisy)
        with optimizer.perturbed():
            assert torch.equal(model(x), noisy)
        assert torch.equal(model(x), noisy)  # leaving the inner one does not restore
        model.train()
        assert torch.equal(model(x), noisy)
        model.eval()
    assert not torch.equal(noisy, clean)
    assert torch.equal(model(x), clean)
    assert not changed(model, before)
    with pytest.raises(KeyError), optimizer.perturbed():
        raise KeyError
    assert not changed(model, before)


def test_perturbed_inside_a_window_leaves_it_open(model, before):
    optimizer = wrap(model)
    loss = loss_of(model)
    with optimizer.perturbed(), torch.no_grad():
        noisy = model(batch()[0])
    assert optimizer.is_perturbed
    loss.backward()  # the graph still holds
    with torch.no_grad():
        assert not torch.equal(model(batch()[0]), noisy)  # and afterwards forwards toggle again
    optimizer.step()
    assert not changed(model, before)


def test_raw_parameters_by_perturb_and_by_closure():
    layer = nn.Linear(16, 5)
    layer.weight.requires_grad_(False)
    clean = layer.weight.detach().clone()
    optimizer = wrap(layer, targets=[{"params": [layer.weight]}])
    for by_closure in (False, True):

        def forward():
            loss = loss_of(layer)
            loss.backward()
            assert not torch.equal(layer.weight, clean)
            return loss

        if by_closure:
            optimizer.step(forward)
        else:
            optimizer.perturb()
            forward()
            optimizer.step()
        assert torch.equal(bits(layer.weight), bits(clean))


def test_writing_to_w_inside_a_window_is_an_error_that_names_it(model):
    optimizer = wrap(model)
    loss_of(model).backward()
    with torch.no_grad():
        model.base_model.model.second.base_layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"second\S*weight.*optimizer\.restore\(\)"):
        optimizer.step()


def test_the_newest_optimizer_takes_over_and_the_older_one_says_so(model, before):
    first = wrap(model)
    with pytest.warns(UserWarning, match=r"first\S*weight was perturbed by an older FlatPerturbOptimizer.*detach"):
        second = wrap(model, seed=1)
    loss_of(model).backward()
    assert second.is_perturbed
    assert not first.is_perturbed
    for use in (first.perturb, first.step):
        with pytest.raises(
            RuntimeError, match=r"a newer FlatPerturbOptimizer perturbs \S*first\S*weight.*optimizer\.optimizer"
        ):
            use()
    second.step()
    assert not changed(model, before)


def test_an_older_optimizer_amid_its_step_is_restored_by_the_one_that_takes_over(model, before):
    first = wrap(model)
    loss = loss_of(model)
    with pytest.warns(UserWarning, match="amid a step: its weights are restored"):
        second = wrap(model, seed=1)
    assert not changed(model, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss_of(model).backward()
    second.step()
    assert not changed(model, before)
    del first


def test_two_optimizers_on_different_weights(model, before):
    layers = model.base_model.model
    optimizers = [wrap(model, targets=[{"modules": layer}]) for layer in (layers.first, layers.second)]
    loss_of(model).backward()
    assert len(changed(model, before)) == 2
    for optimizer in optimizers:
        optimizer.step()
    assert not changed(model, before)


# --- activation checkpointing -------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.inner, self.reentrant = model, reentrant

    def forward(self, x):
        layers = self.inner.base_model.model
        hidden = torch.relu(layers.first(x))
        hidden = checkpoint(lambda h: torch.relu(layers.second(h)), hidden, use_reentrant=self.reentrant)
        return layers.head(hidden)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_with_the_whole_model_as_targets(model, before, reentrant):
    plain = copy.deepcopy(model)
    gradients = []
    for net in (plain, Checkpointed(model, reentrant)):
        optimizer = wrap(net)
        loss_of(net).backward()
        gradients.append([p.grad.clone() for p in trainable(net)])
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert not changed(model, before)


def test_non_reentrant_checkpointing_with_inner_modules_as_targets(model, before):
    net = Checkpointed(model, reentrant=False)
    layers = model.base_model.model
    groups = [{"modules": [layers.first, layers.second, layers.head]}]
    plain = copy.deepcopy(model)
    reference = wrap(plain)
    loss_of(plain).backward()
    optimizer = wrap(net, targets=groups)
    loss = loss_of(net)
    with torch.no_grad():
        net(batch()[0])
    optimizer.restore()  # that no-grad forward is of a window gone by, and nothing to the recomputation in the next
    loss_of(net).backward()
    del loss
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(trainable(plain), trainable(model)))
    optimizer.step()
    reference.step()
    assert not changed(model, before)


@pytest.mark.parametrize("targets", ["the checkpointed", "all three"])
def test_reentrant_checkpointing_with_inner_modules_as_targets_raises(model, before, targets):
    # the layer's first run is without gradients and sees clean weights, its second, in backward, perturbed ones
    net = Checkpointed(model, reentrant=True)
    layers = model.base_model.model
    modules = [layers.second] if targets == "the checkpointed" else [layers.first, layers.second, layers.head]
    optimizer = wrap(net, targets=[{"modules": modules}])
    loss = loss_of(net)
    with pytest.raises(RuntimeError, match="use_reentrant=False, or pass the whole model as targets"):
        loss.backward()
    optimizer.restore()
    assert not changed(model, before)


# --- hooks --------------------------------------------------------------------------------------------------------------


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def test_hooks_go_with_the_optimizer(model, before):
    count = hooks_of(model)
    optimizer = wrap(model)
    assert hooks_of(model) > count
    del optimizer
    gc.collect()
    assert hooks_of(model) == count
    loss_of(model).backward()
    assert not changed(model, before)


def test_the_last_of_many_optimizers_alone_perturbs(model, before):
    for seed in range(3):  # a notebook cell that is run again
        optimizer = wrap(model, seed=seed)
    gc.collect()
    loss_of(model).backward()
    noise = noise_now(model, before)
    optimizer.step()
    assert not changed(model, before)
    alone = lora_mlp()
    alone.load_state_dict({n: before.get(n, p) for n, p in model.state_dict().items()})
    assert hooks_of(model) - hooks_of(alone) == hooks_of_one(alone)
    assert any(e.any() for e in noise.values())


def hooks_of_one(model):
    count = hooks_of(model)
    optimizer = wrap(model)
    return hooks_of(model) - count if optimizer else None


def test_a_copy_of_the_model_is_not_perturbed_and_does_not_perturb(model, before):
    optimizer = wrap(model)
    twin = copy.deepcopy(model)
    loss_of(twin).backward()
    assert not changed(twin, before)
    assert not changed(model, before)
    assert not optimizer.is_perturbed
    twin.state_dict()
    # and it can be trained with an optimizer of its own
    second = wrap(twin)
    loss_of(twin).backward()
    assert len(changed(twin, before)) == 3
    assert not changed(model, before)
    second.step()
    assert not changed(twin, before)


def test_an_exponential_moving_average_of_the_model_stays_clean(model, before):
    optimizer = wrap(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        average.update_parameters(model)
    assert not changed(average.module, before)


# --- the schedule -------------------------------------------------------------------------------------------------------


def factors(schedule, total, steps):
    """Noise of each step over the noise of a constant schedule with the same seed, at an element of size 1."""
    result = []
    for step in range(steps):
        size = []
        for name in (schedule, "constant"):
            weight = nn.Parameter(torch.ones(1, 1000, dtype=torch.float64), requires_grad=False)
            options = {"sigma": 0.5, "restore": "copy", "schedule": name, "total_steps": total}
            optimizer = wrap(nn.Linear(1, 1), targets=[{"params": weight}], **options)
            optimizer.param_groups[0]["flatopt_step"] = step
            with optimizer.perturbed():
                size.append((weight.detach() - 1).norm().item())
        result.append(size[0] / size[1])
    return result


SCHEDULES = {
    "cosine": lambda t: 0.5 * (1 - math.cos(math.pi * t)),
    "linear": lambda t: t,
    "constant": lambda t: 1.0,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    total = 8
    expected = [SCHEDULES[name](min(step / total, 1)) for step in range(total + 4)]
    assert factors(name, total, total + 4) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert expected[-1] == 1


def test_a_callable_schedule_gets_progress_and_stays_at_its_end():
    progress = []

    def schedule(t):
        progress.append(t)
        return 3 * t * t

    assert factors(schedule, 4, 7) == pytest.approx([0, 3 / 16, 3 / 4, 27 / 16, 3, 3, 3], rel=1e-5, abs=1e-9)
    assert progress == [0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_the_schedule_counts_optimizer_steps_not_micro_batches(model, before):
    optimizer = wrap(model, schedule="linear", total_steps=4, restore="copy", lr=0.0)
    layer = model.base_model.model.second
    name = "base_model.model.second.base_layer.weight"
    with torch.no_grad():
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
    rms = merged.square().mean(1, keepdim=True).sqrt()
    strength = []
    for _ in range(6):
        for micro in range(3):
            loss_of(model, micro).backward()
        strength.append((noise_now(model, before)[name] / rms).std().item() / 0.2)
        optimizer.step()
    # the std of 1024 normals: 4 standard deviations are 9 %
    assert strength == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], rel=0.09, abs=1e-6)


def test_a_step_with_sigma_zero_counts_and_does_not_warn(model, before):
    optimizer = wrap(model, schedule="cosine", total_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model).backward()
        assert not changed(model, before)  # the cosine starts at 0
        optimizer.step()
    loss_of(model).backward()
    assert changed(model, before)
    optimizer.step()
    assert optimizer.param_groups[0]["flatopt_step"] == 2
