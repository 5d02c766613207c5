"""SAM: against a reference that changes nothing in place, and in every way known to break it."""

import copy
import os
import pickle
import random
import warnings
from contextlib import nullcontext

import numpy
import pytest
import torch
from helpers import batch, bits, changed, frozen, lora_mlp, trainable
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from flatopt import SAM, FlatPerturbOptimizer

SETTINGS = [(space, adaptive) for space in ("adapter", "full") for adaptive in (False, True)]


def make(space="adapter", dtype=torch.float32, optimizer=torch.optim.AdamW, lr=1e-2, model=None, **settings):
    model = lora_mlp(dtype) if model is None else model
    return model, SAM(
        optimizer(trainable(model), lr=lr), space=space, targets=model if space == "full" else None, **settings
    )


def closure_of(model, batches):
    def closure():
        total = 0.0
        for x, y in batches:
            loss = cross_entropy(model(x), y) / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    return closure


def everything(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def reference_gradient(model, batches, rho, space, adaptive):
    """The loss at w and the trainable parameters' gradient at w + eps, by formulas alone."""
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    train = [name for name, p in model.named_parameters() if p.requires_grad]
    ascend = train if space == "adapter" else [name for name in values if name.endswith("base_layer.weight")]

    def loss_at(point):
        losses = [cross_entropy(functional_call(model, point, (x,)), y) for x, y in batches]
        return torch.stack(losses).mean()

    loss = loss_at(values)
    g = dict(zip(ascend, torch.autograd.grad(loss, [values[name] for name in ascend])))
    t = {name: values[name].detach().abs() if adaptive else 1.0 for name in ascend}
    norm = torch.cat([(t[name] * g[name]).flatten() for name in ascend]).norm()
    shifted = {name: values[name] + rho * t[name] ** 2 * g[name] / norm for name in ascend}
    gradient = torch.autograd.grad(loss_at({**values, **shifted}), [values[name] for name in train])
    return loss.detach(), dict(zip(train, gradient))


@pytest.mark.parametrize(("space", "adaptive"), SETTINGS)
def test_follows_the_reference_for_many_steps(space, adaptive):
    rho = 0.5 if adaptive else 0.2  # large: the two passes differ much
    model, sam = make(space, torch.float64, rho=rho, adaptive=adaptive)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(trainable(twin), lr=1e-2)
    frozen_before = frozen(model)
    for step in range(25):
        batches = [batch(dtype=torch.float64, seed=2 * step), batch(dtype=torch.float64, seed=2 * step + 1)]
        loss = sam.step(closure_of(model, batches))
        expected, gradient = reference_gradient(twin, batches, rho, space, adaptive)
        for name, p in twin.named_parameters():
            p.grad = gradient.get(name)
        plain.step()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert not changed(model, frozen_before)

    # and it is no plain AdamW that the reference would have followed as well
    _, g = reference_gradient(twin, batches, 0.0, space, adaptive)
    name = next(iter(g))
    assert (g[name] - gradient[name]).norm() > 1e-2 * g[name].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("space", ["adapter", "full"])
def test_perturbed_in_the_second_pass_only_and_back_bit_for_bit(space, dtype):
    model, sam = make(space, dtype, optimizer=torch.optim.SGD, lr=0.0, rho=0.5)
    before = everything(model)
    seen, grads, flags = [], [], []
    x, y = batch(dtype=dtype)

    def closure():
        flags.append(sam.is_perturbed)
        seen.append(changed(model, before))
        grads.append([p.requires_grad for p in model.parameters()])
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    sam.step(closure)
    assert flags == [False, True]
    assert seen[0] == []
    expected = (
        {n for n in before if n.endswith("base_layer.weight")} if space == "full" else {n for n in before if "lora" in n}
    )
    assert set(seen[1]) == expected
    assert not changed(model, before)
    assert not sam.is_perturbed
    # nothing leaks: in the second pass and after it the base weights are frozen and without gradient
    assert grads[1] == [p.requires_grad for p in model.parameters()]
    assert any("lora" in n for n, p in model.named_parameters() if p.requires_grad)
    assert all(p.grad is None for n, p in model.named_parameters() if n in expected and space == "full")
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("space", ["adapter", "full"])
@pytest.mark.parametrize("fails_in", [1, 2])
def test_a_closure_that_raises_leaves_everything_as_it_was(space, fails_in):
    model, sam = make(space, rho=0.5)
    before, calls = everything(model), []
    good = closure_of(model, [batch()])

    def closure():
        calls.append(changed(model, before))
        loss = good()
        if len(calls) == fails_in:
            raise RuntimeError("out of memory")
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        sam.step(closure)
    assert (calls[-1] != []) == (fails_in == 2)
    assert not changed(model, before)
    assert not sam.is_perturbed
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)

    twin, other = make(space, rho=0.5, model=_with_weights(before))
    torch.testing.assert_close(sam.step(good), other.step(closure_of(twin, [batch()])), rtol=0, atol=0)
    assert not changed(model, everything(twin))


