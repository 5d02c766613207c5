"""Which weights are perturbed, and with what std per row: sigma * rms of that row of the weight the layer applies.

The expected weight is read off the layer itself: what it answers to the unit vectors is the matrix it applies, whatever
adapter is on it. The std is read off the noise: with ``restore="copy"`` a row's noise is its std times standard normals
that depend on seed, step and target alone, so weights of ones (rms 1) under the same seed show those normals.
"""

import copy
import math
import warnings

import peft
import pytest
import torch
from helpers import Mlp, batch, bits, changed, frozen, lora_mlp, trainable
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, VeraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from flatopt import FlatPerturbOptimizer, register_low_rank

RTOL = 3e-4  # float32 sums, and noise read off float32 weights


def flat(targets, **options):
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return FlatPerturbOptimizer(dummy, targets, **{"sigma": 1.0, "schedule": "constant", "restore": "copy", **options})


def targets_of(optimizer):
    return [target for group in optimizer.perturb_groups for target in group["targets"]]


def noise_of(optimizer):
    """The noise of this step on each target, and W has its bits back."""
    weights = [t.parameter for t in targets_of(optimizer)]
    clean = [w.detach().clone() for w in weights]
    with optimizer.perturbed():
        noise = [w.detach().double() - c.double() for w, c in zip(weights, clean)]
    assert all(torch.equal(bits(w), bits(c)) for w, c in zip(weights, clean))
    return noise


def as_matrix(weight, columns=False):
    return weight.t() if columns else weight.flatten(1) if weight.dim() > 1 else weight.view(1, -1)


def row_std(optimizer, view=as_matrix):
    """The std of each row's noise, one vector a target, exact to rounding. ``view``: a weight as outputs x inputs."""
    noise = [view(e) for e in noise_of(optimizer)]
    ones = [nn.Parameter(torch.ones(e.shape), requires_grad=False) for e in noise]
    stds = []
    for e, z in zip(noise, noise_of(flat([{"params": ones}]))):
        assert abs(z.square().sum() - z.numel()) < 4 * math.sqrt(2 * z.numel())  # chi-square, 4 standard deviations
        stds.append((e.square().sum(1) / z.square().sum(1)).sqrt())
    return stds


def applied(layer):
    """The matrix a layer applies, outputs x inputs, as its answers to the unit vectors (convolutions without padding)."""
    base = layer.get_base_layer()
    with torch.no_grad():
        if isinstance(base, nn.Embedding):
            return layer(torch.arange(base.num_embeddings))
        shape = (base.in_channels, *base.kernel_size) if hasattr(base, "kernel_size") else (base.weight.shape[1],)
        if type(base).__name__ == "Conv1D":
            shape = (base.weight.shape[0],)
        n = math.prod(shape)
        answers = layer(torch.eye(n).view(n, *shape)) - layer(torch.zeros(1, *shape))
    return answers.flatten(1).t()


def rms(matrix):
    return matrix.detach().double().square().mean(-1).sqrt()


def stir(model):
    """Give every trainable parameter values as if it had been trained."""
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def check_all(model, columns=False, count=None):
    """Every tuner layer's weight is a target, and each row's std is sigma times the rms of what the layer applies."""
    optimizer = flat(model)
    stds = row_std(optimizer, lambda w: as_matrix(w, columns))
    assert len(stds) == count
    for target, std in zip(targets_of(optimizer), stds):
        expected = rms(applied(target.layer))
        torch.testing.assert_close(std, expected, rtol=RTOL, atol=0)
        assert (expected / rms(as_matrix(target.parameter, columns)) - 1).abs().max() > 0.01  # the merged weight's, not W's


MLP = ["first", "second", "head"]
METHODS = {
    "lora": lambda: LoraConfig(target_modules=MLP),
    "lora dropout": lambda: LoraConfig(target_modules=MLP, lora_dropout=0.5),
    "rslora": lambda: LoraConfig(target_modules=MLP, r=16, use_rslora=True),
    "dora": lambda: LoraConfig(target_modules=MLP, use_dora=True),
    "pissa": lambda: LoraConfig(target_modules=MLP, r=4, init_lora_weights="pissa"),
    "olora": lambda: LoraConfig(target_modules=MLP, r=4, init_lora_weights="olora"),
    "adalora": lambda: AdaLoraConfig(target_modules=MLP, init_r=6, target_r=4, total_step=100),
    "loha": lambda: LoHaConfig(target_modules=MLP, r=4),
    "lokr": lambda: LoKrConfig(target_modules=MLP, r=4),
    "vera": lambda: VeraConfig(target_modules=["second"], r=8),
    "delora": lambda: peft.DeloraConfig(target_modules=MLP, r=4),
    "shira": lambda: peft.ShiraConfig(target_modules=MLP, r=2),
    "kasa": lambda: LoraConfig(target_modules=MLP, r=4, kasa_config=peft.KasaConfig()),
}


