"""``noise="int4"`` and other formats: a training forward runs at the merged weight rounded as it will be served."""

import copy
import warnings

import pytest
import torch
from helpers import batch, bits, changed, frozen, lora_mlp, on_every_device, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer, register_low_rank
from flatopt.flatness import rounding

FORMATS = ["int8", "int4", "int4/32", "int3/5", "uint4/8", "nf4/64"]


class Layers(nn.Module):
    """A layer of each kind, with a fan-in that no group divides."""

    def __init__(self):
        super().__init__()
        self.embedding, self.conv, self.linear = nn.Embedding(11, 12), nn.Conv2d(3, 6, 2), nn.Linear(36, 7)

    def forward(self, tokens):
        x = self.embedding(tokens).view(len(tokens), 3, 2, -1)
        return self.linear(torch.tanh(self.conv(nn.functional.pad(x, (0, 0, 0, 1)))).flatten(1))


def lora_layers(dtype=torch.float32):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = Layers()
    targets = ["embedding", "conv", "linear"]
    return get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False)).to(dtype)


def tokens():
    return torch.randint(11, (5, 2), generator=torch.Generator().manual_seed(1))


def wrap(model, noise="int4", cls=torch.optim.SGD, **options):
    options = {"sigma": 1.0, "schedule": "constant", "restore": "copy", "draws": "mixed", **options}
    return FlatPerturbOptimizer(cls(trainable(model), lr=0.1), model, noise=noise, **options)


def served(model, form):
    """A copy with the adapters merged and the weights rounded."""
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        for module in merged.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                w = module.weight
                w.copy_(rounding(form)(w.float().flatten(1)).view_as(w))
            elif isinstance(module, nn.Embedding):  # its outputs are the columns
                module.weight.copy_(rounding(form)(module.weight.float()).view_as(module.weight))
    return merged


@on_every_device
@pytest.mark.parametrize("form", FORMATS)
def test_a_training_forward_is_that_of_the_served_model(form, device):
    model = lora_layers().to(device)
    x = tokens().to(device)
    expected = served(model, form)(x)
    optimizer, before = wrap(model, form), frozen(model)
    out = model(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(x), expected, atol=1e-4) or form == "int8"  # a reader's is clean
    out.sum().backward()
    model(x).sum().backward()
    optimizer.step()
    assert not changed(model, before)


def test_half_a_way():
    model = lora_layers()
    layer = model.base_model.model.linear
    clean = layer.base_layer.weight.detach().clone()
    merged = clean + layer.get_delta_weight("default").detach()
    optimizer = wrap(model, sigma=0.5)
    optimizer.perturb()
    moved = layer.base_layer.weight.detach() - clean
    torch.testing.assert_close(moved, 0.5 * (rounding("int4")(merged) - merged), rtol=1e-4, atol=1e-6)
    optimizer.restore()
    assert torch.equal(bits(layer.base_layer.weight), bits(clean))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = lora_mlp(dtype)
    optimizer, before = wrap(model), frozen(model)
    layer = model.base_model.model.second
    A, B = layer.lora_A["default"].weight.detach().float(), layer.lora_B["default"].weight.detach().float()
    delta = layer.scaling["default"] * (B @ A)
    # not of what merge() gives: that is rounded to the dtype first, and so now and then to another level
    wanted = rounding("int4")(layer.base_layer.weight.detach().float() + delta)
    optimizer.perturb()
    ulp = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    torch.testing.assert_close(layer.base_layer.weight.detach().float() + delta, wanted, rtol=2 * ulp, atol=2 * ulp)
    optimizer.restore()
    assert not changed(model, before)


