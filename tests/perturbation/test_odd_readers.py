"""Exported, traced, scripted and differentiated models, and weights that are no plain tensors: right or refused."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

pytest.importorskip("peft")
from helpers import Mlp, batch, changed, frozen, lora_mlp, skip_unless_traced_whole, trainable

from flatopt import FlatPerturbOptimizer


def wrap(model, **settings):
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    return FlatPerturbOptimizer(optimizer, model, **{"sigma": 0.3, "schedule": "constant", **settings})


def loss_of(model):
    x, y = batch()
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("made", ["before", "amid"])
def test_an_exported_program_that_shares_the_weights_reads_them_clean(model, before, made):
    skip_unless_traced_whole(model)
    x, exported = batch()[0], None
    with torch.no_grad():
        want = model(x)
    optimizer = wrap(model)
    if made == "amid":
        loss_of(model)
    exported = torch.export.export(model.eval(), (x,)).module()
    loss = loss_of(model.train())
    assert optimizer.is_perturbed
    with torch.no_grad():
        torch.testing.assert_close(exported(x), want)
    loss.backward()
    assert optimizer.is_perturbed
    optimizer.step()
    assert not changed(model, before)


def test_a_scripted_teacher_takes_no_hooks_and_is_warned_of(model):
    teacher, base = Mlp(), model.get_base_model()
    teacher.first.weight = base.first.base_layer.weight
    scripted = torch.jit.script(teacher)
    optimizer = wrap(model)
    with pytest.warns(UserWarning, match=r"TorchScript module shares memory.*optimizer\.restore\(\)"):
        loss_of(model)
    optimizer.restore()
    assert torch.equal(scripted.first.weight, base.first.base_layer.weight)


def test_tracing_that_would_move_the_weights_is_refused(model, before):
    x, optimizer = batch()[0], wrap(model)
    loss_of(model)
    model.eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"inside torch\.jit\.trace.*optimizer\.restore\(\)"):
        torch.jit.trace(model, x)
    optimizer.restore()
    assert not changed(model, before)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("vmapped", [False, True])
def test_func_grad_needs_weights_that_are_perturbed_already(model, before, vmapped):
    (x, y), adapters = batch(), {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = wrap(model)

    def loss(adapters, x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(model, adapters, (x,)), y)

    def gradients():
        if not vmapped:
            return torch.func.grad(loss)(adapters, x, y)
        each = torch.vmap(torch.func.grad(loss), (None, 0, 0))(adapters, x[:, None], y[:, None])
        return {name: g.mean(0) for name, g in each.items()}

    with pytest.raises(RuntimeError, match=r"inside torch\.func\.grad.*call optimizer\.perturb\(\)"):
        gradients()
    assert not changed(model, before)
    optimizer.perturb()
    found = gradients()
    loss_of(model).backward()
    for name, p in adapters.items():
        torch.testing.assert_close(found[name], p.grad)
    optimizer.step()
    assert not changed(model, before)


class Identity(nn.Module):
    def forward(self, w):
        return w * 1.0


def test_a_parametrization_registered_amid_a_step(model, before):
    optimizer = wrap(model)
    loss_of(model).backward()
    layer = model.get_base_model().first.base_layer
    parametrize.register_parametrization(layer, "weight", Identity())
    optimizer.step()
    original = layer.parametrizations.weight.original
    assert torch.equal(original, before["base_model.model.first.base_layer.weight"])
    with pytest.raises(ValueError, match=r"first.*is computed anew in each forward"):
        loss_of(model)
    parametrize.remove_parametrizations(layer, "weight")
    loss_of(model).backward()
    optimizer.step()
    assert torch.equal(layer.weight, original)


OVERLAPPING = {
    "expanded": lambda: torch.randn(1, 16).expand(32, 16),
    "strided": lambda: torch.randn(47).as_strided((32, 16), (1, 1)),
}


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_a_weight_whose_elements_share_memory_is_refused(kind):
    from peft import LoraConfig, get_peft_model

    base = Mlp()
    base.first.weight = nn.Parameter(OVERLAPPING[kind](), requires_grad=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"first.*has elements that share memory.*clone"):
        wrap(model)


RAW = {
    "lazy": (lambda: nn.parameter.UninitializedParameter(requires_grad=False), "is not initialised yet"),
    "sparse": (lambda: nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False), "is sparse"),
    "sparse rows": (lambda: nn.Parameter(torch.eye(4).to_sparse_csr(), requires_grad=False), "is sparse"),
}


@pytest.mark.parametrize("kind", RAW)
def test_raw_parameters_that_are_no_dense_tensors_are_refused(kind):
    make, said = RAW[kind]
    with pytest.raises(ValueError, match=rf"params\[0\] {said}"):
        FlatPerturbOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), [{"params": [make()]}])


@pytest.mark.parametrize("kind", ["pissa", "olora", "dora"])
def test_an_adapter_that_a_layer_is_given_directly_amid_a_step_is_made_from_clean_weights(kind):
    from peft import LoraConfig

    made = []
    for amid in (False, True):
        torch.manual_seed(0)
        model = lora_mlp()
        optimizer = wrap(model)
        if amid:
            loss_of(model).backward()
            assert optimizer.is_perturbed
        how = {"use_dora": kind == "dora", "init_lora_weights": True if kind == "dora" else kind}
        if "config" in inspect.signature(model.get_base_model().first.update_layer).parameters:
            how = {"config": LoraConfig(r=4, **how)}
        else:  # older PEFT
            how |= {"lora_dropout": 0.0, "use_rslora": False}
        torch.manual_seed(1)
        model.get_base_model().first.update_layer("new", 4, lora_alpha=8, **how)
        assert not optimizer.is_perturbed
        made.append([p.detach().clone() for name, p in model.named_parameters() if "new" in name])
    assert made[0]
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_perturbed_holds_after_a_merge_and_over_steps(model):
    optimizer = wrap(model)
    with optimizer.perturbed():
        model.merge_adapter()
        model.unmerge_adapter()
        before = frozen(model)
        with torch.no_grad():
            model(batch()[0])
        assert len(changed(model, before)) == 3
        for step in range(2):
            loss_of(model).backward()
            assert len(changed(model, before)) == 3
            optimizer.step()
            assert optimizer.step_count == step + 1
    assert not changed(model, before)


@pytest.mark.parametrize("change", ["pop", "assign", "drop the group"])
def test_targets_that_are_taken_out_amid_a_step_are_restored_too(model, before, change):
    base = model.get_base_model()
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1),
        [{"modules": [base.first, base.head]}, {"modules": base.second}],
        sigma=0.3,
        schedule="constant",
    )
    loss_of(model).backward()
    assert len(changed(model, before)) == 3
    first = optimizer.perturb_groups[0]
    if change == "pop":
        first["targets"].pop(0)
    elif change == "assign":
        first["targets"] = first["targets"][1:]
    else:
        del optimizer.perturb_groups[0]
    with torch.no_grad():
        model(batch()[0])
    assert not changed(model, before)
    loss_of(model)
    assert len(changed(model, before)) == 3
    optimizer.step()
    assert not changed(model, before)
    loss_of(model)
    assert len(changed(model, before)) == (1 if change == "drop the group" else 2)
    optimizer.step()
    assert not changed(model, before)