def made(method):
    try:
        return METHODS[method]()
    except (AttributeError, TypeError):
        pytest.skip(f"this PEFT has no {method}")


@pytest.mark.parametrize("method", METHODS)
def test_std_on_linear(method):
    model = stir(get_peft_model(Mlp(), made(method)))
    check_all(model.eval(), count=1 if method == "vera" else 3)


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_keeps_the_base(method):
    model = get_peft_model(Mlp(), made(method))
    before, adapter = frozen(model), [p.detach().clone() for p in trainable(model)]
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.5, schedule="constant")
    x, y = batch()
    for _ in range(3):
        nn.functional.cross_entropy(model(x), y).backward()
        assert changed(model, before), "not perturbed"
        optimizer.step()
        assert not changed(model, before)
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(adapter, trainable(model)))


def conv(kind="Conv2d", channels=6, kernel=3, **options):
    return nn.Sequential(getattr(nn, kind)(channels, 8, kernel, **options))


CONVS = {
    "Conv1d": lambda: conv("Conv1d"),
    "Conv2d": conv,
    "Conv2d 1x1": lambda: conv(kernel=1),
    "Conv2d uneven": lambda: conv(kernel=(1, 3)),
    "Conv2d channels_last": lambda: conv().to(memory_format=torch.channels_last),
    "Conv3d": lambda: conv("Conv3d", kernel=2),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_std_on_convolutions(kind, dora):
    try:
        model = get_peft_model(CONVS[kind](), LoraConfig(r=4, target_modules=["0"], use_dora=dora))
    except NotImplementedError:
        pytest.skip("this PEFT has no DoRA on Conv1d")
    check_all(stir(model), count=1)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("kind", ["Conv2d", "Conv2d channels_last"])
def test_std_on_convolutions_multiplied_out(config, kind):
    check_all(stir(get_peft_model(CONVS[kind](), config(r=4, target_modules=["0"]))), count=1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [2, 4])
def test_std_on_a_grouped_convolution(groups, memory_format):
    base = conv(channels=8, groups=groups).to(memory_format=memory_format)
    with warnings.catch_warnings():  # newer PEFT warns of groups
        warnings.simplefilter("ignore", UserWarning)
        model = stir(get_peft_model(base, LoraConfig(r=4, target_modules=["0"])))
    (target,) = targets_of(flat(model))
    whole = applied(target.layer).view(groups, 8 // groups, groups, -1)  # PEFT's A reads all inputs, W its own group's
    own = torch.cat([whole[g, :, g] for g in range(groups)])
    torch.testing.assert_close(row_std(flat(model))[0], rms(own), rtol=RTOL, atol=0)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 7)

    def forward(self, x):
        return self.embedding(x)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_std_on_an_embedding(dora):
    check_all(stir(get_peft_model(Tokens(), LoraConfig(r=4, target_modules=["embedding"], use_dora=dora))), count=1)


def gpt2():
    transformers = pytest.importorskip("transformers")
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


GPT2 = ["c_attn", "c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    "config",
    [
        lambda: LoraConfig(target_modules=GPT2, fan_in_fan_out=True),
        lambda: LoraConfig(target_modules=GPT2, fan_in_fan_out=True, use_dora=True),
        lambda: AdaLoraConfig(target_modules=GPT2, fan_in_fan_out=True, init_r=6, target_r=4, total_step=100),
        lambda: VeraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=8),
    ],
    ids=["lora", "dora", "adalora", "vera"],
)
def test_std_on_gpt2_whose_rows_are_columns(config):
    model = stir(get_peft_model(gpt2(), config())).eval()
    check_all(model, columns=True, count=2 if model.peft_config["default"].peft_type == "VERA" else 6)


def test_std_on_fused_qkv_of_timm():
    vit = pytest.importorskip("timm.models.vision_transformer")
    base = vit.VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    model = stir(get_peft_model(base, LoraConfig(target_modules=["qkv", "attn.proj", "fc1", "fc2"])))
    check_all(model, count=8)
    assert [len(t.parameter) for t in targets_of(flat(model)) if "qkv" in t.path] == [3 * 24] * 2


