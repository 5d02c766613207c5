"""Exported, traced, scripted and differentiated models, and weights that are no plain tensors: right or refused."""

import collections
import contextlib
import dataclasses
import functools
import gc
import inspect
import io
import types
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
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


exports = pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="export looks like torch.compile there")


@exports
@pytest.mark.parametrize("door", ["the model", "the model inside", "a layer"])
@pytest.mark.parametrize("amid", [False, True], ids=["between steps", "amid a step"])
def test_what_is_exported_is_clean_and_opens_no_step(model, before, door, amid):
    x, base = batch()[0], model.get_base_model()
    part = {"the model": model, "the model inside": base, "a layer": base.first}[door]
    with torch.no_grad():
        want = part(x)
    optimizer = wrap(model)
    if amid:
        loss = loss_of(model)
    file = io.BytesIO()
    torch.export.save(torch.export.export(part, (x,)), file)
    assert not optimizer.is_perturbed
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), want)
    (loss if amid else loss_of(model)).backward()
    assert optimizer.is_perturbed
    optimizer.step()
    assert not changed(model, before)


@exports
def test_a_strict_export_says_what_to_do(model):
    x, optimizer = batch()[0], wrap(model)
    with pytest.raises(Exception, match=r"detach\(\) before torch\.export"):
        torch.export.export(model, (x,), strict=True)
    loss_of(model)
    with pytest.raises(Exception, match=r"perturbed: call optimizer\.restore\(\) before"):
        torch.export.export(model.get_base_model(), (x,), strict=True)
    optimizer.restore()
    torch.export.export(model.get_base_model(), (x,), strict=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_make_fx_writes_down_has_no_moves(model, before, mode):
    x = batch()[0]
    model.train(mode == "train")
    made = len(make_fx(model)(x).graph.nodes)
    optimizer = wrap(model)
    for _ in range(2):
        loss_of(model.train())
        assert len(made_now := list(make_fx(model.train(mode == "train"))(x).graph.nodes)) == made, made_now
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


def test_scripting_a_layer_that_has_hooks_says_what_to_do(model):
    optimizer, layer = wrap(model), model.get_base_model().first.base_layer
    with pytest.raises(AttributeError, match=r"torch\.jit\.script cannot compile\. Call detach\(\)"):
        torch.jit.script(layer)
    optimizer.detach()
    torch.jit.script(layer)


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


# --- roots that call themselves, references beside checkpoints ------------------------------------------------------------


class SelfTeaching(nn.Module):
    """Its forward asks itself for targets, without gradients."""

    def __init__(self, mode):
        super().__init__()
        self.net, self.mode, self.seen = lora_mlp(), mode, {}

    def forward(self, x, teaching=False):
        self.seen[teaching] = self.net(x).detach()
        if teaching:
            if self.mode == "raises":
                raise KeyError("inside")
            return self.seen[True]
        if self.mode == "eval":
            self.eval()
        with torch.no_grad(), contextlib.suppress(KeyError):
            self(x, teaching=True)
        self.train()
        return self.net(x)


@pytest.mark.parametrize("mode", ["no_grad", "eval", "raises"])
def test_a_root_that_calls_itself_trains_at_noise_after_it(mode):
    model, x = SelfTeaching(mode), batch()[0]
    before = frozen(model)
    clean = model.net(x).detach()
    optimizer = wrap(model)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), batch()[1])
        assert len(changed(model, before)) == 3
        torch.testing.assert_close(model.seen[True], clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not changed(model, before)
        clean = model.net.eval()(x).detach()
        model.train()


def checkpointed(model, reentrant):
    x = batch()[0].requires_grad_()  # reentrant checkpoints ask for it
    return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum()


@pytest.mark.parametrize("when", ["before the forward", "between forward and backward"])
def test_a_reference_in_train_mode_beside_a_checkpoint_around_a_target(model, before, when):
    x, optimizer = batch()[0], wrap(model)
    with torch.no_grad():
        want = model(x)
    optimizer.perturb()
    gradients = []
    for reads in (False, True):
        if reads and when == "before the forward":
            with torch.no_grad():
                torch.testing.assert_close(model(x), want)
        loss = checkpointed(model, False)
        if reads and when == "between forward and backward":
            with torch.no_grad():
                torch.testing.assert_close(model(x), want)
        loss.backward()
        gradients.append([p.grad.clone() for p in trainable(model)])
        optimizer.zero_grad()
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    optimizer.step()
    assert not changed(model, before)


@pytest.mark.parametrize("opened_by", ["perturb()", "another micro-batch"])
def test_a_reentrant_checkpoint_around_a_target_is_refused_also_amid_a_step(model, before, opened_by):
    optimizer = wrap(model)
    if opened_by == "perturb()":
        optimizer.perturb()
    else:
        loss_of(model).backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpointed(model, True).backward()
    optimizer.restore()
    assert not changed(model, before)


@pytest.mark.skipif(
    not hasattr(torch.utils.checkpoint, "create_selective_checkpoint_contexts"), reason="this torch has none"
)
def test_a_selective_checkpoint_around_a_target_hands_out_its_own_results():
    gradients = []
    for selective in (False, True):
        torch.manual_seed(0)
        model, x = lora_mlp(), batch()[0]
        before, optimizer = frozen(model), wrap(model)
        contexts = functools.partial(
            torch.utils.checkpoint.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]
        )
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False, context_fn=contexts) if selective else model(x)
        y.square().sum().backward()
        gradients.append([p.grad for p in trainable(model)])
        optimizer.step()
        assert not changed(model, before)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


