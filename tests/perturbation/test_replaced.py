"""A base weight replaced or moved amid a step: the new one is touched only where it is the same weight in other memory."""

import pytest
import torch
from helpers import batch, bits, changed, frozen, lora_mlp, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer

NAME = "base_model.model.second.base_layer.weight"
SAID = r"second\.weight was replaced while it was perturbed: the parameter that it was is clean again"


class Run:
    def __init__(self, restore):
        self.model = lora_mlp()
        self.clean = frozen(self.model)
        self.owner = self.model.base_model.model.second.base_layer
        self.old = self.owner.weight
        inner = torch.optim.SGD(trainable(self.model), lr=0.0)
        self.optimizer = FlatPerturbOptimizer(inner, self.model, sigma=0.2, schedule="constant", restore=restore)
        self.train()

    def train(self):
        loss = self.model(batch()[0]).square().mean()
        assert self.optimizer.is_perturbed
        return loss

    def read(self):
        with torch.no_grad():
            return self.model(batch()[0])

    def others(self):
        return [name for name in changed(self.model, self.clean) if name != NAME]


@pytest.fixture(params=["reversible", "copy"])
def run(request):
    return Run(request.param)


def another(owner):
    return torch.arange(owner.weight.numel(), dtype=owner.weight.dtype).view_as(owner.weight)


def new_parameter(owner):
    owner.weight = nn.Parameter(another(owner), requires_grad=False)


def made_from_the_old_one(owner):
    owner.weight = nn.Parameter(owner.weight.detach() * 2, requires_grad=False)


def other_data(owner):
    owner.weight.data = another(owner)


REPLACE = [new_parameter, made_from_the_old_one, other_data]


@pytest.mark.parametrize("replace", REPLACE)
def test_what_takes_its_place_is_left_as_it_is_and_told(run, replace):
    kept = run.old.detach()
    replace(run.owner)
    put = run.owner.weight.detach().clone()
    with pytest.raises(RuntimeError, match=SAID):
        run.optimizer.step()
    assert not run.optimizer.is_perturbed
    assert torch.equal(bits(run.owner.weight), bits(put))
    assert torch.equal(bits(kept), bits(run.clean[NAME]))
    assert not run.others()
    run.train().backward()  # the new one is the weight from now on
    assert not torch.equal(run.owner.weight, put)
    run.optimizer.step()
    assert torch.equal(bits(run.owner.weight), bits(put))


@pytest.mark.parametrize("replace", REPLACE)
def test_swapped_in_for_a_reader_and_out_again(run, replace):
    """An EMA whose parameters stand in the model's place for an evaluation."""
    loss, noisy = run.train(), run.old.detach().clone()
    data = run.old.data
    replace(run.owner)
    put = run.owner.weight.detach().clone()
    run.read()
    assert torch.equal(bits(run.owner.weight), bits(put))
    run.owner.weight = run.old
    run.old.data = data
    assert not changed(run.model, run.clean)
    loss.backward()
    assert torch.equal(bits(run.owner.weight), bits(noisy))
    run.optimizer.step()
    assert not changed(run.model, run.clean)


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize("end", ["train", "step", "restore", "detach"])
def test_not_swapped_out_again_is_told_when_w_is_next_used(run, replace, end):
    replace(run.owner)
    put = run.owner.weight.detach().clone()
    run.read()
    call = run.train if end == "train" else getattr(run.optimizer, end)
    with pytest.raises(RuntimeError, match=SAID):
        call()
    assert not run.optimizer.is_perturbed
    assert torch.equal(bits(run.owner.weight), bits(put))
    assert not run.others()


@pytest.mark.parametrize("replace", [new_parameter, other_data])
def test_replaced_while_a_reader_has_w_clean_is_no_fault(run, replace):
    run.read()
    replace(run.owner)
    put = run.owner.weight.detach().clone()
    run.train().backward()
    assert not torch.equal(run.owner.weight, put)  # the new one gets the noise
    run.optimizer.step()
    assert torch.equal(bits(run.owner.weight), bits(put))
    assert not run.others()


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_loaded_amid_a_step_is_what_the_weights_are(run, assign):
    checkpoint = {name: torch.ones_like(p) for name, p in run.model.state_dict().items()}
    run.train()
    run.model.load_state_dict(checkpoint, assign=assign)
    for name, p in run.model.named_parameters():
        p.requires_grad_("lora" in name)
    for _ in range(2):
        assert (run.owner.weight == 1).all()
        run.train().backward()
        assert not (run.owner.weight == 1).all()
        run.optimizer.step()
    assert (run.owner.weight == 1).all()


MOVES = {
    "dtype": lambda model: model.to(torch.float64),
    "dtype and back": lambda model: model.to(torch.float64).to(torch.float32),
    "a copy": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("when", ["perturbed", "suspended"])
def test_a_model_moved_amid_a_step_is_clean_where_it_is_now(run, move, when):
    if when == "suspended":
        run.read()
    MOVES[move](run.model)
    if when == "suspended" and move == "a copy":
        run.train()
    run.optimizer.restore()
    for name, p in run.model.named_parameters():
        if name in run.clean:
            assert torch.equal(p, run.clean[name].to(p.dtype)), name


def test_a_move_is_followed_though_the_first_restore_fails(run, monkeypatch):
    MOVES["a copy"](run.model)
    plan = run.optimizer._weights._plans[0]
    restore, fails = plan.restore, [True, True]

    def restore_then_fail():
        restore()
        if fails:
            fails.pop()
            raise MemoryError

    monkeypatch.setattr(plan, "restore", restore_then_fail)
    with pytest.raises(MemoryError):
        run.optimizer.restore()
    run.optimizer.restore()
    assert not changed(run.model, run.clean)


def test_written_to_with_copies_says_that_the_clean_value_is_back():
    run = Run("copy")
    with torch.no_grad():
        run.owner.weight.mul_(2)
    with pytest.raises(RuntimeError, match="clean value is back, from the copy, and what was written is lost"):
        run.optimizer.step()
    assert not changed(run.model, run.clean)


@pytest.mark.parametrize("goes_on", [True, False], ids=["another micro-batch", "the step"])
def test_an_average_swapped_in_by_value_for_a_reader_and_out_again(run, goes_on):
    model = run.model
    for _ in range(2):
        kept = {p: p.detach().clone() for p in model.parameters()}  # W + ε, read by hand
        for name, p in model.named_parameters():
            p.data.copy_(run.clean.get(name, p))
        run.read()
        for p, value in kept.items():
            p.data.copy_(value)
        if goes_on:
            run.train()
        run.optimizer.step()
        assert not changed(model, run.clean)
        run.train()


def test_an_average_taken_amid_a_step_is_that_of_clean_weights(run):
    average = torch.optim.swa_utils.AveragedModel(run.model)
    average.update_parameters(run.model)
    averaged = dict(average.module.named_parameters())
    assert all(torch.equal(averaged[name], w) for name, w in run.clean.items())
    run.optimizer.step()
    assert not changed(run.model, run.clean)
