"""One weight has one optimizer, whatever name it goes by; and who lets go of it leaves nothing behind."""

import gc
import warnings
import weakref

import pytest
import torch
from helpers import Mlp, batch, changed, frozen, lora_mlp, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer
from flatopt.perturbation.weights import _attached

NOTHING_TO_TRAIN = [nn.Parameter(torch.zeros(1))]


def wrap(model, targets=None, **options):
    inner = torch.optim.SGD(trainable(model) if model is not None else NOTHING_TO_TRAIN, lr=0.1)
    return FlatPerturbOptimizer(inner, model if targets is None else targets, sigma=0.2, schedule="constant", **options)


def base_weight(model):
    return model.base_model.model.second.base_layer.weight


SAME_MEMORY = {
    "the parameter": lambda w: [w],
    "its data": lambda w: [nn.Parameter(w.data, requires_grad=False)],
    "a view of some rows": lambda w: [nn.Parameter(w.data[3:5], requires_grad=False)],
    "its transpose": lambda w: [nn.Parameter(w.data.t(), requires_grad=False)],
    "one element": lambda w: [nn.Parameter(w.data[-1:, -1:], requires_grad=False)],
}


@pytest.mark.parametrize("form", SAME_MEMORY)
@pytest.mark.parametrize("raw_first", [True, False])
def test_the_newest_takes_over_whatever_shares_memory(form, raw_first):
    model = lora_mlp()
    before = frozen(model)
    params = [{"params": SAME_MEMORY[form](base_weight(model))}]
    older = wrap(None, params) if raw_first else wrap(model)
    older.perturb()
    with pytest.warns(UserWarning, match="takes over"):
        newer = wrap(model) if raw_first else wrap(None, params)
    assert not older.is_perturbed
    assert not changed(model, before)
    with pytest.raises(RuntimeError, match="detached"):
        older.perturb()
    newer.perturb()
    assert changed(model, before)
    newer.restore()
    assert not changed(model, before)


def test_neighbours_in_one_storage_have_nothing_in_common():
    whole = torch.randn(8, 4)
    clean = whole.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top, bottom = (
            wrap(None, [{"params": [nn.Parameter(half, requires_grad=False)]}]) for half in (whole[:4], whole[4:])
        )
    top.perturb(), bottom.perturb()
    top.restore()
    assert torch.equal(whole[:4], clean[:4])
    assert not torch.equal(whole[4:], clean[4:])
    bottom.restore()
    assert torch.equal(whole, clean)


def test_tied_weights_are_perturbed_once():
    model = Mlp()
    tied = Mlp()
    tied.second.weight = model.second.weight
    pair = nn.ModuleList([model, tied]).requires_grad_(False)
    clean = model.second.weight.detach().clone()
    once = wrap(None, [{"params": [model.second.weight]}])
    once.perturb()
    noisy = model.second.weight.detach().clone()
    once.detach()
    twice = wrap(None, [{"params": [model.second.weight, tied.second.weight]}])
    twice.perturb()
    assert torch.equal(model.second.weight, noisy)
    twice.restore()
    assert torch.equal(pair[1].second.weight, clean)


@pytest.mark.parametrize(
    "views",
    [
        lambda w: (w[:5], w[4:]),
        lambda w: (w, w[2:3]),
        lambda w: (w[:, :3], w[2:4]),
        lambda w: (w.t(), w[:7]),
        lambda w: (w, w.view(4, -1)[1:]),
    ],
)
def test_views_that_overlap_are_refused(views):
    params = [nn.Parameter(view, requires_grad=False) for view in views(torch.randn(8, 6))]
    with pytest.raises(ValueError, match="overlap"):
        wrap(None, [{"params": params}])
    with pytest.raises(ValueError, match="overlap"):
        wrap(None, [{"params": params[:1]}, {"params": params[1:], "sigma": 0.1}])


@pytest.mark.parametrize("views", [lambda w: (w[:, :3], w[:, 3:]), lambda w: (w[::2], w[1::2])])
def test_views_side_by_side_are_not(views):
    w = torch.randn(8, 6)
    clean = w.clone()
    optimizer = wrap(None, [{"params": [nn.Parameter(view, requires_grad=False) for view in views(w)]}])
    optimizer.perturb()
    assert (w != clean).float().mean() > 0.8
    optimizer.restore()
    assert torch.equal(w, clean)