def _with_weights(weights):
    model = lora_mlp()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(("space", "adaptive"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_gradient_moves_nothing_and_makes_no_nan(space, adaptive, dtype):
    model, sam = make(space, dtype, optimizer=torch.optim.SGD, rho=0.5, adaptive=adaptive)
    before, seen = everything(model), []
    x, _ = batch(dtype=dtype)

    def closure():
        seen.append(changed(model, before))
        loss = (model(x) * 0).sum()
        loss.backward()
        return loss

    assert sam.step(closure) == 0
    assert seen == [[], []]
    assert not changed(model, before)


@pytest.mark.parametrize("space", ["adapter", "full"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_nothing(space, bad):
    model, sam = make(space, lr=0.0, optimizer=torch.optim.SGD, rho=0.5)
    before, seen = everything(model), []

    def closure():
        seen.append(changed(model, before))
        loss = cross_entropy(model(batch()[0]), batch()[1]) * bad
        loss.backward()
        return loss

    sam.step(closure)
    assert seen == [[], []]
    base = {n: w for n, w in before.items() if "base_layer" in n}
    assert not changed(model, base)


def test_half_precision_norm_does_not_overflow():
    """Each element of the gradient is a float16, but their norm is beyond it."""
    model, sam = make("full", torch.float16, optimizer=torch.optim.SGD, lr=0.0, rho=0.5)
    before, seen = everything(model), []

    def closure():
        seen.append(changed(model, before))
        loss = (model(batch(dtype=torch.float16)[0]) * 2000).sum()
        loss.backward()
        if len(seen) == 1:
            g = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "base_layer.weight" in n])
            assert g.isfinite().all()
            assert g.float().norm() > 65504
        return loss

    sam.step(closure)
    assert len(seen[1]) == 3


def test_no_gradient_warns_once_and_restores():
    model, sam = make("full", rho=0.5)
    before = everything(model)
    with pytest.warns(UserWarning, match="no gradient"):
        assert sam.step(lambda: 1.5) == 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam.step(lambda: 1.5)
    assert not changed(model, before)


def test_a_second_pass_without_gradient_restores():
    model, sam = make(rho=0.5)
    before, good = everything(model), closure_of(model, [batch()])
    sam.step(lambda: None if sam.is_perturbed else good())
    assert not changed(model, before)


@pytest.mark.parametrize("space", ["adapter", "full"])
def test_micro_batches_in_both_passes_equal_the_whole_batch(space):
    x, y = batch(rows=12, dtype=torch.float64)
    results = []
    for batches in ([(x, y)], [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]):
        torch.manual_seed(3)
        model, sam = make(space, torch.float64, rho=0.3)
        for _ in range(5):
            sam.step(closure_of(model, batches))
        results.append(everything(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-12)


def test_stale_gradients_do_not_enter():
    """Neither those from before the step nor, in the second pass, those of the first; the closure need not clear them."""
    model, sam = make(rho=0.3)
    twin, other = make(rho=0.3, model=copy.deepcopy(model))
    for p in trainable(model):
        p.grad = torch.full_like(p, 100.0)

    def clearing():
        other.zero_grad()
        return closure_of(twin, [batch()])()

    assert sam.step(closure_of(model, [batch()])) == other.step(clearing)
    assert not changed(model, everything(twin))


def test_dropout_is_replayed_and_random_states_move_as_in_one_pass():
    model, sam = make(rho=0.3, model=lora_mlp(lora_dropout=0.5))
    masks, draws = [], []
    model.base_model.model.second.lora_dropout["default"].register_forward_hook(lambda m, i, o: masks.append(o == 0))

    def closure():
        loss = cross_entropy(model(batch()[0]), batch()[1])
        loss.backward()
        draws.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
        return loss

    def states():
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
    closure()
    once = states()
    masks.clear(), draws.clear()
    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
    sam.step(closure)
    # the ascent changes which hidden units are 0 before dropout; those that dropout alone zeroed are the same
    assert len(masks) == 2
    assert draws[0] == draws[1]
    assert states() == once

    masks.clear()
    sam.rho = 0.0
    sam.step(closure)
    assert torch.equal(*masks)
    assert masks[0].float().mean() > 0.4

    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
    closure()
    once = states()
    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
    with pytest.raises(ZeroDivisionError):
        sam.step(lambda: 1 / 0 if sam.is_perturbed else closure())
    assert states() == once


class Norms(nn.Module):
    """Every kind of running statistics, a cumulative average among them."""

    def __init__(self, momentum=None):
        super().__init__()
        self.first = nn.Linear(16, 12)
        self.a, self.b = nn.BatchNorm1d(12), nn.BatchNorm1d(12, momentum=momentum)
        self.c = nn.InstanceNorm1d(12, track_running_stats=True)
        self.still = nn.BatchNorm1d(12).eval()
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.b(self.a(self.first(x)))
        x = self.c(x.unsqueeze(-1).expand(-1, -1, 3)).mean(-1) + x
        return self.head(self.still(x))


def test_batch_norm_statistics_move_once_a_step():
    model = Norms()
    model.first.requires_grad_(False)
    twin = copy.deepcopy(model)
    sam = SAM(torch.optim.SGD(trainable(model), lr=0.0), rho=0.5)
    for step in range(3):
        x, y = batch(seed=step)
        sam.step(closure_of(model, [(x, y), batch(seed=step + 10)]))
        twin(x), twin(batch(seed=step + 10)[0])
    for (name, moved), expected in zip(model.named_buffers(), twin.buffers()):
        assert torch.equal(moved, expected), name
    assert model.a.num_batches_tracked == 6
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_batch_norm_statistics_come_back_when_the_second_pass_raises():
    model = Norms()
    sam = SAM(torch.optim.SGD(trainable(model), lr=0.0), rho=0.5)
    after_one = []

    def closure():
        loss = closure_of(model, [batch()])()
        if sam.is_perturbed:
            raise KeyboardInterrupt
        after_one.extend(b.clone() for b in model.buffers())
        return loss

    with pytest.raises(KeyboardInterrupt):
        sam.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(after_one, model.buffers()))


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_batch_norm_statistics_under_compile():
    """Two models called one after the other, each compiled as one graph, which a hook inside would break."""
    model, second = Norms(momentum=0.1), Norms(momentum=0.1)
    twin, second_twin = copy.deepcopy(model), copy.deepcopy(second)
    compiled = [torch.compile(m, backend="eager", fullgraph=True) for m in (model, second)]
    sam = SAM(torch.optim.SGD([*trainable(model), *trainable(second)], lr=0.0), rho=0.5)
    for step in range(3):
        sam.step(closure_of(lambda x: compiled[0](x) + compiled[1](x), [batch(seed=step)]))
        twin(batch(seed=step)[0]), second_twin(batch(seed=step)[0])
    model, twin = nn.ModuleList([model, second]), nn.ModuleList([twin, second_twin])
    for (name, moved), expected in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(moved, expected, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("space", ["adapter", "full"])
def test_autocast_around_the_whole_step_sees_the_perturbed_weights(space):
    """Autocast caches half-precision copies of the weights for as long as its region lasts."""
    results = []
    for outside in (True, False):
        torch.manual_seed(1)
        model, sam = make(space, rho=0.5)
        x, y = batch()

        def closure(model=model, outside=outside, x=x, y=y):
            with torch.autocast("cpu", torch.bfloat16, enabled=True, cache_enabled=outside):
                loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                sam.step(closure)
        results.append(everything(model))
    assert all(torch.equal(bits(results[0][n]), bits(results[1][n])) for n in results[0])


@pytest.mark.parametrize("space", ["adapter", "full"])
def test_resume_is_bit_identical(space, tmp_path):
    def closure(model, step):
        return closure_of(model, [batch(seed=step)])

    model, sam = make(space, rho=0.3)
    for step in range(4):
        sam.step(closure(model, step))
    weights = copy.deepcopy(model.state_dict())
    torch.save(sam.state_dict(), tmp_path / "optimizer.pt")
    for step in range(4, 8):
        sam.step(closure(model, step))

    resumed, other = make(space, rho=0.3)
    resumed.load_state_dict(weights)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert {len(s) for s in other.state.values()} == {3}  # step, exp_avg, exp_avg_sq
    for step in range(4, 8):
        other.step(closure(resumed, step))
    assert not changed(resumed, everything(model))


def test_state_dict_is_the_wrapped_optimizers():
    model, sam = make(rho=0.3)
    sam.step(closure_of(model, [batch()]))
    plain = torch.optim.AdamW(trainable(model), lr=1e-2)
    plain.load_state_dict(sam.state_dict())
    assert sam.state_dict().keys() == plain.state_dict().keys()
    assert sam.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    assert torch.equal(plain.state[trainable(model)[0]]["exp_avg"], sam.state[trainable(model)[0]]["exp_avg"])


def test_is_an_optimizer_to_schedulers_hooks_copies_and_pickles():
    model, sam = make(rho=0.3)
    assert isinstance(sam, torch.optim.Optimizer)
    assert sam.param_groups is sam.optimizer.param_groups
    assert sam.state is sam.optimizer.state
    assert sam.defaults is sam.optimizer.defaults
    scheduler = torch.optim.lr_scheduler.OneCycleLR(sam, max_lr=0.1, total_steps=10)
    calls = []
    sam.register_step_pre_hook(lambda *_: calls.append("pre"))
    sam.register_step_post_hook(lambda *_: calls.append("post"))
    sam.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    sam.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "mine"})
    sam.step(closure_of(model, [batch()]))
    scheduler.step()
    assert calls == ["pre", "post"]
    assert sam.optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] != 1e-2
    sam.load_state_dict(sam.state_dict())
    extra = nn.Parameter(torch.zeros(2))
    sam.add_param_group({"params": [extra]})
    assert sam.optimizer.param_groups[1]["params"] == [extra]

    both, other = copy.deepcopy((model, sam))
    third_model, third = pickle.loads(pickle.dumps((both, other)))
    for m, o in ((both, other), (third_model, third)):
        assert o.param_groups[0]["params"][0] is trainable(m)[0]
        o.step(closure_of(m, [batch(seed=1)]))
    assert not changed(both, everything(third_model))
    assert changed(both, everything(model))
    assert "rho=0.3" in repr(sam)