def test_the_gradient_goes_straight_through():
    """To A and B as if W stood at the rounded weight less the update; and every second micro-batch at clean W."""
    torch.manual_seed(0)
    model = lora_mlp()
    x, y = batch()

    def gradients():
        nn.functional.cross_entropy(model(x), y).backward()
        found = [p.grad.clone() for p in trainable(model)]
        model.zero_grad()
        return found

    plain = gradients()
    with torch.no_grad():
        before = frozen(model)
        for module in model.modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight("default")
                w = module.base_layer.weight
                w.copy_(rounding("nf4/8")(w + delta) - delta)
    expected = gradients()
    model.load_state_dict(before, strict=False)
    optimizer = wrap(model, "nf4/8")
    for mine, theirs in zip(gradients(), expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(gradients(), plain):
        assert torch.equal(mine, theirs)
    optimizer.step()
    assert not changed(model, before)


@pytest.mark.filterwarnings("ignore:noise='int4' in every forward")
@pytest.mark.parametrize("draws", ["step", "mixed"])
@pytest.mark.parametrize("targets", [["second"], ["first", "second", "head"]])
def test_a_closure_rounds_where_the_adapter_is(targets, draws):
    model = lora_mlp(target_modules=targets)
    layer = model.base_model.model.second
    x, y = batch()
    optimizer, before = wrap(model, cls=torch.optim.LBFGS, draws=draws), frozen(model)
    clean, deltas = layer.base_layer.weight.detach().clone(), []

    def closure():
        optimizer.zero_grad()
        total = 0.0
        for micro in range(2):
            loss = nn.functional.cross_entropy(model(x), y)
            delta, stands = layer.get_delta_weight("default").detach(), layer.base_layer.weight.detach()
            expected = clean if micro and draws == "mixed" else rounding("int4")(clean + delta) - delta
            torch.testing.assert_close(stands, expected, rtol=1e-5, atol=1e-6 * max(1.0, delta.abs().max().item()))
            deltas.append(delta)
            loss.backward()
            total += loss.item()
        return torch.tensor(total)

    optimizer.step(closure)
    assert len(deltas) > 2
    assert not torch.equal(deltas[0], deltas[-1])
    assert not changed(model, before)


@pytest.mark.filterwarnings("ignore:noise='int4' in every forward")
def test_a_row_that_is_not_finite_stays():
    w = nn.Parameter(
        torch.tensor([[1.0, float("nan"), 2.0], [0.3, 1.0, -1.0], [1.0, 2.0, float("inf")]]), requires_grad=False
    )
    before, adapter = w.detach().clone(), nn.Parameter(torch.zeros(2))
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD([adapter], lr=0.1),
        [{"params": [w]}],
        noise="int4",
        sigma=1,
        schedule="constant",
        restore="copy",
    )
    optimizer.perturb()
    assert torch.equal(bits(w[0::2]), bits(before[0::2]))
    torch.testing.assert_close(w[1], rounding("int4")(before[1:2])[0])
    optimizer.restore()
    assert torch.equal(bits(w), bits(before))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="pass restore='copy'"):
        wrap(lora_mlp(), restore="reversible")
    with pytest.raises(ValueError, match="pass restore='copy'"):
        wrap(lora_mlp(), restore="forward")
    with pytest.raises(ValueError, match="at most 1"):
        wrap(lora_mlp(), sigma=1.5)
    for name in ("int9", "int4/0", "nf3", 4):
        with pytest.raises(ValueError, match="or a format to round to"):
            wrap(lora_mlp(), name)
    with pytest.raises(ValueError, match=r"cannot round .*rescales"):
        wrap(lora_mlp(use_dora=True))
    with pytest.raises(ValueError, match="raw parameters"):
        FlatPerturbOptimizer(
            torch.optim.SGD([nn.Parameter(torch.zeros(2))]), [{"params": [torch.zeros(2, 2)]}], draws="mixed"
        )
    model = lora_mlp()
    optimizer = wrap(model)
    optimizer.perturb_groups[0]["sigma"] = 2.0
    with pytest.raises(ValueError, match="at most 1"):
        model(batch()[0])


def test_what_is_likely_a_mistake_is_told():
    with pytest.warns(UserWarning, match="pass sigma=1"):
        wrap(lora_mlp(), sigma=0.05)
    with pytest.warns(UserWarning, match="draws='mixed'"):
        wrap(lora_mlp(), draws="step")