def hooks_on(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def methods_of_peft():
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer, LoraModel
    from peft.tuners.lora import layer as layers

    classes = [PeftModel, LoraModel, LoraLayer, layers.Linear, *LoraModel.__mro__, *layers.Linear.__mro__]
    return {
        (cls, name): value for cls in classes if cls is not object for name, value in vars(cls).items() if callable(value)
    }


@pytest.mark.parametrize("restore", ["reversible", "copy", "forward"])
@pytest.mark.parametrize("how", ["detach", "with", "with that raises", "del"])
def test_nothing_stays_behind(how, restore):
    gc.collect()
    for weights in list(_attached):  # of optimizers that other tests keep, in fixtures of a module
        weights.detach_all()
    model = lora_mlp()
    model(batch()[0])
    classes, hooks, before = methods_of_peft(), hooks_on(model), frozen(model)
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    optimizer = FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant", restore=restore)
    second_model = lora_mlp()
    second = wrap(second_model)
    assert methods_of_peft() != classes
    model(batch()[0]).sum().backward()
    if how == "detach":
        optimizer.detach()
        optimizer.detach()
    elif how == "with":
        with optimizer:
            pass
    elif how == "with that raises":
        with pytest.raises(ZeroDivisionError), optimizer:
            1 / 0  # noqa: B018
    else:
        del optimizer
    assert not changed(model, before)
    assert hooks_on(model) == hooks
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert methods_of_peft() != classes  # the second one still needs them
    second.detach()
    assert methods_of_peft() == classes
    model(batch()[0])
    assert not changed(model, before)
    inner.step()
    again = FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant")
    model(batch()[0])
    assert again.is_perturbed


@pytest.mark.parametrize("restore", ["reversible", "copy", "subtract", "forward"])
@pytest.mark.parametrize("amid", [True, False])
def test_an_optimizer_dies_with_its_last_reference(restore, amid):
    model = lora_mlp()
    optimizer = wrap(model, restore=restore)
    gc.collect()
    gc.disable()
    try:
        loss = model(batch()[0]).sum()
        if not amid:
            loss.backward()
            optimizer.step()
        reference = weakref.ref(optimizer)
        del optimizer, loss
        assert reference() is None
        assert not hooks_on(model)
    finally:
        gc.enable()


@pytest.mark.parametrize("restore", ["reversible", "copy", "forward"])
@pytest.mark.parametrize("amid", [True, False])
def test_a_model_dies_with_its_optimizer(restore, amid):
    """Its modules refer to each other, so the collector takes them; W's memory must be gone then."""
    model = lora_mlp()
    optimizer = wrap(model, restore=restore)
    loss = model(batch()[0]).sum()
    if not amid:
        loss.backward()
        optimizer.step()
    references = [weakref.ref(model), weakref.ref(base_weight(model)), weakref.ref(optimizer)]
    del model, optimizer, loss
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_a_finished_optimizer_keeps_no_model():
    model = lora_mlp()
    optimizer = wrap(model)
    model(batch()[0]).sum().backward()
    optimizer.step()
    reference = weakref.ref(base_weight(model).untyped_storage())
    with torch.no_grad():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and not p.requires_grad:
                    setattr(module, name, nn.Parameter(p.clone(), requires_grad=False))
    del module, p
    gc.collect()
    assert reference() is None  # between steps nothing holds W's memory
    model(batch()[0])
    assert optimizer.is_perturbed


@pytest.mark.parametrize("zeroed", ["before", "after", "in place"])
@pytest.mark.parametrize("what", ["the next adapter", "a head", "another model"])
def test_who_trains_beside_an_optimizer_that_is_done_with_is_told_once(what, zeroed):
    from peft import LoraConfig

    model = lora_mlp(modules_to_save=["head"])
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(adapter, lr=0.1), model, sigma=0.2, schedule="constant")
    x, y = batch()

    def backward(through=lambda out: out):
        nn.functional.cross_entropy(through(model(x)), y).backward()

    for _ in range(2):
        if zeroed == "before":
            optimizer.zero_grad()  # so that the last gradients stay
        backward()
        optimizer.step()
        if zeroed != "before":
            optimizer.zero_grad(set_to_none=zeroed == "after")
    through = nn.Linear(5, 5)
    for parameter in trainable(model):
        parameter.requires_grad_(False)
    if what == "the next adapter":
        model.add_adapter("next", LoraConfig(r=2, target_modules=["second"]))
        model.set_adapter("next")
    elif what == "a head":
        model.base_model.model.head.modules_to_save["default"].requires_grad_(True)
    beside = torch.optim.SGD(through.parameters() if what == "another model" else trainable(model), lr=0.1)
    said = []
    for _ in range(22):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backward(through)
            beside.step()
            beside.zero_grad()
        said += [str(w.message) for w in caught]
    assert len(said) == (what != "another model"), said
    assert all("SGD was stepped 20 times" in each and "call its detach()" in each for each in said)