def test_two_halves_with_a_grad_scaler_equal_one_step():
    model, sam = make("full", rho=0.3)
    twin, other = make("full", rho=0.3, model=copy.deepcopy(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        x, y = batch(seed=step)

        def closure(x=x, y=y):
            loss = cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            return loss

        loss = sam.backward(closure)
        scaler.step(sam)
        scaler.update()
        assert loss == other.step(closure_of(twin, [(x, y)]))
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_grad_scaler_skips_a_step_that_overflows():
    model, sam = make(rho=0.3)
    before = everything(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def closure():
        loss = cross_entropy(model(batch()[0]), batch()[1])
        scaler.scale(loss * (float("inf") if sam.is_perturbed else 1)).backward()
        return loss

    sam.backward(closure)
    scaler.step(sam)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert not changed(model, before)
    assert not sam.state


def test_step_without_the_second_gradient_is_an_error():
    model, sam = make()
    closure_of(model, [batch()])()
    with pytest.raises(RuntimeError, match="closure"):
        sam.step()
    for group in sam.param_groups:
        group["lr"] = 0.0  # as torch.distributed.checkpoint does to fill the state
    sam.step()
    assert len(sam.state) == len(trainable(model))


def test_around_lbfgs_every_evaluation_is_a_sam_evaluation():
    model, sam = make("adapter", torch.float64, optimizer=_lbfgs, rho=0.05)
    flags = []
    inner = closure_of(model, [batch(dtype=torch.float64)])

    def closure():
        flags.append(sam.is_perturbed)
        return inner()

    first = inner()
    loss = sam.step(closure)
    torch.testing.assert_close(loss, first)
    assert len(flags) > 4
    assert flags == [False, True] * (len(flags) // 2)
    assert inner() < first


def _lbfgs(parameters, lr):
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=5)


def test_inside_the_flat_objective():
    """FlatPerturbOptimizer around SAM: both passes at W + eps, W clean afterwards."""
    model = lora_mlp()
    sam = SAM(torch.optim.AdamW(trainable(model), lr=1e-2), rho=0.1)
    flat = FlatPerturbOptimizer(sam, model, sigma=0.1, schedule="constant")
    before, seen = frozen(model), []
    inner = closure_of(model, [batch()])

    def closure():
        loss = inner()
        seen.append(changed(model, before))
        return loss

    flat.step(closure)
    assert len(seen) == 2
    assert all(len(names) == 3 for names in seen)
    assert not changed(model, before)


@pytest.mark.parametrize("restore", ["reversible", "copy", "forward"])
@pytest.mark.parametrize("order", ["flat around it", "around flat", "beside flat"])
def test_the_ascent_on_weights_with_noise_is_refused(order, restore):
    model = lora_mlp()
    before = frozen(model)

    def flat(optimizer):
        return FlatPerturbOptimizer(optimizer, model, sigma=0.1, schedule="constant", restore=restore)

    def sam(optimizer):
        return SAM(optimizer, rho=0.1, space="full", targets=model)

    bare = torch.optim.SGD(trainable(model), lr=0.1)
    beside = torch.optim.SGD(trainable(model), lr=0.1)
    if order == "flat around it":
        outer = optimizer = flat(sam(bare))
    elif order == "around flat":
        optimizer = sam(outer := flat(bare))
    else:
        optimizer, outer = sam(beside), flat(bare)
        closure_of(model, [batch()])()
    with pytest.raises(RuntimeError, match="is perturbed by a FlatPerturbOptimizer too"):
        optimizer.step(closure_of(model, [batch()]))
    outer.restore()
    assert not changed(model, before)
    outer.detach()
    sam(beside).step(closure_of(model, [batch()]))
    assert not changed(model, before)


def test_sparse_gradients():
    class Net(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.embedding(x))

    ends = []
    for sparse in (True, False):
        net = Net(sparse)
        sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.5)
        x, y = torch.tensor([1, 1, 5]), torch.tensor([0, 1, 2])

        def closure(net=net, x=x, y=y):
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            sam.step(closure)
        ends.append([p.detach() for p in net.parameters()])
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other)


def test_targets_can_be_groups_and_raw_parameters():
    model = lora_mlp()
    before, seen = everything(model), []
    weight = model.base_model.model.second.base_layer.weight
    groups = [{"modules": model.base_model.model.first}, {"params": [weight]}]
    sam = SAM(torch.optim.SGD(trainable(model), lr=0.0), rho=0.3, space="full", targets=groups)
    inner = closure_of(model, [batch()])

    def closure():
        seen.append([n.split(".")[-3] for n in changed(model, before)])
        return inner()

    sam.step(closure)
    assert seen == [[], ["first", "second"]]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rho": -0.1}, "rho must be"),
        ({"rho": float("nan")}, "rho must be"),
        ({"rho": True}, "rho must be"),
        ({"space": "base"}, "adapter, full"),
        ({"space": "full", "targets": None}, "targets=model"),
        ({"targets": lora_mlp()}, "leave targets out, or pass space='full'"),
        ({"space": "full", "targets": nn.Linear(2, 2)}, "no low-rank module"),
        ({"space": "full", "targets": [{"modules": lora_mlp(), "sigma": 0.1}]}, "sigma"),
    ],
)
def test_arguments_that_do_not_fit_say_what_to_do(settings, match):
    with pytest.raises(ValueError, match=match):
        SAM(torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1), **settings)


