"""Perturb, restore, suspend and resume are all or none: an exception at any torch operation inside loses nothing."""

import copy

import pytest
import torch
from helpers import bits, trainable
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatopt import FlatPerturbOptimizer

RESTORES = ["reversible", "copy", "subtract", "forward"]
X = torch.eye(6)


class Fault(Exception):
    """As an allocation that fails, say."""


class RaiseAt(TorchDispatchMode):
    """Raises at the ``k``-th operation from now, before it runs; or after it ran, of those that write to a tensor.

    After one that writes to none memory is as it is before the next.
    """

    def __init__(self, k, when, error=Fault):
        super().__init__()
        self.left, self.when, self.error = k, when, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= self.when == "before" or func._schema.is_mutable
        if self.left == 0 and self.when == "before":
            raise self.error
        result = func(*args, **(kwargs or {}))
        if self.left == 0 and self.when == "after" and func._schema.is_mutable:
            raise self.error
        return result


class Run:
    """Two adapted layers at the same step over and over: learning rate 0, the step counted back."""

    def __init__(self, restore, noise="filter"):
        from peft import LoraConfig, get_peft_model

        model = nn.Sequential(nn.Linear(6, 7, bias=False), nn.Linear(7, 3))
        self.model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
        self.owners = [m for m in self.model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
        self.exact = restore != "subtract"
        inner = torch.optim.SGD(trainable(self.model), lr=0.0)
        options = {"sigma": 1.0, "draws": "mixed"} if noise == "int4" else {"sigma": 0.3}
        self.optimizer = FlatPerturbOptimizer(
            inner, self.model, schedule="constant", restore=restore, noise=noise, **options
        )
        self.weights = [owner.weight.detach().clone() for owner in self.owners]
        self.clean = self.effective()
        self.train()
        self.noisy = self.effective()
        self.optimizer.restore()
        assert not any(torch.equal(a, b) for a, b in zip(self.clean, self.noisy))

    @torch.no_grad()
    def effective(self):
        """The weights that the layers compute with, past all hooks."""
        return [owner.forward(torch.eye(owner.in_features)) for owner in self.owners]

    def stand_at(self, expected):
        same = torch.equal if self.exact else lambda a, b: torch.allclose(a, b, atol=1e-5)
        return all(same(a, b) for a, b in zip(self.effective(), expected))

    def train(self):
        return self.model(X).square().sum()

    def evaluate(self):
        with torch.no_grad():
            return self.model(X)

    def check_after_a_fault(self, k):
        assert self.stand_at(self.noisy if self.optimizer.is_perturbed else self.clean)
        if k % 2:  # the same step goes on
            self.train()
            assert self.optimizer.is_perturbed
            assert self.stand_at(self.noisy)
        self.optimizer.restore()
        assert not self.optimizer.is_perturbed
        self.check_clean()
        if k % 16 == 0:
            self.train().backward()
            assert self.stand_at(self.noisy)
            self.optimizer.step()
            assert self.optimizer.step_count == 1
            self.check_clean()
            self.optimizer.step_count = 0

    def check_clean(self):
        assert self.stand_at(self.clean)
        for owner, weight in zip(self.owners, self.weights):
            if self.exact:
                assert torch.equal(bits(owner.weight), bits(weight))
            else:  # it drifts by rounding; no noise stays
                with torch.no_grad():
                    owner.weight.copy_(weight)


def perturb(run):
    run.optimizer.perturb()


def restore(run):
    run.optimizer.restore()


MOVES = {  # what is done before, and the move at whose operations an exception comes
    "perturb": ((), Run.train),
    "restore": ((perturb,), restore),
    "suspend": ((perturb,), Run.evaluate),
    "resume": ((perturb, Run.evaluate), Run.train),
}


def faults(run, move, make, stride=1):
    """Makes ``move`` with an exception at operation 1, 2 and so on, until none comes; yields their numbers."""
    before, act = MOVES[move]
    for k in range(1, 10_000, stride):
        for each in before:
            each(run)
        mode = make(k)
        try:
            with mode:
                act(run)
        except Fault:
            yield k
        else:
            assert mode.left > 0, "the exception was swallowed"
            run.optimizer.restore()
            return


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("restore", RESTORES)
def test_an_exception_at_any_operation(restore, move, when):
    run, count = Run(restore), 0
    for k in faults(run, move, lambda k: RaiseAt(k, when)):
        run.check_after_a_fault(k)
        count += 1
    assert restore == "forward" or count > 1


@pytest.mark.filterwarnings("ignore:draws=.mixed., but a step had fewer micro-batches")
@pytest.mark.parametrize("noise", ["layer", "isotropic", "element", "int4"])
def test_every_kind_of_noise(noise):
    run = Run("copy" if noise == "int4" else "reversible", noise)
    for move in ("perturb", "restore", "suspend", "resume"):
        for k in faults(run, move, lambda k: RaiseAt(k, "after"), stride=7):
            run.check_after_a_fault(k)


class RaiseFrom(RaiseAt):
    """Raises at every operation from the ``k``-th on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left = max(self.left, 1)
        return super().__torch_dispatch__(func, types, args, kwargs)


NEXT = {
    "restore": lambda run: run.optimizer.restore(),
    "training forward": lambda run: run.train(),
    "perturb": lambda run: run.optimizer.perturb(),
    "eval forward": lambda run: run.evaluate(),
    "state_dict": lambda run: run.model.state_dict(),
    "deepcopy": lambda run: copy.deepcopy(run.model),
    "one layer": lambda run: run.model.base_model.model[1](torch.eye(7)),
}


@pytest.mark.parametrize("then", NEXT)
@pytest.mark.parametrize("restore", ["reversible", "copy"])
def test_when_nothing_works_any_more(restore, then):
    """As where memory is full: the next to use W, when something works again, finds it all clean or all perturbed."""
    run, noisy = Run(restore), then in ("training forward", "perturb", "one layer")
    stride = 28 if then == "deepcopy" else 7  # a copy is slow
    for move in MOVES:
        for _ in faults(run, move, lambda k: RaiseFrom(k, "before"), stride=stride):
            NEXT[then](run)
            assert run.optimizer.is_perturbed is noisy
            assert run.stand_at(run.noisy if noisy else run.clean)
            run.optimizer.restore()
            run.check_clean()


def test_a_recomputation_in_backward_at_weights_perturbed_in_part_is_refused():
    from torch.utils.checkpoint import checkpoint

    run = Run("reversible")
    refused = 0
    for k in range(1, 300, 7):
        loss = checkpoint(run.model, X, use_reentrant=False).square().sum()
        mode = RaiseFrom(k, "before")
        try:
            with mode:
                run.evaluate()
        except Fault:
            if run.optimizer._weights.partly:
                with pytest.raises(RuntimeError, match="perturbed in part"):
                    loss.backward()
                refused += 1
        run.optimizer.restore()
        run.check_clean()
        run.model.zero_grad()
        if mode.left > 0:
            break
    assert refused