@pytest.mark.parametrize("freeze", [False, True])
def test_who_trains_the_head_first_is_told(freeze):
    """Linear probing, when the adapter's optimizer is there already, its parameters frozen meanwhile or not."""
    model = lora_mlp(modules_to_save=["head"])
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(adapter, lr=0.1), model, sigma=0.2, schedule="constant")
    beside = torch.optim.SGD([p for name, p in model.named_parameters() if "modules_to_save" in name], lr=0.1)
    for parameter in adapter:
        parameter.requires_grad_(not freeze)
    x, y = batch()
    said = []
    for _ in range(102):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nn.functional.cross_entropy(model(x), y).backward()
            beside.step()
            beside.zero_grad()
        said += [str(w.message) for w in caught]
    assert [f"SGD was stepped {20 if freeze else 100} times" in each for each in said] == [True]
    optimizer.detach()


@pytest.mark.parametrize("first", ["beside", "ours"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("hidden", [False, True])
def test_who_trains_the_head_beside_a_training_adapter_is_not_told(first, accumulate, hidden):
    """Also where the other optimizer steps at every micro-batch, or gradients are handed over without ``.grad``."""
    model = lora_mlp(modules_to_save=["head"])
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(adapter, lr=0.1), model, sigma=0.2, schedule="constant")
    beside = torch.optim.SGD(head, lr=0.1)
    x, y = batch()

    def ours():
        if hidden:
            for parameter, gradient in zip(adapter, gradients):
                parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for micro in range(8):
            loss, last = nn.functional.cross_entropy(model(x), y), micro % accumulate == accumulate - 1
            if hidden:
                *gradients, w, b = torch.autograd.grad(loss, [*adapter, *head])
                head[0].grad, head[1].grad = w, b
            else:
                loss.backward()
            if first == "ours" and (last or hidden):
                ours()
            beside.step()
            beside.zero_grad()
            if first == "beside" and (last or hidden):
                ours()


@pytest.mark.parametrize("steps", [5, 10])
def test_a_critic_that_steps_several_times_for_one_of_the_generator_is_not_told(steps):
    """Parts of one model, the fakes made with gradients and detached."""
    model = nn.ModuleDict({"generator": lora_mlp(), "critic": nn.Linear(5, 1)})
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(adapter, lr=0.1), model, sigma=0.2, schedule="constant")
    critic = torch.optim.SGD(model["critic"].parameters(), lr=0.1)
    x, before = batch()[0], frozen(model["generator"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for _ in range(steps):
                critic.zero_grad()
                model["critic"](model["generator"](x).detach()).mean().backward()
                critic.step()
            optimizer.zero_grad()
            (-model["critic"](model["generator"](x)).mean()).backward()
            optimizer.step()
    assert not changed(model["generator"], before)


def test_an_optimizer_of_somebodys_own_with_a_name_for_its_optimizer():
    class Named(torch.optim.SGD):
        optimizer = None

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.optimizer = "sgd"

    model = lora_mlp()
    wrapped = wrap(model)
    model(batch()[0]).sum().backward()
    Named(nn.Linear(2, 2).parameters(), lr=0.1).step()
    wrapped.step()


def test_a_weight_tied_to_one_of_a_group_that_rests_is_perturbed_by_its_own():
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).requires_grad_(False)
    groups = [{"params": [layers[0].weight]}, {"modules": lora_of(layers[1:])}]
    optimizer = wrap(None, groups)
    owner, shared = groups[1]["modules"].base_model.model[0].base_layer, layers[0].weight
    clean, owner.weight = shared.clone(), shared
    for sigma in (0.0, 0.2, 0.0):
        optimizer.perturb_groups[0]["sigma"] = sigma
        optimizer.perturb()
        assert not torch.equal(shared, clean)
        optimizer.restore()
        assert torch.equal(shared, clean)


def lora_of(layers):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "1"]))