def test_wrong_types_and_trainable_targets():
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer"):
        SAM([nn.Parameter(torch.zeros(2))])
    model = lora_mlp()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    model.base_model.model.first.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"first\.weight is trainable"):
        SAM(optimizer, space="full", targets=model)


def _over_two_ranks(rank, store, results):
    """Each rank has half of the batch; rank 0 compares with one process that has all of it."""
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    batches = [batch(dtype=torch.float64, seed=i) for i in range(2)]

    def run(kind, space, alone=False, shared=False):
        """Trainable parameters after 3 steps."""
        torch.manual_seed(0)
        model, forward = lora_mlp(torch.float64), None
        if kind == "ddp":
            forward = DistributedDataParallel(model)
        elif kind == "fsdp":
            for part in (model.base_model.model.first, model.base_model.model.second, model):
                fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        model, sam = make(space, model=model, rho=0.3, shared=shared)
        clean, mine = frozen(model), batches[rank : rank + 1] if kind else batches
        forward = forward or model

        def closure():
            quiet = alone and space == "adapter" and not sam.is_perturbed
            with forward.no_sync() if quiet else nullcontext():
                return closure_of(forward, mine)()

        for _ in range(3):
            with torch.no_grad():
                model.eval()(batches[0][0])
            model.train()
            sam.step(closure)
        assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if n in clean)
        full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in model.named_parameters()}
        return torch.cat([full[n].flatten() for n in full if n not in clean])

    def per_rank(space):
        """By formulas: the mean of the ranks' gradients, each at its own ascent."""
        torch.manual_seed(0)
        model = lora_mlp(torch.float64)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for _ in range(3):
            gradients = [reference_gradient(model, [one], 0.3, space, False)[1] for one in batches]
            for name, p in model.named_parameters():
                p.grad = (gradients[0][name] + gradients[1][name]) / 2 if name in gradients[0] else None
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in trainable(model)])

    found = {}
    for space in ("adapter", "full"):
        whole, each = run("", space), per_rank(space)
        found[f"ddp shared {space}"] = (run("ddp", space, shared=True), whole)
        found[f"ddp per rank {space}"] = (run("ddp", space, alone=True), each)
        found[f"fsdp {space}"] = (run("fsdp", space), whole)
        found[f"differ {space}"] = (each, whole)
    found["ddp adapter"] = (run("ddp", "adapter"), run("", "adapter"))
    if rank == 0:
        torch.save({name: (a - b).abs().max().item() for name, (a, b) in found.items()}, results)
    dist.destroy_process_group()