@pytest.mark.filterwarnings("ignore:noise='int4' in every forward")
@pytest.mark.parametrize("kind", ["loha", "on the grid"])
def test_a_second_evaluation_finds_updates_that_are_made(kind):
    """Of an adapter whose update is computed; and where the first evaluation's rounding moved nothing."""
    from peft import LoHaConfig, get_peft_model

    torch.manual_seed(0)
    if kind == "loha":
        model = get_peft_model(nn.Sequential(nn.Linear(16, 6)), LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    else:
        model = lora_mlp(target_modules=["second"], init_lora_weights=True)
    layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
    with torch.no_grad():
        layer.base_layer.weight.copy_(rounding("int4")(layer.base_layer.weight))
    clean, x = layer.base_layer.weight.detach().clone(), torch.randn(4, 16)
    optimizer = wrap(model, draws="step", cls=Twice)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        delta = layer.get_delta_weight("default").detach()
        stands = layer.base_layer.weight.detach()
        torch.testing.assert_close(stands, rounding("int4")(clean + delta) - delta, rtol=1e-5, atol=1e-5)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(bits(layer.base_layer.weight), bits(clean))


class Twice(torch.optim.SGD):
    def step(self, closure):
        for _ in range(2):
            loss = closure()
            super().step()
        return loss


def test_a_group_set_to_a_format_in_mid_training_is_asked_as_at_the_start():
    from peft import LoraConfig, get_peft_model

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(16, 2)

        def forward(self, x):
            return self.attend(x, x, x)[0]

    model = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attend"]))
    optimizer = wrap(model, noise="filter", sigma=0.1)
    model(torch.ones(2, 3, 16)).sum().backward()
    optimizer.step()
    optimizer.perturb_groups[0].update(noise="int4", sigma=1)
    with pytest.raises(ValueError, match="cannot round"):
        model(torch.ones(2, 3, 16))
    optimizer.perturb_groups[0].update(noise="filter", sigma=0.1)
    model(torch.ones(2, 3, 16)).sum().backward()
    optimizer.step()

    plain = lora_mlp()
    optimizer = wrap(plain, noise="filter", sigma=0.1, draws="step")
    optimizer.perturb_groups[0].update(noise="int4", sigma=1)
    with pytest.warns(UserWarning, match="draws='mixed/4'"):
        plain(batch()[0])


def test_a_grouped_convolution_is_refused_where_peft_cannot_merge_it():
    from peft import LoraConfig, get_peft_model

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2, bias=False).requires_grad_(False)
            self.lora_A = nn.Parameter(torch.randn(1, 18))
            self.lora_B = nn.Parameter(torch.randn(4, 1))

        def forward(self, x):
            weight = self.conv.weight + (self.lora_B @ self.lora_A).view(4, 2, 3, 3)
            return nn.functional.conv2d(x, weight, groups=2)

    register_low_rank(Own, base=lambda m: m.conv.weight, delta=lambda m: (m.lora_B, m.lora_A, 1.0))
    own, x = Own(), torch.randn(2, 4, 6, 6)
    want = nn.functional.conv2d(
        x,
        rounding("int4")((own.conv.weight + (own.lora_B @ own.lora_A).view(4, 2, 3, 3)).flatten(1)).view(4, 2, 3, 3),
        groups=2,
    )
    optimizer = wrap(own)
    torch.testing.assert_close(own(x), want, rtol=1e-4, atol=1e-5)
    optimizer.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, which says so too, as of some version
        model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="PEFT cannot merge LoRA on a grouped convolution"):
        wrap(model)


@on_every_device
@pytest.mark.parametrize(("noise", "sigma"), [("filter", 0.1), ("int4", 1.0)])
def test_a_checkpoint_loaded_amid_a_step_stays(noise, sigma, device):
    model = lora_mlp().to(device)
    optimizer = wrap(model, noise, sigma=sigma)
    x = batch()[0].to(device)
    model(x).square().mean().backward()
    loaded = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    optimizer.step()
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in loaded.items() if "lora" not in name)
    model(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in loaded.items() if "lora" not in name)
