"""Methods that read or write W directly find it clean, and the classes are as they were when nobody asks for it any more."""

import functools
import gc
import weakref

import pytest
import torch
from helpers import lora_mlp
from torch import nn

from flatopt.adapters.guards import guard
from flatopt.adapters.registry import adapter_of, find_weights

peft = pytest.importorskip("peft")
from peft.tuners.lora import layer as lora_layer  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner  # noqa: E402


class Counted:
    def __init__(self):
        self.seen, self.reached = [], set()

    def __call__(self, module):
        self.seen.append(module)
        self.reached.update(module.modules())


def methods_of(model):
    return [m for w in find_weights([model]) for m in w.adapter.guarded_methods(w.layer)]


def methods_now():
    tuners = [BaseTuner, *BaseTuner.__subclasses__(), lora_layer.Linear]
    return {(cls, name): value for cls in tuners for name, value in cls.__dict__.items() if callable(value)}


@pytest.fixture(autouse=True)
def _classes_are_as_they_were():
    before = methods_now()
    yield
    assert {k: v for k, v in methods_now().items() if before.get(k) is not v} == {}


def layers_of(model):
    return [w.layer for w in find_weights([model])]


TOUCHING = {
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "unload": lambda m: m.unload(),
    "merge_adapter": lambda m: m.merge_adapter(),
    "add_adapter": lambda m: m.add_adapter("second", peft.LoraConfig(target_modules=["first"], init_lora_weights="pissa")),
    "add_weighted_adapter": lambda m: m.add_weighted_adapter(["default"], [1.0], "third"),
    "delete_adapter": lambda m: m.delete_adapter("default"),
    "layer.merge": lambda m: m.base_model.model.first.merge(),
}


@pytest.mark.parametrize("name", TOUCHING)
def test_runs_before_whatever_touches_the_weights(model, name):
    seen = Counted()
    release = guard(methods_of(model), seen)
    layers = layers_of(model)
    TOUCHING[name](model)
    assert seen.reached.intersection(layers)
    release()
    count = len(seen.seen)
    TOUCHING[name](lora_mlp())
    assert len(seen.seen) == count


def test_choosing_an_adapter_touches_no_weight(model):
    model.add_adapter("second", peft.LoraConfig(target_modules=["first"]))
    seen = Counted()
    release = guard(methods_of(model), seen)
    model.set_adapter("second")
    with model.disable_adapter():
        model(torch.randn(2, 16))
    release()
    assert not seen.seen


def test_an_exception_is_passed_on_and_the_method_does_not_run(model):
    def refuse(module):
        raise RuntimeError("not now")

    release = guard(methods_of(model), refuse)
    layer = model.base_model.model.first
    with pytest.raises(RuntimeError, match="not now"):
        layer.merge()
    release()
    assert not layer.merged


def test_counted(model):
    first, second = Counted(), Counted()
    releases = [guard(methods_of(model), seen) for seen in (first, second)]
    layer = model.base_model.model.first
    layer.merge()
    releases[0]()
    releases[0]()  # twice does no harm
    layer.unmerge()
    assert (len(first.seen), len(second.seen)) == (1, 2)
    releases[1]()


def test_the_same_function_given_twice_is_released_once_each(model):
    seen = Counted()
    one, two = guard(methods_of(model), seen), guard(methods_of(model), seen)
    one()
    model.base_model.model.first.merge()
    assert len(seen.seen) == 1
    two()


def test_wrapped_by_others_in_between(model):
    seen, layer, original = Counted(), model.base_model.model.first, lora_layer.Linear.merge
    release = guard(methods_of(model), seen)
    ours = lora_layer.Linear.merge

    @functools.wraps(ours)
    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    lora_layer.Linear.merge = theirs
    release()
    assert lora_layer.Linear.merge is theirs  # theirs stays, and ours under it passes calls on
    layer.merge()
    layer.unmerge()
    assert not seen.seen
    assert not layer.merged
    release = guard(methods_of(model), seen)
    assert lora_layer.Linear.merge is theirs  # no second layer of ours
    layer.merge()
    assert len(seen.seen) == 1
    lora_layer.Linear.merge = ours  # theirs goes
    release()
    assert lora_layer.Linear.merge is original


def test_taken_off_by_others(model):
    seen, later, layer, original = Counted(), Counted(), model.base_model.model.first, lora_layer.Linear.merge
    release = guard(methods_of(model), seen)
    lora_layer.Linear.merge = original
    release_later = guard(methods_of(model), later)
    layer.merge()
    assert len(seen.seen) == len(later.seen) == 1  # the earlier one is on again, too
    release()
    release_later()


def test_keeps_nothing_alive_after_release(model):
    seen = Counted()
    release = guard(methods_of(model), seen)
    release()
    gone = weakref.ref(seen)
    del seen
    gc.collect()
    assert gone() is None


def test_graphs_notice_that_peft_wrote_to_a_weight(model):
    release = guard(methods_of(model), lambda module: None)
    layer = model.base_model.model.second
    x = torch.randn(3, 32, requires_grad=True)
    version = layer.base_layer.weight._version
    y = layer(x).sum()
    layer.merge()
    assert layer.base_layer.weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    release()


def test_graphs_notice_that_an_init_wrote_to_a_weight(model):
    release = guard(methods_of(model), lambda module: None)
    weight = model.base_model.model.second.base_layer.weight
    version = weight._version
    model.add_adapter("second", peft.LoraConfig(target_modules=["second"], init_lora_weights="olora"))
    assert weight._version > version
    release()


def test_attention_that_merges_itself_in_its_forward_is_left_alone():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(16, 2)

        def forward(self, x):
            return self.layer(x, x, x)[0]

    model = peft.get_peft_model(Attention(), peft.LoraConfig(target_modules=["layer"], init_lora_weights=False))
    seen = Counted()
    release = guard(methods_of(model), seen)
    model(torch.randn(3, 2, 16)).sum().backward()
    assert not seen.seen
    model.merge_adapter()
    assert seen.seen
    release()


def test_loralib_that_merges_itself_in_eval():
    lora = pytest.importorskip("loralib")
    model = nn.Sequential(lora.Linear(8, 8, r=2), lora.Linear(8, 8, r=2, merge_weights=False))
    train, seen = lora.Linear.__dict__["train"], Counted()
    release = guard(methods_of(model), seen)
    model.train()  # as loops do for each batch: nothing is merged
    assert not seen.seen
    version = model[0].weight._version
    model.eval()
    assert seen.seen == [model[0], model[1]]
    assert model[0].weight._version > version
    model.eval()
    assert len(seen.seen) == 3  # the first has merged already, the second never does
    model.train()
    assert seen.seen[3:] == [model[0]]
    release()
    assert lora.Linear.__dict__["train"] is train


def test_inherited_methods_are_guarded_where_they_are_defined():
    class Base(nn.Module):
        def merge(self):
            return "merged"

    class Sub(Base):
        pass

    seen, merge = Counted(), Base.merge
    release = guard([(Sub, "merge"), (Base, "merge")], seen)
    assert Sub().merge() == "merged"
    assert len(seen.seen) == 1
    assert "merge" not in Sub.__dict__
    release()
    assert Base.merge is merge
    assert adapter_of(Base()) is None
