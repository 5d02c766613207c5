"""Training by ways that no root encloses: an inner model's method, and adapters whose base layer is elsewhere."""

import pytest
import torch
from helpers import bits, changed, frozen, lora_mlp, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer, register_low_rank


def flat(parameters, targets, **options):
    return FlatPerturbOptimizer(torch.optim.SGD(parameters, lr=0.1), targets, sigma=0.2, schedule="constant", **options)


def test_backward_finds_its_weights_again_after_a_reader():
    """A reader between forward and backward: the backward starts at the last layer, not at the one that opened the step."""
    pytest.importorskip("peft")
    grads = []
    for reads in (False, True):
        torch.manual_seed(3)
        model = lora_mlp()
        before, optimizer = frozen(model), flat(trainable(model), model)
        inner, x = model.base_model.model, torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
        part = nn.Sequential(inner.first, nn.ReLU(), inner.second, nn.ReLU(), inner.head)
        loss = part(x).square().mean()
        if reads:
            with torch.no_grad():
                part(x)
            assert changed(model, before) == []
        loss.backward()
        assert changed(model, before)
        grads.append([p.grad for p in trainable(model) if p.grad is not None])
        optimizer.step()
        assert changed(model, before) == []
    assert all(torch.equal(x, y) for x, y in zip(*grads))


class Takes(nn.Module):
    """Takes over the forward of a layer that it does not hold, as kohya's LoRAModule does."""

    def __init__(self, layer):
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(layer.out_features, 2)),
            nn.Parameter(torch.randn(2, layer.in_features)),
        )
        self.taken = layer.forward
        layer.forward = self.forward

    def forward(self, x):
        return self.taken(x) + x @ self.down.t() @ self.up.t()


register_low_rank(Takes, base=lambda m: (m.taken.__self__, "weight"), delta=lambda m: (m.up, m.down, 1.0))


def test_adapters_that_take_over_a_forward_elsewhere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
    clean = [bits(model[i].weight).clone() for i in (0, 2)]
    network = nn.ModuleList([Takes(model[0]), Takes(model[2])])
    optimizer = flat(network.parameters(), [{"modules": network}])

    def is_clean():
        return [torch.equal(bits(model[i].weight), w) for i, w in zip((0, 2), clean)]

    for _ in range(2):
        loss = model(torch.randn(4, 8)).square().mean()
        assert is_clean() == [False, False]
        with torch.no_grad():
            model(torch.randn(4, 8))
        assert is_clean() == [True, True]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert is_clean() == [True, True]
    assert optimizer.step_count == 2


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 16) / 4), nn.Parameter(torch.randn(3, 16, 8) / 4)

    def forward(self, x):
        return torch.einsum("bh,eoh->bo", torch.einsum("bi,ehi->bh", x, self.up), self.down)


