"""Whoever reads W amid a step, through whatever door, finds it clean; a training forward through any door opens the step."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from helpers import Mlp, batch, bits, changed, frozen, lora_mlp, trainable

from flatopt import FlatPerturbOptimizer, register_low_rank


def wrap(model, targets=None, optimizer=None, **settings):
    optimizer = optimizer or torch.optim.SGD(trainable(model), lr=0.1)
    return FlatPerturbOptimizer(
        optimizer, model if targets is None else targets, **{"sigma": 0.3, "schedule": "constant", **settings}
    )


class Spy:
    """The bits of one base weight at each forward of the layer that holds it."""

    def __init__(self, layer):
        self.layer, self.clean, self.seen = layer, bits(layer.weight).clone(), []
        layer.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.seen.append(torch.equal(bits(module.weight), self.clean))

    def taken(self):
        seen, self.seen = self.seen, []
        assert seen, "the layer was not reached"
        return seen

    def all_clean(self):
        return all(self.taken())

    def none_clean(self):
        return not any(self.taken())


def spy_on(model):
    return Spy(model.get_base_model().first.base_layer)


def llama_lora():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora).train()


# --- readers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_generate_sees_clean_weights_and_toggles_them_twice(mode):
    pytest.importorskip("transformers")
    model = llama_lora()
    before = frozen(model)
    spy = Spy(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer)
    ids = torch.randint(3, 32, (2, 4))
    optimizer = wrap(model)
    model(input_ids=ids, labels=ids).loss.backward()  # the first of two micro-batches
    assert spy.none_clean()

    moves = []
    for name in ("suspend", "resume"):
        move = getattr(optimizer._weights, name)
        monitored = lambda move=move, name=name: (  # noqa: E731
            moves.append(name)
            if optimizer._weights.state == {"suspend": "perturbed", "resume": "suspended"}[name]
            else None,
            move(),
        )
        setattr(optimizer._weights, name, monitored)
    with torch.no_grad():
        model.train(mode == "train")
        model.generate(input_ids=ids, min_new_tokens=30, max_new_tokens=30, do_sample=False)
        model.train()
    seen = spy.taken()
    assert len(seen) == 30
    assert all(seen)
    model(input_ids=ids, labels=ids).loss.backward()
    assert spy.none_clean()
    assert moves == ["suspend", "resume"]
    optimizer.step()
    assert not changed(model, before)


class Outer(nn.Module):
    """Has methods of its own beside ``forward``, as CLIP has ``encode_text``; ``module`` is also what DDP calls it."""

    def __init__(self):
        super().__init__()
        self.module = lora_mlp()

    def forward(self, x):
        return self.module(x)

    def encode(self, x):
        return self.module(x)


DOORS = {
    "front": lambda outer, x: outer(x),
    "a method": lambda outer, x: outer.encode(x),
    "the module inside": lambda outer, x: outer.module(x),
    "get_base_model": lambda outer, x: outer.module.get_base_model()(x),
    "layer by layer": lambda outer, x: by_hand(outer.module.get_base_model(), x),
}


def by_hand(mlp, x):
    return mlp.head(torch.relu(mlp.second(torch.relu(mlp.first(x)))))


def gradient(outer, door):
    x, y = batch()
    nn.functional.cross_entropy(DOORS[door](outer, x), y).backward()
    return [p.grad.clone() for p in trainable(outer)]


@pytest.mark.parametrize("door", DOORS)
def test_a_training_forward_through_any_door_has_the_gradient_of_the_front_door(door):
    gradients = []
    for through in ("front", door):
        torch.manual_seed(0)
        outer = Outer()
        before, optimizer, spy = frozen(outer), wrap(outer), spy_on(outer.module)
        gradients.append(gradient(outer, through))
        assert spy.none_clean()
        assert optimizer.is_perturbed
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert optimizer.step_count == 1
        assert not changed(outer, before)
    for through_front, through_door in zip(*gradients):
        assert torch.equal(through_front, through_door)


@pytest.mark.parametrize("way", ["eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("door", DOORS)
def test_reading_through_any_door_is_clean_and_the_noise_comes_back(door, way):
    outer = Outer()
    before, optimizer, spy = frozen(outer), wrap(outer), spy_on(outer.module)
    x, y = batch()
    loss = nn.functional.cross_entropy(outer(x), y)
    assert spy.none_clean()
    outer.train(way != "eval")
    with {"eval": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[way]():
        DOORS[door](outer, x)
    outer.train()
    assert spy.all_clean()
    loss.backward()
    nn.functional.cross_entropy(DOORS[door](outer, x), y).backward()
    assert spy.none_clean()
    optimizer.step()
    assert not changed(outer, before)


def test_a_graph_made_through_a_side_door_finds_its_weights_in_backward():
    gradients = []
    for read in (False, True):
        torch.manual_seed(0)
        outer = Outer()
        optimizer = wrap(outer)
        x, y = batch()
        loss = nn.functional.cross_entropy(by_hand(outer.module.get_base_model(), x), y)
        if read:
            with torch.no_grad():
                outer(x)
            assert not optimizer.is_perturbed
        loss.backward()
        gradients.append([p.grad for p in trainable(outer)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_reference_under_disable_adapter_is_clean():
    model = lora_mlp()
    before, spy = frozen(model), spy_on(model)
    x, y = batch()
    with torch.no_grad(), model.disable_adapter():
        want = model.get_base_model()(x)
    optimizer = wrap(model)
    spy.taken()
    loss = nn.functional.cross_entropy(model(x), y)
    assert spy.none_clean()
    with torch.no_grad(), model.disable_adapter():
        got = model.get_base_model()(x)
    assert torch.equal(want, got)
    loss.backward()
    optimizer.step()
    assert not changed(model, before)


class WithReference(nn.Module):
    """Runs its own reference inside its training forward."""

    def __init__(self):
        super().__init__()
        self.policy = lora_mlp()

    def forward(self, x):
        first = self.policy(x)
        with torch.no_grad(), self.policy.disable_adapter():
            self.reference = self.policy(x)
        return first + self.policy(x)


def test_a_reference_inside_the_roots_training_forward_is_clean():
    model = WithReference()
    before, spy = frozen(model), spy_on(model.policy)
    x, y = batch()
    with torch.no_grad():
        model(x)
    want = model.reference
    spy.taken()
    optimizer = wrap(model)
    nn.functional.cross_entropy(model(x), y).backward()
    assert spy.taken() == [False, True, False]
    assert torch.equal(model.reference, want)
    optimizer.step()
    assert not changed(model, before)


def test_a_teacher_that_shares_the_frozen_tensors_is_clean():
    model, teacher = lora_mlp(), Mlp()
    base = model.get_base_model()
    for name in ("first", "second", "head"):
        getattr(teacher, name).weight = getattr(base, name).base_layer.weight
    spy = Spy(teacher.first)
    before, optimizer = frozen(model), wrap(model)
    x, y = batch()
    out = model(x)
    with torch.no_grad():
        teacher(x)
    assert spy.all_clean()
    nn.functional.cross_entropy(out, y).backward()
    teacher.eval()
    teacher(x)
    assert spy.all_clean()
    optimizer.step()
    assert not changed(model, before)


def test_an_eval_mode_tower_inside_a_training_root_is_perturbed_with_it():
    model = lora_mlp()
    before, spy, optimizer = frozen(model), spy_on(model), wrap(model)
    model.get_base_model().first.eval()  # dropout off in a part: the root trains
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    assert spy.none_clean()
    optimizer.step()
    assert not changed(model, before)


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen_tower, self.tower = lora_mlp(), lora_mlp()

    def forward(self, x):
        return self.frozen_tower(x) + self.tower(x)


def test_two_groups_with_one_root_in_eval_mode():
    model = TwoTowers()
    before = frozen(model)
    optimizer = wrap(model, [{"modules": model.frozen_tower}, {"modules": model.tower}])
    x, y = batch()
    model.train()
    model.frozen_tower.eval()
    for _ in range(2):
        # the tower in eval mode builds its graph at clean weights; opening the step after that would break its backward
        nn.functional.cross_entropy(model(x), y).backward()
        assert optimizer.is_perturbed
        optimizer.step()
        optimizer.zero_grad()
        assert not changed(model, before)


# --- compiled -----------------------------------------------------------------------------------------------------------


def test_a_compiled_model_and_its_uncompiled_twin():
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = lora_mlp()
    before = frozen(model)
    compiled = torch.compile(model, backend=backend)
    spy_of = model.get_base_model().first.base_layer
    clean = bits(spy_of.weight).clone()
    optimizer = wrap(model)
    x, y = batch()

    def micro_batch(run):
        nn.functional.cross_entropy(run(x), y).backward()
        assert not torch.equal(bits(spy_of.weight), clean)

    def evaluate(run):
        model.eval()
        with torch.no_grad():
            out = run(x)
        model.train()
        assert torch.equal(bits(spy_of.weight), clean)
        return out

    want = evaluate(model)
    for step in range(4):
        micro_batch(compiled)
        torch.testing.assert_close(evaluate(compiled), evaluate(model))
        micro_batch(model)  # the twin
        micro_batch(compiled)
        optimizer.step()
        optimizer.zero_grad()
        assert not changed(model, before)
        if step == 0:
            so_far = len(compilations)
            torch.testing.assert_close(evaluate(compiled), evaluate(model))
            assert want.shape == (8, 5)
    assert len(compilations) == so_far
    torch._dynamo.reset()


# --- adapters that come and go ------------------------------------------------------------------------------------------


def test_an_adapter_that_is_initialised_from_w_amid_a_step_is_that_of_clean_w():
    from peft import LoraConfig

    added = []
    for amid in (False, True):
        torch.manual_seed(0)
        model = lora_mlp()
        optimizer = wrap(model)
        if amid:
            x, y = batch()
            nn.functional.cross_entropy(model(x), y).backward()
            assert optimizer.is_perturbed
        model.add_adapter(
            "principal", LoraConfig(r=2, target_modules=["first", "second", "head"], init_lora_weights="pissa")
        )
        assert not optimizer.is_perturbed
        after = frozen(model)
        optimizer.step()
        assert not changed(model, after)  # what PiSSA wrote to W stays
        added.append(
            {name: p.detach().clone() for name, p in model.named_parameters() if "principal" in name or "base" in name}
        )
    for name in added[0]:
        if "default" not in name:
            assert torch.equal(added[0][name], added[1][name]), name


def test_an_adapter_on_further_layers_gets_noise_or_a_warning_names_it():
    from peft import LoraConfig

    model = lora_mlp(target_modules=["first"])
    optimizer = wrap(model)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.add_adapter("late", LoraConfig(r=2, target_modules=["second"], init_lora_weights=False))
    clean = frozen(model)
    model.base_model.set_adapter(["default", "late"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nn.functional.cross_entropy(model(x), y).backward()
    noisy = changed(model, clean)
    assert any("second" in name for name in noisy) or any("second" in str(w.message) for w in caught)
    optimizer.restore()
    assert not changed(model, clean)


def by_load_adapter(model, tmp_path):
    lora_mlp(target_modules=["second", "head"]).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "late", is_trainable=True)


def by_hand_on_the_model(model, tmp_path):
    model.get_base_model().second = lora_mlp().get_base_model().second
    model.get_base_model().head = lora_mlp().get_base_model().head


@pytest.mark.parametrize("adapt", [by_load_adapter, by_hand_on_the_model])
def test_layers_adapted_later_are_named_once_with_the_way_out(adapt, tmp_path):
    model = lora_mlp(target_modules=["first"])
    optimizer = wrap(model, total_steps=9)
    for step in range(4):
        if step == 1:
            adapt(model, tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(batch()[0]).sum().backward()
            optimizer.step()
        told = [str(w.message) for w in caught]
        assert len(told) == (step == 1)
        if told:
            assert "second.weight" in told[0]
            assert "head.weight" in told[0]
            assert "Call detach() and make a new one around optimizer.optimizer" in told[0]
    optimizer.detach()
    again = wrap(model, optimizer=optimizer.optimizer)
    assert again.step_count == 4
    before = frozen(model)
    model(batch()[0])
    assert len(changed(model, before)) == 3


# --- weights that forwards make anew ------------------------------------------------------------------------------------


class LowRank(nn.Module):
    def __init__(self, base, rows, columns):
        super().__init__()
        self.base = base
        self.up, self.down = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, x):
        return self.base(x)


register_low_rank(LowRank, base=lambda m: m.base.weight, delta=lambda m: (m.up, m.down, 1.0))


@pytest.mark.parametrize("kind", ["max_norm", "parametrized", "spectral_norm", "old spectral_norm"])
def test_weights_that_each_forward_writes_are_refused_at_once(kind):
    base = {
        "max_norm": lambda: nn.Embedding(6, 4, max_norm=1.0),
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
        "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)),
        "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 6)),
    }[kind]()
    model = nn.Sequential(LowRank(base.requires_grad_(False), 6, 4))
    with pytest.raises(ValueError, match=r"(?s)0.*(max_norm|each forward|parametriz)"):
        wrap(model)


@pytest.mark.parametrize("kind", ["max_norm", "spectral_norm"])
def test_such_weights_under_peft_are_refused_at_once(kind):
    from peft import LoraConfig, get_peft_model

    inner = nn.Embedding(6, 4, max_norm=1.0) if kind == "max_norm" else nn.utils.spectral_norm(nn.Linear(4, 6))
    model = get_peft_model(nn.Sequential(inner), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"(?s)0.*(max_norm|each forward|parametriz)"):
        wrap(model)