def two_adapters(first, second, base=Mlp, modules=("second",)):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=list(modules), **first))
    model.add_adapter("other", LoraConfig(r=3, target_modules=list(modules), **second))
    model.base_model.set_adapter(["default", "other"])
    return stir(model)


DORA, DROPPED = {"use_dora": True}, {"use_dora": True, "lora_dropout": 1e-9}  # the branch of dropout, and nothing dropped


@pytest.mark.parametrize("second", [{}, DORA, DROPPED], ids=["lora", "dora", "dora dropout"])
@pytest.mark.parametrize("first", [{}, DORA, DROPPED], ids=["lora", "dora", "dora dropout"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_std_with_several_adapters(first, second, training):
    check_all(two_adapters(first, second).train(training), count=1)


@pytest.mark.parametrize("second", [{}, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("first", [{}, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["conv", "embedding", "gpt2"])
def test_std_with_several_adapters_elsewhere(base, first, second):
    if base == "gpt2":
        fan = {"fan_in_fan_out": True}
        check_all(two_adapters({**first, **fan}, {**second, **fan}, gpt2, ["c_attn"]), columns=True, count=2)
    else:
        make, name = (conv, "0") if base == "conv" else (Tokens, "embedding")
        check_all(two_adapters(first, second, make, [name]), count=1)


def test_std_follows_the_active_adapters():
    model = two_adapters({}, {})
    optimizer = flat(model)
    (target,) = targets_of(optimizer)
    seen = []
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        seen += row_std(optimizer)
        torch.testing.assert_close(seen[-1], rms(applied(target.layer)), rtol=RTOL, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(row_std(optimizer)[0], rms(target.parameter), rtol=RTOL, atol=0)
    assert not torch.allclose(seen[0], seen[1], rtol=0.01)


def test_a_dense_update_of_experts_is_scaled_by_expert_and_row():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 6))
            self.down = nn.Parameter(torch.randn(3, 6, 8))

        def forward(self, x):
            return torch.relu(x @ self.up.transpose(1, 2)) @ self.down.transpose(1, 2)

    if "target_parameters" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT has no target_parameters")
    names = ["0.up", "0.down"]
    model = stir(get_peft_model(nn.Sequential(Experts()), LoraConfig(r=2, target_modules=[], target_parameters=names)))
    optimizer = flat(model)
    merged = copy.deepcopy(model).merge_and_unload()[0]
    for target, std in zip(targets_of(optimizer), row_std(optimizer, lambda w: w.flatten(0, 1)), strict=True):
        torch.testing.assert_close(std, rms(getattr(merged, target.name)).flatten(), rtol=RTOL, atol=0)

    before = frozen(model)
    model(torch.randn(3, 2, 6)).sum().backward()
    assert len(changed(model, before)) == 2
    optimizer.step()
    assert not changed(model, before)


class Dense(nn.Module):
    """Low-rank, known by a delta; ``Factored`` by factors; ``Protocol`` by methods of its own."""

    def __init__(self, frozen_layer=None):
        super().__init__()
        self.layer = (frozen_layer or nn.Linear(12, 9)).requires_grad_(False)
        weight = self.layer.weight
        self.up, self.down = nn.Parameter(torch.randn(weight.shape[0], 3)), nn.Parameter(torch.randn(3, *weight.shape[1:]))

    def delta(self):
        return (0.3 * self.up @ self.down.flatten(1)).view(self.layer.weight.shape)

    def forward(self, x):
        return self.layer(x) + nn.functional.linear(x, self.delta())


class Factored(Dense):
    pass


class Scaled(Dense):
    """With a scaling that is learnt."""

    def __init__(self, frozen_layer=None):
        super().__init__(frozen_layer)
        self.scaling = nn.Parameter(torch.tensor(0.3))


class Protocol(Dense):
    def low_rank_base(self):
        return self.layer.weight

    def low_rank_delta(self):
        return self.up, self.down, 0.3


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("flatopt.adapters.custom._registered", {})
    register_low_rank(Dense, base=lambda m: m.layer.weight, delta=lambda m: m.delta())
    register_low_rank(Factored, base=lambda m: m.layer.weight, delta=lambda m: (m.up, m.down, 0.3))
    register_low_rank(Scaled, base=lambda m: m.layer.weight, delta=lambda m: (m.up, m.down, m.scaling))


@pytest.mark.parametrize("layer", ["Linear", "Conv2d", "Conv2d channels_last"])
@pytest.mark.parametrize("kind", [Dense, Factored, Scaled, Protocol])
def test_std_of_a_hand_written_module(registry, monkeypatch, kind, layer):
    if kind is Protocol:
        monkeypatch.setattr("flatopt.adapters.custom._registered", {})
    module = kind(None if layer == "Linear" else CONVS[layer]()[0])
    model = nn.Sequential(nn.Linear(3, 12), module)
    optimizer = flat(model)
    assert [t.path for t in targets_of(optimizer)] == ["1.layer.weight"]  # not the plain layer beside it
    expected = rms((module.layer.weight + module.delta()).flatten(1))
    torch.testing.assert_close(row_std(optimizer)[0], expected, rtol=RTOL, atol=0)


def test_std_of_a_subclass_of_a_registered_module(registry):
    class Sub(Factored):
        pass

    module = Sub()
    expected = rms(module.layer.weight + module.delta())
    torch.testing.assert_close(row_std(flat(module))[0], expected, rtol=RTOL, atol=0)


def test_std_of_raw_parameters():
    shapes = [(9, 12), (40,), (6, 4, 3, 3), (5, 1), (1,), ()]
    raw = [nn.Parameter(torch.randn(shape), requires_grad=False) for shape in shapes]
    raw.append(nn.Parameter(torch.randn(7, 5).t(), requires_grad=False))
    stds = row_std(flat([{"params": raw}]))
    for std, parameter in zip(stds, raw, strict=True):
        torch.testing.assert_close(std, rms(as_matrix(parameter)), rtol=RTOL, atol=0)
    assert len(row_std(flat([{"params": raw[0]}]))) == 1  # one parameter, without a list


def test_row_norms_follow_training():
    model = lora_mlp()
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(trainable(model), lr=0.5), model, sigma=1.0, schedule="constant", restore="copy"
    )
    x, y = batch()
    for _ in range(3):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    # row_std compares with a first step: take the same draw
    fresh = flat(model)
    stds = row_std(fresh)
    for target, std in zip(targets_of(fresh), stds):
        torch.testing.assert_close(std, rms(applied(target.layer)), rtol=RTOL, atol=0)
    with torch.no_grad():  # a base weight that was changed is measured again
        target.parameter.mul_(3)
    torch.testing.assert_close(row_std(fresh)[-1], rms(applied(target.layer)), rtol=RTOL, atol=0)


def test_every_row_of_a_large_weight_has_its_own_std():
    # more rows than one slab of the row sums holds
    weight = nn.Parameter(torch.randn(3000, 700) * torch.rand(3000, 1), requires_grad=False)
    (std,) = row_std(flat([{"params": weight}]))
    torch.testing.assert_close(std, rms(weight), rtol=RTOL, atol=0)


def test_groups_have_keys_of_their_own():
    model = lora_mlp()
    layers = {name: getattr(model.base_model.model, name) for name in MLP}
    groups = [
        {"modules": layers["first"], "sigma": 0.2, "noise": "layer"},
        {"modules": [layers["second"]], "schedule": lambda t: 0.25, "restore": "reversible"},
        {"params": [layers["head"].base_layer.bias], "sigma": 0.1},
    ]
    optimizer = flat(groups, total_steps=10, sigma=2.0)
    assert [(g["sigma"], g["noise"], g["restore"]) for g in optimizer.perturb_groups] == [
        (0.2, "layer", "copy"),
        (2.0, "filter", "reversible"),
        (0.1, "filter", "copy"),
    ]
    optimizer.perturb_groups[1]["restore"] = "copy"
    first, second, bias = row_std(optimizer)
    merged = applied(layers["first"])
    torch.testing.assert_close(first, 0.2 * rms(merged.flatten()).expand(32), rtol=RTOL, atol=0)
    torch.testing.assert_close(second, 0.25 * 2.0 * rms(applied(layers["second"])), rtol=RTOL, atol=0)
    torch.testing.assert_close(bias, 0.1 * rms(layers["head"].base_layer.bias).view(1), rtol=RTOL, atol=0)


def test_isotropic_noise_has_one_std_for_a_group():
    model = lora_mlp()
    optimizer = flat(model, noise="isotropic", sigma=0.5)
    every = torch.cat([applied(t.layer).flatten() for t in targets_of(optimizer)])
    for std in row_std(optimizer):
        torch.testing.assert_close(std, 0.5 * rms(every).expand_as(std), rtol=RTOL, atol=0)


def test_element_noise_is_scaled_by_each_weight():
    weight = nn.Parameter(torch.randn(20, 30), requires_grad=False)
    noise = noise_of(flat([{"params": weight}], noise="element", sigma=0.5))[0]
    z = noise_of(flat([{"params": nn.Parameter(torch.ones(20, 30), requires_grad=False)}]))[0]
    torch.testing.assert_close(noise, 0.5 * weight.detach().abs().double() * z, rtol=1e-3, atol=1e-6)


def test_groups_change_during_training():
    model = lora_mlp()
    before = frozen(model)
    optimizer = flat([{"modules": model, "sigma": 0.1}])
    group = optimizer.perturb_groups[0]
    power = {}
    for sigma in (0.1, 0.4, 0.0):
        group["sigma"] = sigma
        power[sigma] = sum(e.square().sum() for e in noise_of(optimizer))
    assert power[0.4] / power[0.1] == pytest.approx(16, rel=1e-3)
    assert power[0.0] == 0
    group.update(sigma=0.1, restore="reversible", noise="element", schedule=lambda t: 0.5)
    optimizer.total_steps = 3
    model(batch()[0]).sum().backward()
    assert len(changed(model, before)) == 3
    optimizer.step()
    assert not changed(model, before)


def test_a_weight_in_two_groups_belongs_to_the_first():
    model = lora_mlp()
    second = model.base_model.model.second
    optimizer = flat([{"modules": second, "sigma": 0.1}, {"modules": model, "sigma": 0.2}])
    assert [len(group["targets"]) for group in optimizer.perturb_groups] == [1, 2]
    torch.testing.assert_close(row_std(optimizer)[0], 0.1 * rms(applied(second)), rtol=RTOL, atol=0)


@pytest.mark.parametrize("restore", ["copy", "reversible"])
def test_tied_weights_are_perturbed_once(restore):
    config = LoraConfig(target_modules=["wte", "lm_head"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="tied"):
        model = get_peft_model(gpt2(), config)
    before = frozen(model)
    optimizer = flat(model, restore=restore, sigma=0.1)
    assert len(targets_of(optimizer)) == 1
    if restore == "copy":
        layer = model.base_model.model.transformer.wte
        torch.testing.assert_close(row_std(optimizer)[0], 0.1 * rms(applied(layer)), rtol=RTOL, atol=0)
    ids = torch.randint(50, (2, 5))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        assert changed(model, before)
        optimizer.step()
        assert not changed(model, before)


@pytest.mark.parametrize("restore", ["copy", "reversible"])
def test_two_parameters_on_one_memory_are_perturbed_once(restore):
    first = nn.Parameter(torch.randn(30, 40), requires_grad=False)
    second = nn.Parameter(first.data, requires_grad=False)
    clean = first.detach().clone()
    optimizer = flat([{"params": [first, second]}], restore=restore, sigma=0.1)
    with optimizer.perturbed():
        # twice would be +41 %; 4 standard deviations of a std over 1200 elements are 8 %, and reversible has some 3 % less
        assert (first - clean).std().item() == pytest.approx(0.1 * clean.square().mean().sqrt().item(), rel=0.15)
    assert torch.equal(bits(first), bits(clean))


def test_lora_plus_groups():
    model = lora_mlp()
    optimizer = create_loraplus_optimizer(
        model, optimizer_cls=torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.0
    )
    optimizer = FlatPerturbOptimizer(optimizer, model, sigma=0.1, schedule="constant")
    lrs = sorted({group["lr"] for group in optimizer.param_groups if group["params"]})
    assert lrs == [pytest.approx(1e-3), pytest.approx(16e-3)]
    before, adapter = frozen(model), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    assert len(changed(model, before)) == 3
    optimizer.step()
    assert not changed(model, before)
    for name, parameter in model.named_parameters():  # Adam's first step is the learning rate
        if name in adapter and parameter.grad.abs().min() > 1e-6:
            step = (parameter - adapter[name]).abs().max().item()
            assert step == pytest.approx(16e-3 if "lora_B" in name else 1e-3, rel=1e-2)


def test_modules_without_low_rank_layers_are_left_alone():
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["second"]))
    before = frozen(model)
    optimizer = flat(model, sigma=0.1)
    with optimizer.perturbed():
        assert [name.split("model.model.")[1] for name in changed(model, before)] == ["second.base_layer.weight"]