class Holds(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


def of_experts():
    peft = pytest.importorskip("peft")
    if "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT has no target_parameters")
    names = ["layer.up", "layer.down"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    return peft.get_peft_model(Holds(Experts(), lambda layer, x: layer(x)), config)


def of_attention():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    return peft.get_peft_model(Holds(nn.MultiheadAttention(16, 2), lambda layer, x: layer(x, x, x)[0]), config)


class Own(nn.Module):
    """Reads the weight of a layer inside it that it never calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.up, self.down = nn.Linear(16, 8).requires_grad_(False), nn.Linear(2, 8), nn.Linear(16, 2)

    def forward(self, x):
        return nn.functional.linear(x, self.linear.weight + self.up.weight @ self.down.weight)


register_low_rank(Own, base=lambda m: m.linear.weight, delta=lambda m: (m.up.weight, m.down.weight, 1.0))


def of_ones_own():
    return Holds(Own(), lambda layer, x: layer(x))


def of_a_tuner(name):
    def make():
        peft = pytest.importorskip("peft")
        if not hasattr(peft, f"{name}Config"):
            pytest.skip(f"this PEFT has no {name}")
        kwargs = {"r": 2, "init_weights": False} if name == "Shira" else {}
        config = getattr(peft, f"{name}Config")(target_modules=["layer"], **kwargs)
        return peft.get_peft_model(Holds(nn.Linear(16, 8), lambda layer, x: layer(x)), config)

    return make


@pytest.mark.filterwarnings("ignore:.*hooks.* set which will be ignored")
@pytest.mark.parametrize("restore", ["reversible", "copy"])
@pytest.mark.parametrize("make", [of_ones_own, of_a_tuner("Shira"), of_a_tuner("Supertuning")])
def test_a_layer_that_reads_a_weight_without_calling_its_owner(make, restore):
    x, found = torch.randn(4, 16), []
    for inner in (lambda model: model, lambda model: getattr(getattr(model, "base_model", model), "model", model).layer):
        torch.manual_seed(0)
        model = make()
        door = inner(model)
        with torch.no_grad():
            want = door.eval()(x)
        before, optimizer = frozen(model), flat(trainable(model), model, restore=restore)
        for _ in range(2):
            y = door.train()(x)
            assert not torch.allclose(y, want, atol=1e-3)
            for reader in (inner(model), model):
                with torch.no_grad():
                    torch.testing.assert_close(reader.eval()(x), want)
                reader.train()
            y.square().mean().backward()
        found.append([p.grad.clone() for p in trainable(model) if p.grad is not None])
        assert found[-1]
        optimizer.step()
        assert not changed(model, before)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_a_tuner_that_does_not_call_the_base_layer_cannot_have_its_noise_there():
    model = of_a_tuner("Shira")()
    with pytest.raises(ValueError, match=r"reads it without calling Linear\.forward"):
        flat(trainable(model), model, restore="forward")


@pytest.mark.parametrize("make", [of_experts, of_attention])
def test_layers_that_make_their_weight_anew_in_each_forward_by_the_inner_models_door(make):
    x, found = torch.randn(4, 16), []
    for door in (lambda model: model, lambda model: model.get_base_model()):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            want = model(x)
        before, optimizer = frozen(model), flat(trainable(model), model)
        for _ in range(2):
            y = door(model)(x)
            with torch.no_grad():
                torch.testing.assert_close(door(model)(x), want)
            y.square().mean().backward()
        assert optimizer.is_perturbed
        found.append([p.grad.clone() for p in trainable(model) if p.grad is not None])
        assert found[-1]
        optimizer.step()
        assert changed(model, before) == [] or make is of_attention  # which PEFT rounds by W + sBA - sBA
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [of_experts, of_attention])
def test_layers_that_make_their_weight_anew_get_the_gradients_they_have_without_flatopt(make):
    x, found = torch.randn(4, 16), []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        if wrapped:
            optimizer = FlatPerturbOptimizer(optimizer, model, sigma=0.0, schedule="constant")
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
        found.append([p.grad for p in trainable(model)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_noise_in_the_forward_asked_for_amid_a_run_is_there_in_a_layers_first_direct_forward():
    pytest.importorskip("peft")
    x, found = torch.randn(4, 16), []
    for asked in ("amid", "from the start"):
        torch.manual_seed(3)
        model = lora_mlp()
        restore = "forward" if asked == "from the start" else "reversible"
        inner = torch.optim.SGD(trainable(model), lr=0.0)
        optimizer = FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant", restore=restore)
        layer = model.base_model.model.first
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.perturb_groups[0]["restore"] = "forward"
        found.append([layer(x), layer(x)])
        assert len(layer.base_layer._forward_hooks) == 0
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(layer(x), found[-1][0])
    for y in (*found[0], found[1][1]):
        torch.testing.assert_close(y, found[1][0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_adapter_inside_the_forward_of_a_layer_outside_of_it_leaves_the_answer_to_that_layer(mode):
    """Nobody calls the adapters' network, which stays in train mode; the base is put into eval mode, gradients on."""

    class Beside(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.up, self.down = [layer.requires_grad_(False)], nn.Linear(2, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.up(self.down(x))

    class Base(nn.Linear):
        def forward(self, x):
            y = self.beside[0](x)
            self.seen = self.weight.detach().clone()
            return y + super().forward(x)

    class Network(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = nn.ModuleList(map(Beside, layers))

        def forward(self):
            raise NotImplementedError

    register_low_rank(Beside, base=lambda m: (m.layer[0], "weight"), delta=lambda m: (m.up.weight, m.down.weight, 1.0))
    base = nn.Sequential(Base(16, 16), Base(16, 16))
    adapters = Network(base)
    for layer, adapter in zip(base, adapters.layers):
        layer.beside = [adapter]
    clean = [layer.weight.detach().clone() for layer in base]
    optimizer, x = flat(trainable(adapters), adapters), torch.randn(4, 16)
    base.train()(x).sum().backward()
    getattr(base, mode)()(x)
    for layer, before in zip(base, clean):
        assert torch.equal(layer.seen, before) is (mode == "eval")
    optimizer.restore()
    assert all(torch.equal(layer.weight, before) for layer, before in zip(base, clean))