@pytest.mark.skipif(os.name == "nt" or not torch.distributed.is_available(), reason="needs torch.distributed with gloo")
def test_over_two_ranks(tmp_path):
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("FSDP2's fully_shard is public from torch 2.6 on")
    torch.multiprocessing.spawn(_over_two_ranks, (tmp_path / "store", tmp_path / "results"), nprocs=2)
    found = torch.load(tmp_path / "results")
    assert min(found.pop("differ adapter"), found.pop("differ full")) > 1e-3
    assert len(found) == 7
    assert max(found.values()) < 1e-9, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("space", ["adapter", "full"])
def test_on_cuda_dropout_is_replayed_and_weights_come_back(space):
    model = lora_mlp(torch.bfloat16, lora_dropout=0.5).cuda()
    model, sam = make(space, model=model, rho=0.3, optimizer=torch.optim.SGD, lr=0.0)
    before, draws = everything(model), []
    x, y = (t.cuda() for t in batch(dtype=torch.bfloat16))

    def closure():
        draws.append(torch.rand(3, device="cuda"))
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    sam.step(closure)
    assert torch.equal(*draws)
    assert not changed(model, before)


def test_what_an_interrupted_step_left_is_brought_back_by_the_next(monkeypatch):
    model = lora_mlp()
    before = frozen(model)
    optimizer = SAM(torch.optim.SGD(trainable(model), lr=0.01), rho=0.5, space="full", targets=model)

    def closure():
        loss = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
        loss.backward()
        return loss

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        descend, calls = SAM._descend, []

        def interrupted(self):
            calls.append(1)
            if len(calls) > 1:
                raise KeyboardInterrupt
            descend(self)

        patched.setattr(SAM, "_descend", interrupted)
        optimizer.step(closure)
    assert changed(model, before)
    optimizer.step(closure)
    assert not changed(model, before)
