"""Any sequence of what may happen to a model in training: no bit of W is lost, and everyone sees the W that is theirs."""

import contextlib
import copy
import pickle
import signal

import pytest
import torch
from helpers import batch, bits, lora_mlp, trainable
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from flatopt import FlatPerturbOptimizer

LAYERS = ("first", "second", "head")
DRIFT = 1e-5  # of subtract, by rounding; the noise is thousands of times as large


class Fault(Exception):
    pass


class At(TorchDispatchMode):
    """Does something at the ``k``-th torch operation."""

    def __init__(self, k, act):
        super().__init__()
        self.left, self.act = k, act

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            self.act()
        return func(*args, **(kwargs or {}))


def fail():
    raise Fault


def press():
    signal.raise_signal(signal.SIGINT)


class Reader:
    """A forward hook that tells ``seen`` of what a base layer computed; in copies of the model it tells nobody."""

    def __init__(self, seen=None):
        self.seen = seen

    def __call__(self, *args):
        if self.seen is not None:
            self.seen(*args)

    def __reduce__(self):
        return Reader, ()


class Training(RuleBasedStateMachine):
    restore: str

    @initialize(seed=st.integers(0, 3))
    def start(self, seed):
        torch.manual_seed(seed)
        self.before_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.model = lora_mlp()
        self.merged, self.loss, self.saved = False, None, None
        self.x = batch(rows=2)[0]
        inner = torch.optim.SGD(trainable(self.model), lr=0.01, momentum=0.9)
        self.optimizer = FlatPerturbOptimizer(
            inner, self.model, sigma=0.3, schedule="constant", restore=self.restore, seed=seed
        )
        inside = self.model.base_model.model
        self.owners = [getattr(inside, name).base_layer for name in LAYERS]
        self.clean = [owner.weight.detach().clone() for owner in self.owners]
        self.sees = []  # a training forward: noise; any other: none
        for owner in self.owners:
            owner.register_forward_hook(Reader(self.seen))

    def teardown(self):
        if hasattr(self, "optimizer"):
            self.optimizer.restore()
            self.check_clean(self.weights())
            signal.signal(signal.SIGINT, self.before_handler)

    # --- what is seen -----------------------------------------------------------------------------------------------

    def weights(self):
        return [owner.weight for owner in self.owners]

    def differ(self):
        if self.restore == "forward":
            return [owner.forward.on for owner in self.owners if "forward" in owner.__dict__] or [False] * 3
        return [not self.same(w, c) for w, c in zip(self.weights(), self.clean)]

    def same(self, weight, clean):
        if self.restore == "subtract":
            return torch.allclose(weight, clean, rtol=0, atol=DRIFT)
        return torch.equal(bits(weight), bits(clean))

    def check_clean(self, weights):
        assert all(map(self.same, weights, self.clean))

    def seen(self, owner, args, output):
        expected = torch.nn.functional.linear(args[0], self.clean[self.owners.index(owner)], owner.bias)
        tolerance = 0.0 if self.restore != "subtract" else 1e-3 * float(args[0].detach().abs().max())
        if torch.allclose(output, expected, rtol=0, atol=tolerance) is self.sees_noise:
            self.sees.append(f"sees {'clean' if self.sees_noise else 'noisy'} weights")

    def forward(self, noise, run):
        self.sees_noise, self.sees = noise, []
        try:
            return run()
        finally:
            assert not self.sees, self.sees

    @invariant()
    def is_perturbed_tells_the_truth(self):
        if hasattr(self, "optimizer"):
            assert self.differ() == [self.optimizer.is_perturbed] * 3

    # --- the loop ---------------------------------------------------------------------------------------------------

    trains = precondition(lambda self: not self.merged)

    @trains
    @rule()
    def train_forward(self):
        self.model.train()
        self.loss = self.forward(True, lambda: self.model(self.x).square().sum())

    @trains
    @rule()
    def train_forward_of_a_part(self):
        self.model.train()
        self.forward(True, lambda: self.model.base_model.model.second(torch.ones(2, 32)))

    @rule()
    def no_grad_forward(self):
        self.model.train()
        if not self.merged:
            with torch.no_grad():
                self.forward(False, lambda: self.model(self.x))

    @trains
    @rule()
    def eval_forward(self):
        self.model.eval()
        self.forward(False, lambda: self.model(self.x))

    @trains
    @rule(layer=st.sampled_from(range(3)), evaluation=st.booleans())
    def read_a_base_layer(self, layer, evaluation):
        owner = self.owners[layer]
        self.model.train(not evaluation)
        with torch.set_grad_enabled(evaluation):
            self.forward(False, lambda: owner(torch.ones(2, owner.in_features)))

    @trains
    @precondition(lambda self: self.loss is not None)
    @rule()
    def backward(self):
        loss, self.loss = self.loss, None
        with contextlib.suppress(RuntimeError):  # where the step ended in between: W is not what the graph saved
            loss.backward()

    @trains
    @rule()
    def step(self):
        steps, drew = self.optimizer.step_count, self.optimizer._drawn
        self.optimizer.step()
        assert self.optimizer.step_count == steps + drew
        assert not self.optimizer.is_perturbed
        self.optimizer.zero_grad()

    @trains
    @rule()
    def step_with_closure(self):
        self.model.train()

        def closure():
            self.optimizer.zero_grad()
            loss = self.forward(True, lambda: self.model(self.x).square().sum())
            loss.backward()
            return loss

        steps = self.optimizer.step_count
        self.optimizer.step(closure)
        assert self.optimizer.step_count == steps + 1

    # --- what goes wrong --------------------------------------------------------------------------------------------

    @trains
    @rule(
        k=st.integers(1, 700),
        act=st.sampled_from([fail, press]),
        during=st.sampled_from(["train_forward", "no_grad_forward", "eval_forward", "step", "step_with_closure", "restore"]),
    )
    def interrupted(self, k, act, during):
        move = self.optimizer.restore if during == "restore" else getattr(self, during)
        mode = At(k, act)
        try:
            with mode:
                move()
        except (Fault, KeyboardInterrupt):
            self.loss = None

    # --- who copies, saves, merges ----------------------------------------------------------------------------------

    @trains
    @rule(copier=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copied(self, copier):
        inside = copier(self.model).base_model.model
        self.check_clean([getattr(inside, name).base_layer.weight for name in LAYERS])

    @trains
    @rule()
    def state_dict(self):
        state = self.model.state_dict()
        self.check_clean([state[f"base_model.model.{name}.base_layer.weight"] for name in LAYERS])

    @trains
    @rule()
    def load_state_dict(self):
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()))

    @trains
    @rule()
    def merge(self):
        expected = [
            clean + getattr(self.model.base_model.model, name).get_delta_weight("default").detach()
            for name, clean in zip(LAYERS, self.clean)
        ]
        self.model.merge_adapter()
        self.merged, self.loss = True, None
        assert all(map(self.same, self.weights(), expected))
        self.unmerged, self.clean = self.clean, [w.detach().clone() for w in self.weights()]

    @precondition(lambda self: getattr(self, "merged", False))
    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = False
        # unmerging rounds: what it leaves is the clean weight now
        self.clean = [w.detach().clone() for w in self.weights()]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(self.clean, self.unmerged))

    @trains
    @rule()
    def save_optimizer(self):
        self.saved = copy.deepcopy(self.optimizer.state_dict())
        self.saved_step = self.optimizer.step_count

    @precondition(lambda self: getattr(self, "saved", None) is not None and not self.merged)
    @rule()
    def load_optimizer(self):
        self.optimizer.load_state_dict(self.saved)
        assert self.optimizer.step_count == self.saved_step
        assert not self.optimizer.is_perturbed


@pytest.mark.parametrize("restore", ["reversible", "copy", "subtract", "forward"])
@pytest.mark.filterwarnings("ignore:FlatPerturbOptimizer.step")
def test_any_sequence(restore):
    class OfOneKind(Training):
        pass

    OfOneKind.restore = restore
    case = OfOneKind.TestCase
    case.settings = settings(
        max_examples=25,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],  # a failure is told as it was found: to shrink it takes minutes
    )
    case().runTest()