# --- readers that come late or hold W otherwise ----------------------------------------------------------------------------


MOVES = {
    "to": lambda model: model.double(),
    "assign": lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
    "data": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("amid", [False, True])
def test_a_teacher_made_after_w_has_moved_reads_it_clean(model, move, amid):
    optimizer = wrap(model)
    loss_of(model).backward()
    optimizer.step()
    MOVES[move](model)
    weight = model.base_model.model.first.base_layer.weight
    x = torch.ones(1, 16, dtype=weight.dtype)
    teacher, want = nn.Linear(16, 32, bias=False), x @ weight.detach().t()
    if amid:
        model(batch()[0].to(weight.dtype))
        teacher.weight = weight
    else:
        teacher.weight = weight
        model(batch()[0].to(weight.dtype))
    with torch.no_grad():
        torch.testing.assert_close(teacher.eval()(x), want)
    optimizer.detach()


class Holder(nn.Module):
    def __init__(self, weight, how):
        super().__init__()
        self.how = how
        if how == "buffer":
            self.register_buffer("weight", weight.detach())
        else:
            self.held = nn.ParameterList([weight]) if how == "list" else nn.ParameterDict({"w": weight})

    def forward(self, x):
        return x @ (self.weight if self.how == "buffer" else next(iter(self.held.parameters()))).t()


@pytest.mark.parametrize("how", ["buffer", "list", "dict"])
def test_a_teacher_that_holds_w_as_a_buffer_or_in_a_list_reads_it_clean(model, before, how):
    weight, x = model.base_model.model.first.base_layer.weight, torch.ones(1, 16)
    teacher, want = Holder(weight, how).eval(), x @ weight.detach().clone().t()
    optimizer = wrap(model)
    loss = loss_of(model)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), want)
    loss.backward()
    optimizer.step()
    assert not changed(model, before)


def test_teachers_that_are_gone_leave_nothing(model):
    optimizer = wrap(model)
    weight = model.base_model.model.first.base_layer.weight
    for _ in range(3):
        teacher = nn.Linear(16, 32)
        teacher.weight = weight
        loss_of(model).backward()
        optimizer.step()
    del teacher
    gc.collect()
    assert len(optimizer._doors.strangers) == 0


# --- inputs and outputs of all kinds ---------------------------------------------------------------------------------------


def test_a_first_pass_is_taken_down_wherever_it_runs(model, before):
    optimizer = wrap(model)
    x = batch()[0]
    with torch.inference_mode():
        model(x)
    with torch.no_grad():
        torch.vmap(model)(x[:, None])
        model.base_model.model.first(x)
    loss_of(model).backward()
    optimizer.step()
    assert not changed(model, before)


def test_what_a_first_pass_read_is_not_kept(model):
    wrap(model)
    x = batch()[0].clone()
    with torch.no_grad():
        model(x)
    gone = weakref.ref(x.untyped_storage())
    held = weakref.ref(x)
    del x
    assert held() is None
    assert gone() is None


@dataclasses.dataclass(slots=True)
class Slots:
    logits: torch.Tensor


def in_a_circle(y):
    found = {"logits": y}
    found["itself"] = found
    return found


class Plain:
    def __init__(self, logits):
        self.logits, self.itself = logits, self


class OwnSlots:
    __slots__ = ("__hidden", "empty")

    def __init__(self, logits):
        self.__hidden = logits

    @property
    def logits(self):
        return self.__hidden


OUTPUTS = {
    "slots": Slots,
    "a dict in a circle": in_a_circle,
    "an object": Plain,
    "slots of its own": OwnSlots,
    "a namespace in a list": lambda y: [types.SimpleNamespace(logits=y)],
    "a UserDict": lambda y: collections.UserDict(logits=y),
}


@pytest.mark.parametrize("made", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_that_are_not_plain(made, before, model):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return made(self.net(x))

    root = Wrapped()
    optimizer = wrap(root)
    output = root(batch()[0])
    output = output[0] if isinstance(output, list) else output
    logits = output.logits if hasattr(output, "logits") else output["logits"]
    with torch.no_grad():
        root(batch()[0])
    logits.square().sum().backward()
    optimizer.step()
    assert not changed(model, before)


def test_accelerates_hook_put_around_a_noisy_forward_stays_when_detached(model):
    hooks = pytest.importorskip("accelerate.hooks")
    optimizer = wrap(model, restore="forward")
    layer, x = model.base_model.model.first.base_layer, batch()[0]
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    with torch.no_grad():
        want = layer(x)
    loss_of(model).backward()
    optimizer.step()
    optimizer.detach()
    torch.testing.assert_close(layer(x), want)
    hooks.remove_hook_from_module(layer)
    torch.testing.assert_close(layer(x), want)
