"""``draws``: each micro-batch of a step has its own noise, or every second one none, whatever is called between them."""

import contextlib
import pickle

import pytest
import torch
from helpers import batch, changed, frozen, lora_mlp, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatopt import SAM, FlatPerturbOptimizer
from flatopt.ops import step_key


def wrap(model, cls=torch.optim.SGD, **options):
    options = {"sigma": 0.2, "schedule": "constant", "draws": "micro-batch", "seed": 5, **options}
    return FlatPerturbOptimizer(cls(trainable(model), lr=0.1), model, **options)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = lora_mlp(), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant) * 2


def loss_of(model, seed=0):
    x, y = batch(seed=seed)
    return nn.functional.cross_entropy(model(x), y)


def gradients(model):
    return [p.grad.clone() for p in trainable(model)]


@pytest.fixture
def keys(monkeypatch):
    """Of the draws that were asked for, as (step, draw)."""
    from flatopt.perturbation import noise

    asked = []

    def key(seed, step, rank, draw=0):
        asked.append((step, draw))
        return step_key(seed, step, rank, draw)

    monkeypatch.setattr(noise, "step_key", key)
    return asked


@pytest.mark.parametrize("restore", ["reversible", "copy", "subtract", "forward"])
def test_each_micro_batch_has_the_noise_of_its_number(restore, keys):
    """The gradients are those of one micro-batch a step at the noise of (step, draw)."""
    torch.manual_seed(0)
    model = lora_mlp()
    before = frozen(model)
    optimizer = wrap(model, restore=restore)
    found = []
    for _ in range(2):
        for micro in range(3):
            loss_of(model, micro).backward()
            found.append(gradients(model))
            model.zero_grad()
        optimizer.step()
    assert keys == [(step, draw) for step in range(2) for draw in range(3)]
    assert restore == "subtract" or not changed(model, before)
    assert not optimizer.is_perturbed
    optimizer.detach()

    alone = FlatPerturbOptimizer(
        torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.2, schedule="constant", restore=restore, seed=5
    )
    torch.manual_seed(0)
    model.load_state_dict(lora_mlp().state_dict())
    for draw in range(3):
        alone._draw = draw  # what the first step's micro-batches were taken at
        loss_of(model, draw).backward()
        exact = restore != "subtract"
        for mine, theirs in zip(gradients(model), found[draw]):
            torch.testing.assert_close(mine, theirs, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
        model.zero_grad()
        alone.restore()


@pytest.mark.parametrize(("mixed", "one_in"), [("mixed", 2), ("mixed/2", 2), ("mixed/3", 3), ("mixed/4", 4)])
@pytest.mark.parametrize("restore", ["reversible", "copy", "subtract", "forward"])
def test_one_in_some_micro_batches_is_perturbed(restore, mixed, one_in, keys):
    """The gradients of the first, and of each ``one_in``-th after it, are those of ``micro-batch``; of others those at W."""
    found, exact = {}, restore != "subtract"
    for draws in ("micro-batch", mixed, None):
        torch.manual_seed(0)
        model = lora_mlp()
        before, found[draws] = frozen(model), []
        optimizer = wrap(model, draws=draws, restore=restore) if draws else None
        for micro in range(4):
            loss_of(model, micro).backward()
            found[draws].append(gradients(model))
            model.zero_grad()
            if draws == mixed:
                assert restore in ("forward", "subtract") or bool(changed(model, before)) is (micro % one_in == 0)
        if optimizer is not None:
            optimizer.step()
            assert not changed(model, before) or not exact
            assert not optimizer.is_perturbed
            assert optimizer.step_count == 1
    for micro in range(4):
        noisy = micro % one_in == 0
        for mine, theirs in zip(found[mixed][micro], found["micro-batch" if noisy else None][micro]):
            torch.testing.assert_close(mine, theirs, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
        assert not all(map(torch.allclose, found[mixed][micro], found[None if noisy else "micro-batch"][micro]))


@pytest.mark.parametrize(
    ("mixed", "enough", "few", "told"),
    [
        ("mixed", 2, 1, "fewer micro-batches than that, the last one 1, .* Accumulate over 2 "),
        ("mixed/4", 4, 3, "fewer micro-batches than that, the last one 3, .* Accumulate over 4 "),
    ],
)
def test_steps_of_too_few_micro_batches_are_told_once(mixed, enough, few, told):
    model = lora_mlp()
    optimizer = wrap(model, draws=mixed)
    # one alone says nothing, as the last of an epoch has what is left: pytest makes an error of a warning
    for count, warns in ((enough, False), (few, False), (enough, False), (few, False), (few, True), (few, False)):
        for micro in range(count):
            loss_of(model, micro).backward()
        with pytest.warns(UserWarning, match=told) if warns else contextlib.nullcontext():
            optimizer.step()


@pytest.mark.parametrize("draws", ["mixed/1", "mixed/0", "mixed/", "mixed/2.5", "Mixed", "step/2", "antithetic", 2, None])
def test_other_draws_are_refused(draws):
    with pytest.raises(ValueError, match="draws must be one of step, micro-batch, mixed, mixed/n"):
        wrap(lora_mlp(), draws=draws)


def test_the_first_draw_is_that_of_one_draw_a_step(keys):
    assert step_key(1, 2, 3) == step_key(1, 2, 3, 0)
    assert len({step_key(1, 2, 3, draw) for draw in range(100)} | {step_key(1, 23, 0), step_key(1, 2, 31)}) == 102
    results = []
    for draws in ("step", "micro-batch"):
        torch.manual_seed(0)
        model = lora_mlp()
        optimizer = wrap(model, draws=draws)
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(trainable(model))
    assert all(map(torch.equal, *results))


def test_forwards_before_one_backward_share_a_draw(keys):
    model = lora_mlp()
    optimizer = wrap(model)
    for _ in range(2):
        (loss_of(model, 0) + loss_of(model, 1)).backward()
    optimizer.step()
    assert keys == [(0, 0), (0, 1)]


@pytest.mark.parametrize("draws", ["micro-batch", "mixed"])
def test_readers_between_micro_batches_change_nothing(keys, draws):
    torch.manual_seed(0)
    model, clean = lora_mlp(), None
    optimizer, before = wrap(model, draws=draws), frozen(model)
    x, _ = batch()
    with torch.no_grad():
        clean = model(x)
    for micro in range(3):
        loss = loss_of(model, micro)
        with torch.no_grad():
            assert torch.equal(model(x), clean)  # its backward brings the same draw back
        loss.backward()
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(x), clean)
        model.train()
    assert not changed(model, before) or optimizer.is_perturbed
    optimizer.step()
    assert not changed(model, before)
    assert list(dict.fromkeys(keys)) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("draws", ["micro-batch", "mixed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_runs_again_in_backward_has_the_draw_of_its_forward(keys, reentrant, draws):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    results = []
    for wrapped in (lambda m: m, Checkpointed):
        torch.manual_seed(0)
        inner = lora_mlp()
        model = wrapped(inner)
        optimizer = wrap(model, draws=draws)
        for micro in range(3):
            loss_of(model, micro).backward()
        results.append(gradients(model))
        optimizer.step()
    for plain, again in zip(*results):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_the_doors_of_parts_begin_a_draw_too(keys):
    model = lora_mlp()
    optimizer = wrap(model)
    x, y = batch()
    for _ in range(2):
        nn.functional.cross_entropy(model.get_base_model()(x), y).backward()
    optimizer.step()
    assert keys == [(0, 0), (0, 1)]


def test_each_evaluation_of_a_closure_begins_at_the_first_draw(keys):
    model = lora_mlp()
    optimizer = FlatPerturbOptimizer(
        torch.optim.LBFGS(trainable(model), max_iter=3), model, sigma=0.05, schedule="constant", draws="micro-batch"
    )
    losses = []

    def closure():
        optimizer.zero_grad()
        total = 0.0
        for micro in range(2):
            loss = loss_of(model, micro)
            loss.backward()
            total += loss.item()
        losses.append(total)
        return torch.tensor(total)

    before = frozen(model)
    optimizer.step(closure)
    assert len(losses) > 1
    assert keys == [(0, 0), (0, 1)] * len(losses)
    assert not changed(model, before)


@pytest.mark.parametrize("draws", ["micro-batch", "mixed"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_goes_on_from_the_micro_batches_before_it(keys, cls, draws):
    """Lightning's way: all micro-batches but the last by themselves, the last one in the closure."""
    model = lora_mlp()
    optimizer = wrap(model, cls, sigma=0.05, draws=draws)
    before, losses = frozen(model), []

    def closure():
        losses.append(loss_of(model, 2))
        losses[-1].backward()
        return losses[-1]

    for _ in range(2):
        for micro in range(2):
            loss_of(model, micro).backward()
        optimizer.step(closure)
        assert not optimizer.is_perturbed
        optimizer.zero_grad()
    assert list(dict.fromkeys(keys)) == [(step, draw) for step in range(2) for draw in range(3)]
    assert len(losses) > 2 or cls is torch.optim.SGD
    assert optimizer.step_count == 2
    assert not changed(model, before)


def test_both_passes_of_a_gradient_cache_share_a_draw(keys):
    model = lora_mlp()
    optimizer = wrap(model)
    x, y = batch()
    for _ in range(2):
        with optimizer.perturbed():
            with torch.no_grad():
                first = model(x)
            second = model(x)
            assert torch.equal(first, second)
            nn.functional.cross_entropy(second, y).backward()
    optimizer.step()


def test_a_graph_of_the_draw_before_is_refused():
    model = lora_mlp()
    optimizer = wrap(model)
    kept = loss_of(model, 0)
    loss_of(model, 1).backward()
    loss_of(model, 2).backward()
    with pytest.raises(RuntimeError, match="at other noise than its forward ran at"):
        kept.backward()
    optimizer.step()


@pytest.mark.parametrize("restore", ["reversible", "copy", "forward"])
@pytest.mark.parametrize("draws", ["micro-batch", "mixed"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_the_draw_before_is_refused(reentrant, draws, restore):
    model = Checkpointed(reentrant)
    optimizer, before = wrap(model, draws=draws, restore=restore), frozen(model)
    kept = loss_of(model, 0)
    loss_of(model, 1).backward()
    loss_of(model, 2).backward()
    with pytest.raises(RuntimeError, match="at other noise than its forward ran at"):
        kept.backward()
    optimizer.step()
    assert not changed(model, before)


@pytest.mark.parametrize("draws", ["micro-batch", "mixed", "mixed/4"])
@pytest.mark.parametrize("how", ["grad", "backward(inputs=)", "penalty first"])
def test_a_gradient_of_the_inputs_ends_no_micro_batch(keys, how, draws):
    """FGSM, PGD, VAT; a gradient penalty before the loss."""
    model = lora_mlp()
    optimizer, before = wrap(model, draws=draws), frozen(model)
    noisy = []
    for micro in range(4):
        x, y = batch(micro)
        x.requires_grad_()
        loss = nn.functional.cross_entropy(model(x), y)
        if how == "grad":
            x = (x + torch.autograd.grad(loss, x)[0]).detach()
        elif how == "penalty first":
            torch.autograd.grad(loss, x, create_graph=True)[0].square().sum().backward(retain_graph=True)
            x = x.detach()
        else:
            loss.backward(inputs=[x])
            x = (x + x.grad).detach()
        if how != "penalty first":
            loss = nn.functional.cross_entropy(model(x), y)
        noisy.append(bool(changed(model, before)))
        loss.backward()
    optimizer.step()
    one_in = {"micro-batch": 1, "mixed": 2, "mixed/4": 4}[draws]
    assert noisy == [micro % one_in == 0 for micro in range(4)]
    assert keys == [(0, draw) for draw in range(4)]


@pytest.mark.parametrize("requires", [True, False], ids=["x wants a gradient", "x wants none"])
@pytest.mark.parametrize("who", ["half of them", "all of them for a while", "copies by functional_call"])
def test_adapters_that_are_frozen_or_replaced(keys, who, requires):
    model = lora_mlp()
    optimizer = wrap(model)
    for micro in range(3):
        x, y = batch(micro)
        x.requires_grad_(requires)
        if who == "all of them for a while":  # a generator's turn: it is not counted
            for parameter in (adapters := trainable(model)):
                parameter.requires_grad_(False)
            if requires:
                nn.functional.cross_entropy(model(x), y).backward()
            for parameter in adapters:
                parameter.requires_grad_(True)
        elif who == "half of them":
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)
        if who == "copies by functional_call" and not requires:
            copies = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
            loss = nn.functional.cross_entropy(torch.func.functional_call(model, copies, (x,)), y)
            for parameter, gradient in zip(trainable(model), torch.autograd.grad(loss, list(copies.values()))):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        else:
            nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert keys == [(0, 0), (0, 1), (0, 2)]


def test_an_input_among_the_outputs_belongs_to_no_draw():
    """hidden_states[0] is the inputs_embeds that were given, made once for all micro-batches."""
    model = lora_mlp()
    inner, embed = model.get_base_model(), nn.Linear(16, 16)
    forward = inner.forward
    inner.forward = lambda x: (forward(x), x)
    optimizer = wrap(model)
    x, y = batch()
    embedded = embed(x)
    for _ in range(2):
        nn.functional.cross_entropy(model(embedded)[0], y).backward(retain_graph=True)
    optimizer.step()
    assert embed.weight.grad is not None


def test_an_attack_through_a_checkpoint_of_somebodys_function_ends_no_micro_batch(keys):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad + 0 * ctx.saved_tensors[0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = lora_mlp()

        def forward(self, x):
            return checkpoint(lambda x: self.inner(Doubled.apply(x)), x, use_reentrant=False)

    model = Model()
    optimizer = wrap(model)
    for micro in range(3):
        x, y = batch(micro)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
        nn.functional.cross_entropy(model((x + gradient).detach()), y).backward()
    optimizer.step()
    assert set(keys) == {(0, 0), (0, 1), (0, 2)}


def test_torch_autograd_grad_ends_a_micro_batch(keys):
    model = lora_mlp()
    optimizer = wrap(model)
    for micro in range(3):
        found = torch.autograd.grad(loss_of(model, micro), trainable(model))
        for parameter, gradient in zip(trainable(model), found):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    optimizer.step()
    assert keys == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_micro_batches_end_as_others_do(keys, reentrant):
    model = Checkpointed(reentrant)
    optimizer = wrap(model)
    for micro in range(3):
        loss_of(model, micro).backward()
        for parameter in trainable(model):
            parameter.grad = None  # as ZeRO-2 takes them: only the backward itself can tell
    optimizer.step()
    assert keys == [(0, 0), (0, 1), (0, 2)]


def test_two_gradients_of_a_step_at_two_draws_are_refused():
    model = lora_mlp()
    with pytest.raises(ValueError, match="draws='mixed' and SAM in one step"):
        FlatPerturbOptimizer(SAM(torch.optim.SGD(trainable(model), lr=0.1)), model, schedule="constant", draws="mixed")
    with pytest.raises(ValueError, match="draws='micro-batch' and SAM in one step"):
        SAM(wrap(model, draws="micro-batch"))


@pytest.mark.parametrize("draws", ["micro-batch", "mixed"])
def test_raw_parameters_have_no_forward_that_begins_a_micro_batch(draws):
    model = lora_mlp()
    weight = model.base_model.model.second.base_layer.weight
    with pytest.raises(ValueError, match="with raw parameters as targets"):
        FlatPerturbOptimizer(
            torch.optim.SGD(trainable(model), lr=0.1), [{"params": [weight]}], schedule="constant", draws=draws
        )


@pytest.mark.parametrize("draws", ["micro-batch", "mixed", "mixed/4"])
def test_a_pickle_keeps_it(draws):
    model = lora_mlp()
    optimizer = pickle.loads(pickle.dumps(wrap(model, draws=draws)))
    assert optimizer.draws == draws


@pytest.mark.parametrize("draws", ["micro-batch", "mixed", "mixed/3"])
@pytest.mark.parametrize("after", [1, 2])
def test_a_pickle_between_micro_batches_goes_on_with_the_next_draw(draws, after):
    torch.manual_seed(0)
    model = lora_mlp()
    optimizer, found = wrap(model, draws=draws), []
    for micro in range(4):
        if micro == after:
            model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
        loss_of(model, micro).backward()
        found.append(gradients(model))
        model.zero_grad()
    torch.manual_seed(0)
    model = lora_mlp()
    optimizer = wrap(model, draws=draws)
    for micro in range(4):
        loss_of(model, micro).backward()
        assert all(map(torch.equal, gradients(model), found[micro])), micro
        model.zero_grad()


@pytest.mark.parametrize(("draws", "one_in"), [("micro-batch", 1), ("mixed", 2), ("mixed/4", 4)])
@pytest.mark.parametrize("form", ["held", "kept on the module", "in a function", "seen by a hook"])
@pytest.mark.parametrize("zero", [True, False])
def test_a_micro_batch_ends_wherever_its_loss_came_from(draws, one_in, form, zero, keys):
    """Also where no loss was made from what the forward returned, and inside ``with optimizer.perturbed()``."""
    model = lora_mlp()
    inside = model.base_model.model
    plain, seen, noisy = inside.forward, [], []
    clean = inside.second.base_layer.weight.detach().clone()
    inside.second.base_layer.register_forward_hook(lambda m, args, out: noisy.append(not torch.equal(m.weight, clean)))
    inside.second.register_forward_hook(lambda m, args, out: seen.append(out))

    def forward(x):
        inside.kept = plain(x)
        return {"kept on the module": inside.kept.detach(), "in a function": [lambda: inside.kept]}.get(form, inside.kept)

    inside.forward = forward
    optimizer = wrap(model, draws=draws)
    for step in range(2):
        if zero:
            optimizer.zero_grad(set_to_none=step == 0)
        for micro in range(4):
            with optimizer.perturbed() if form == "held" else contextlib.nullcontext():
                output = model(batch(seed=micro)[0])
                loss = {"held": output, "seen by a hook": seen[-1]}.get(form, inside.kept)
                loss.square().mean().backward()
        optimizer.step()
    assert noisy == [micro % one_in == 0 for micro in range(4)] * 2
    asked = [(step, draw) for step in range(2) for draw in range(4)]
    assert [key for key in keys if key[1] % one_in == 0] == [key for key in asked if key[1] % one_in == 0]


@pytest.mark.parametrize("draws", ["micro-batch", "mixed", "mixed/3"])
def test_an_auxiliary_backward_between_two_forwards_ends_no_micro_batch(draws, keys):
    """What it reaches is trained by the same optimizer, and is no part of an adapter."""
    model, probe = lora_mlp(), nn.Linear(5, 5)
    parameters = [*probe.parameters(), *trainable(model)]
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(parameters, lr=0.1), model, sigma=0.2, schedule="constant", draws=draws, restore="copy"
    )
    (x, y), clean, noises = batch(), frozen(model), []
    for _ in range(2):
        first = model(x)
        noises.append(frozen(model))
        nn.functional.cross_entropy(probe(first.detach()), y).backward()
        second = model(x)
        assert torch.equal(first, second)
        assert not changed(model, noises[-1])
        (first * second).sum().backward()
    optimizer.step()
    assert changed(model, noises[0])
    assert not changed(model, clean)
    assert sorted(set(keys))[0] == (0, 0)
