"""flatopt.flatness: against closed forms, the Hessian written out, and another library; and no trace left on the model."""

import copy
import random
import subprocess
import sys

import numpy
import peft
import pytest
import torch
from helpers import Mlp, batch, bits, lora_mlp, trainable
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from flatopt import FlatPerturbOptimizer, flatness, register_low_rank
from flatopt.flatness.point import at_weights
from flatopt.flatness.sharpness import noise_scales

BATCHES = [batch(seed=1), batch(seed=2)]


def loss_fn(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


class Custom(nn.Module):
    def __init__(self, out, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inputs), requires_grad=False)
        self.up, self.down = nn.Parameter(torch.randn(out, 2) * 0.3), nn.Parameter(torch.randn(2, inputs))

    def forward(self, x):
        return x @ (self.weight + 0.5 * self.up @ self.down).t()


register_low_rank(Custom, base=lambda m: m.weight, delta=lambda m: (m.up, m.down, 0.5))


def one_layer(kind):
    """A model that is one adapted layer, and the matrix (out, in) that it applies."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if kind == "custom":
        model = Custom(6, 16)
        return model, (model.weight + 0.5 * model.up @ model.down).detach()
    layer = Conv1D(6, 16) if kind == "Conv1D" else nn.Linear(16, 6, bias=False)
    with torch.no_grad():  # rows, not columns, of unlike norms
        scale = torch.arange(1.0, 7.0)
        layer.weight.mul_(scale if kind == "Conv1D" else scale.unsqueeze(1))
    settings = {"fan_in_fan_out": kind == "Conv1D", "use_dora": kind == "DoRA", "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], **settings))
    if kind == "DoRA":
        with torch.no_grad():  # as after training: the magnitude is not the norm of the merged row
            model.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(1.5)
    merged = copy.deepcopy(model).merge_and_unload()[0].weight.detach()
    return model, merged.t() if kind == "Conv1D" else merged


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "Conv1D", "custom"])
def test_expected_sharpness_of_a_quadratic_loss(kind):
    """L = |W'x|² / 2 rises by sigma² |W'|² |x|² / 2n on average, if the noise is Eq. 7's at the merged weight."""
    model, W = one_layer(kind)
    x = torch.randn(3, 16)
    found = flatness.expected_sharpness(
        model, lambda m, b: m(b).square().sum(1).mean() / 2, [x[:1], x[1:2], x[2:]], sigma=0.4, draws=400
    )
    exact = 0.4**2 / 16 * W.square().sum().item() * x.square().sum(1).mean().item() / 2
    assert abs(found.value - exact) < 4 * found.stderr
    assert found.stderr < 0.1 * exact
    assert found.value == pytest.approx(numpy.mean(found.samples))
    assert found.stderr == pytest.approx(numpy.std(found.samples, ddof=1) / 20)


def test_noise_is_proportional_to_each_rows_norm():
    """Row by row: with a loss of one output alone."""
    model, W = one_layer("Conv1D")
    x = torch.randn(1, 16)
    for row in (0, 5):
        found = flatness.expected_sharpness(model, lambda m, b, r=row: m(b)[0, r].square() / 2, [x], sigma=0.4, draws=400)
        exact = 0.4**2 / 16 * W[row].square().sum().item() * x.square().sum().item() / 2
        assert abs(found.value - exact) < 4 * found.stderr
        assert found.stderr < 0.1 * exact


@pytest.mark.parametrize("layer", ["linear", "conv, channels_last", "embedding"])
def test_the_normals_are_those_of_training(layer):
    """What moves the weights for the k-th sample is what step k of a run with that seed adds."""
    base = {
        "linear": lambda: nn.Linear(7, 5),
        "conv, channels_last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        "embedding": lambda: nn.Embedding(9, 6),
    }[layer]()
    model = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(r=2, target_modules=["0"]))
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(adapter, lr=0.1), model, sigma=0.5, schedule="constant", restore="copy", seed=3
    )
    optimizer.step_count = 4
    weight = next(p for name, p in model.named_parameters() if name.endswith("base_layer.weight"))
    clean = weight.detach().clone()
    with optimizer.perturbed():
        noise = weight.detach() - clean
    with at_weights(model, loss_fn, BATCHES, None) as point:
        expected = point.random(0, 3, 4) * noise_scales(point)[0] * 0.5
        signs = point.random(0, 3, 4, signs=True)
    torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(signs, noise.sign())


def test_samples_are_paired_by_seed():
    one, two = lora_mlp(), lora_mlp()
    with torch.no_grad():
        for p, q in zip(two.parameters(), one.parameters()):
            p.copy_(q if not q.requires_grad else q * 1.01)

    def samples(model, seed):
        return numpy.array(flatness.expected_sharpness(model, loss_fn, BATCHES, sigma=0.5, draws=12, seed=seed).samples)

    assert (samples(one, 0) == samples(one, 0)).all()
    paired, unpaired = samples(one, 0) - samples(two, 0), samples(one, 0) - samples(two, 1)
    assert paired.std() < 0.2 * unpaired.std()


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_case_of_a_linear_loss(adaptive):
    """L = g·w: the maximum is rho |Tg|."""
    model, W = one_layer("LoRA")
    x = torch.randn(1, 16)
    found = flatness.worst_case_sharpness(model, lambda m, b: m(b)[0, 2], [x], rho=0.3, adaptive=adaptive)
    g = torch.zeros_like(W)
    g[2] = x[0]
    exact = 0.3 * (W * g if adaptive else g).norm().item()
    assert found.value == pytest.approx(exact, rel=1e-4)
    assert found.path[0] == pytest.approx(exact, rel=1e-4)


def test_worst_case_of_a_quadratic_loss():
    """max of g·e + e·He/2 in a ball, from the eigenvalues of H (Moré and Sorensen, 1983)."""
    from scipy.optimize import brentq

    model, W = one_layer("custom")
    model.double(), torch.manual_seed(0)
    W, x = W.double(), torch.randn(20, 16, dtype=torch.float64)
    rho = 2.0
    found = flatness.worst_case_sharpness(model, lambda m, b: m(b).square().sum(1).mean() / 2, [x], rho=rho, steps=60)
    second = x.t() @ x / 20  # H is this for every row
    values, vectors = torch.linalg.eigh(second)
    g = (W @ second @ vectors).numpy()  # in the basis of H
    values = values.numpy()

    def length(mu):
        return numpy.sqrt((g**2 / (mu - values) ** 2).sum())

    mu = brentq(lambda mu: length(mu) - rho, values[-1] + 1e-9, values[-1] + 1e6)
    e = g / (mu - values)
    exact = (g * e).sum() + 0.5 * (values * e**2).sum()
    assert found.value <= exact * (1 + 1e-6)
    assert found.value == pytest.approx(exact, rel=1e-3)
    assert found.value == max(found.path) > found.path[0]


def test_worst_case_over_the_adapter_moves_the_adapter_alone():
    model = lora_mlp(torch.float64)
    seen = []
    names = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in names.items()}

    def watching(model, batch):
        seen.append({n: (p.detach() - before[n]).norm() for n, p in names.items()})
        return loss_fn(model, batch)

    data = [batch(dtype=torch.float64)]
    found = flatness.worst_case_sharpness(model, watching, data, rho=1e-4, space="adapter", steps=3)
    loss_fn(model.eval(), data[0]).backward()
    slope = torch.cat([p.grad.flatten() for p in trainable(model)]).norm().item()
    assert found.value == pytest.approx(1e-4 * slope, rel=1e-2)
    for name, moved in seen[-1].items():
        assert (moved > 0) == ("lora_" in name), name
    assert sum(moved**2 for moved in seen[-1].values()) ** 0.5 == pytest.approx(1e-4, rel=1e-3)


def test_worst_case_at_a_zero_gradient_is_zero():
    found = flatness.worst_case_sharpness(lora_mlp(), lambda m, b: (m(b[0]) * 0).sum(), BATCHES)
    assert found == (0.0, ())


def hessian(model, batches):
    """Of the mean loss over the merged base weights, written out."""
    merged = copy.deepcopy(model).merge_and_unload().eval()
    names = ["first.weight", "second.weight", "head.weight"]
    start = [dict(merged.named_parameters())[n].detach() for n in names]

    def loss(flat):
        parts = flat.split([w.numel() for w in start])
        weights = {n: p.view_as(w) for n, p, w in zip(names, parts, start)}
        return sum(cross_entropy(functional_call(merged, weights, (x,)), y) for x, y in batches) / len(batches)

    return torch.func.hessian(loss)(torch.cat([w.flatten() for w in start]))


@pytest.fixture(scope="module")
def small():
    """A model with a smooth loss of a few hundred weights, two batches, and the Hessian."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    model = Mlp(width=8)
    for layer in (model.first, model.second, model.head):
        layer.weight.data *= 2
    config = LoraConfig(r=2, target_modules=["first", "second", "head"], init_lora_weights=False)
    model = get_peft_model(model, config).double()
    batches = [batch(dtype=torch.float64, seed=i) for i in range(2)]
    return model, batches, hessian(model, batches)


def test_trace_and_its_standard_error(small):
    model, batches, H = small
    found = flatness.hessian_trace(model, loss_fn, batches, draws=300)
    off_diagonal = H - torch.diag(H.diag())
    stderr = (2 * off_diagonal.square().sum() / 300).sqrt().item()  # the variance of Hutchinson's estimate with signs
    assert abs(found.value - H.trace().item()) < 4 * stderr
    assert found.stderr == pytest.approx(stderr, rel=0.35)  # heavy tails: 300 samples give it to about 10 %


def test_top_eigenvalue_and_what_it_says_of_its_convergence(small):
    model, batches, H = small
    values = torch.linalg.eigvalsh(H)
    found = flatness.hessian_top_eigenvalue(model, loss_fn, batches, tolerance=1e-9)
    assert found.converged
    assert found.value == pytest.approx(values[-1].item(), rel=1e-9)
    assert found.residual <= 1e-9 * found.value
    for iterations in (1, 2, 4):
        early = flatness.hessian_top_eigenvalue(model, loss_fn, batches, tolerance=1e-9, max_iterations=iterations)
        assert not early.converged
        assert early.iterations == iterations
        assert early.value < values[-1]
        assert (values - early.value).abs().min() <= early.residual


def test_top_is_the_largest_not_the_largest_in_size():
    """A loss whose most negative curvature is the stronger."""
    model, _ = one_layer("LoRA")
    x = torch.eye(16)[:2]

    def saddle(model, batch):
        out = model(batch)
        return out[0, 0].square() - 5 * out[1, 1].square()

    found = flatness.hessian_top_eigenvalue(model, saddle, [x])
    assert found.converged
    assert found.value == pytest.approx(2.0, rel=1e-4)


def test_curvature_of_a_linear_loss_is_zero():
    model, _ = one_layer("LoRA")
    x = torch.randn(2, 16)
    assert flatness.hessian_trace(model, lambda m, b: m(b).sum(), [x], draws=3)[:2] == (0.0, 0.0)
    assert flatness.hessian_top_eigenvalue(model, lambda m, b: m(b).sum(), [x]) == (0.0, 0.0, 1, True)


@pytest.mark.filterwarnings("ignore")
def test_against_curvlinops(small):
    curvlinops = pytest.importorskip("curvlinops")
    from scipy.sparse.linalg import eigsh

    model, batches, _ = small
    merged = copy.deepcopy(model).merge_and_unload().eval()
    weights = [getattr(merged, name).weight.requires_grad_(True) for name in ("first", "second", "head")]
    H = curvlinops.HessianLinearOperator(merged, nn.CrossEntropyLoss(), weights, batches)
    top = eigsh(H.to_scipy(), k=1, which="LA", return_eigenvectors=False)[0]
    found = flatness.hessian_top_eigenvalue(model, loss_fn, batches, tolerance=1e-7)
    assert found.value == pytest.approx(float(top), rel=1e-6)
    theirs = float(curvlinops.hutchinson_trace(H, num_matvecs=200))
    ours = flatness.hessian_trace(model, loss_fn, batches, draws=200)
    assert abs(ours.value - theirs) < 4 * 2**0.5 * ours.stderr


def test_second_derivatives_through_fused_attention():
    import timm
    from peft import LoraConfig, get_peft_model

    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=12, depth=1, num_heads=2, num_classes=3
    )
    assert model.blocks[0].attn.fused_attn
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False))
    data = [(torch.randn(4, 1, 8, 8), torch.randint(3, (4,)))]
    assert flatness.hessian_top_eigenvalue(model, loss_fn, data).converged


def test_slices_pass_through_the_merged_weights_along_filter_normalised_directions():
    """What the loss function sees at x = 1: every row of the merged weight moved by its own norm."""
    seen = {}
    for name in ("one", "two"):
        model, W = one_layer("LoRA")
        weight = model.base_model.model[0].base_layer.weight
        moved = []

        def watching(model, batch, moved=moved, weight=weight, W=W):
            moved.append(weight.detach() - W)
            return model(batch).square().mean()

        x = [torch.randn(3, 16)]
        curve = flatness.loss_curve(model, watching, x, span=0.5, points=5)
        torch.testing.assert_close(moved[4].norm(dim=1), 0.5 * W.norm(dim=1))
        torch.testing.assert_close(moved[0], -moved[4], atol=1e-5, rtol=1e-4)
        assert moved[2].abs().max() < 1e-6
        assert curve.position.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
        assert curve.loss[2] == pytest.approx((x[0] @ W.t()).square().mean().item(), rel=1e-5)
        seen[name] = moved[4] / W.norm(dim=1, keepdim=True)

        surface = flatness.loss_surface(model, watching, x, span=0.5, points=5)
        along, across = moved[5 + 2 * 5 + 4], moved[5 + 4 * 5 + 2]
        torch.testing.assert_close(along, moved[4])
        torch.testing.assert_close(across.norm(dim=1), 0.5 * W.norm(dim=1))
        assert torch.nn.functional.cosine_similarity(along.flatten(), across.flatten(), dim=0).abs() < 0.4
        numpy.testing.assert_allclose(surface.loss[2], curve.loss)
    torch.testing.assert_close(seen["one"], seen["two"], atol=1e-5, rtol=1e-4)


def everything():
    yield lambda m, f, b: flatness.expected_sharpness(m, f, b, draws=2)
    yield lambda m, f, b: flatness.worst_case_sharpness(m, f, b, steps=2)
    yield lambda m, f, b: flatness.worst_case_sharpness(m, f, b, steps=2, adaptive=True, space="adapter")
    yield lambda m, f, b: flatness.hessian_trace(m, f, b, draws=2)
    yield lambda m, f, b: flatness.hessian_top_eigenvalue(m, f, b, max_iterations=2)
    yield lambda m, f, b: flatness.loss_curve(m, f, b, points=3)
    yield lambda m, f, b: flatness.loss_surface(m, f, b, points=3)
    yield lambda m, f, b: flatness.sigma_range_test(m, f, b, sigmas=(0.1, 5.0), draws=2, threshold=1e-3)


def snapshot(model):
    tensors = {n: bits(t).clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    rest = [(p.requires_grad, id(p), p.grad is None) for p in model.parameters()]
    return tensors, rest, [m.training for m in model.modules()]


def assert_as_it_was(model, before):
    tensors, rest, modes = snapshot(model)
    assert [n for n in tensors if not torch.equal(tensors[n], before[0][n])] == []
    assert (rest, modes) == before[1:]


MODELS = {
    "LoRA": lora_mlp,
    "bf16": lambda: lora_mlp(torch.bfloat16),
    "DoRA": lambda: lora_mlp(use_dora=True),
    "lora_bias": lambda: lora_mlp(lora_bias=True),
    "dropout": lambda: lora_mlp(lora_dropout=0.5),
    "merged": lambda: _merged(lora_mlp()),
    "channels_last": lambda: _conv().to(memory_format=torch.channels_last),
    "custom": lambda: nn.Sequential(nn.BatchNorm1d(16), Custom(5, 16)),
}


def _conv():
    from peft import LoraConfig, get_peft_model

    net = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 2), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 5))
    return get_peft_model(net, LoraConfig(r=2, target_modules=["1", "2"], init_lora_weights=False))


def _merged(model):
    model.merge_adapter()
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_left_as_it_was(kind):
    model = MODELS[kind]()
    data = [(x.to(next(model.parameters()).dtype), y) for x, y in BATCHES]
    modules = list(model.modules())
    modules[-1].eval()  # a mode of its own
    before = snapshot(model)
    states = random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()

    for number, measure in enumerate(everything()):
        if kind == "merged" and number == 2:
            with pytest.raises(ValueError, match="unmerge_adapter"):
                measure(model, loss_fn, data)
            continue
        measure(model, loss_fn, data)
        assert_as_it_was(model, before)

        calls = []

        def failing(model, batch, calls=calls):
            assert not any(m.training for m in model.modules())
            calls.append(1)
            if len(calls) == 4:
                raise ZeroDivisionError
            return loss_fn(model, batch)

        with pytest.raises(ZeroDivisionError):
            measure(model, failing, data)
        assert_as_it_was(model, before)
    assert (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()) == states


def test_multihead_attention_is_left_as_it_was():
    """PEFT merges and unmerges it in each forward, with rounding of its own: not merged, the bits are those of before."""
    from peft import LoraConfig, get_peft_model

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=False)[0]

    model = get_peft_model(Attend(), LoraConfig(r=2, target_modules=["attend"], init_lora_weights=False))
    x = torch.randn(2, 3, 8)
    merged = copy.deepcopy(model).merge_and_unload()
    before = {n: bits(t).clone() for n, t in model.state_dict().items()}
    found = flatness.loss_curve(model, lambda m, b: m(b).square().mean(), [x], points=3)
    assert found.loss[1] == pytest.approx(merged(x).square().mean().item(), rel=1e-5)
    assert found.loss[0] != found.loss[1] != found.loss[2]
    after = model.state_dict()
    assert all(torch.equal(bits(after[n]), b) for n, b in before.items())
    torch.testing.assert_close(model(x), merged(x))


def test_in_the_middle_of_a_flat_step_the_clean_weights_are_measured():
    model = lora_mlp()
    expected = flatness.expected_sharpness(model, loss_fn, BATCHES, draws=4)
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.5, schedule="constant")
    before = snapshot(model)
    loss_fn(model, BATCHES[0])
    assert optimizer.is_perturbed
    assert flatness.expected_sharpness(model, loss_fn, BATCHES, draws=4) == expected
    assert not optimizer.is_perturbed
    assert_as_it_was(model, before)
    loss_fn(model, BATCHES[0]).backward()
    optimizer.step()


def test_groups_and_raw_parameters_can_be_measured_alone():
    """Also trainable ones: a fully fine-tuned model, whose W is its own W'."""
    model = Mlp()
    groups = [{"params": [model.first.weight]}]
    before = snapshot(model)
    seen = []

    def watching(m, b):
        seen.append([n for n, t in m.named_parameters() if not torch.equal(bits(t), before[0][n])])
        return loss_fn(m, b)

    flatness.loss_curve(model, watching, BATCHES, points=3, targets=groups)
    assert seen[-1] == ["first.weight"]
    assert_as_it_was(model, before)


def quadratic(scale):
    """A model and a loss that rises by scale * sigma² on average."""
    model, W = one_layer("LoRA")
    x = torch.ones(1, 16)
    return model, lambda m, b: scale * m(b).square().sum() / W.square().sum(), [x]


def test_suggested_sigma_is_where_the_expected_rise_reaches_the_threshold():
    model, loss, x = quadratic(3.0)
    found = flatness.sigma_range_test(model, loss, x, sigmas=(0.05, 0.1, 0.4, 0.8), draws=300, threshold=0.1)
    for sigma, rise in zip(found.sigmas, found.rise):
        assert abs(rise.value - 3 * sigma**2) < 4 * rise.stderr
    assert found.suggested == pytest.approx((0.1 / 3) ** 0.5, rel=0.1)
    assert 0.1 < found.suggested < 0.4
    with pytest.warns(UserWarning, match="already at sigma 0.4, .* give smaller ones"):
        below_the_grid = flatness.sigma_range_test(model, loss, x, sigmas=(0.4, 0.8), draws=300, threshold=0.1)
    assert below_the_grid.suggested == pytest.approx((0.1 / 3) ** 0.5, rel=0.1)
    with pytest.warns(UserWarning, match="larger ones"):
        above = flatness.sigma_range_test(model, loss, x, sigmas=(0.01, 0.02), draws=4, threshold=0.1)
    assert above.suggested == 0.02


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_loss_that_overflows_has_reached_the_threshold(bad):
    model, W = one_layer("LoRA")

    def breaks(model, batch):
        out = model(batch).square().sum() / W.square().sum()
        return out * 1e-6 if (out - clean).abs() < 0.5 else out * bad

    x = [torch.ones(1, 16)]
    clean = (x[0] @ W.t()).square().sum() / W.square().sum()
    found = flatness.sigma_range_test(model, breaks, x, sigmas=(0.001, 50.0), draws=2, threshold=0.1)
    assert 0.001 < found.suggested < 50


def test_pictures(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    model, loss, x = quadratic(1.0)
    curves = [flatness.loss_curve(model, loss, x, points=5, seed=s) for s in range(2)]
    surfaces = [flatness.loss_surface(model, loss, x, points=5, seed=s) for s in range(2)]
    test = flatness.sigma_range_test(model, loss, x, sigmas=(0.1, 0.5), draws=3)
    titles, labels = ("r = 1", "r = 16"), ("LoRA", "Flat-LoRA")

    figure = flatness.plot_curves({t: dict(zip(labels, curves)) for t in titles})
    assert [ax.get_title() for ax in figure.axes] == list(titles)
    for ax in figure.axes:
        assert [text.get_text() for text in ax.get_legend().get_texts()] == list(labels)
        for line, curve in zip(ax.get_lines(), curves):
            numpy.testing.assert_array_equal(line.get_xydata(), numpy.column_stack(curve))
    figure.savefig(tmp_path / "curves.png")

    for plot in (flatness.plot_contours, flatness.plot_surfaces):
        figure = plot({t: dict(zip(labels, surfaces)) for t in titles})
        found = [ax.get_title() for ax in figure.axes if ax.get_title()]
        assert found == [f"{label}, {title}" for title in titles for label in labels]
        figure.savefig(tmp_path / "surfaces.png")
    flat = flatness.Surface(surfaces[0].position, numpy.ones((5, 5)))
    flatness.plot_contours({"": {"": flat}}).savefig(tmp_path / "flat.png")

    for tests in (test, {"LoRA": test, "Flat-LoRA": test}):
        figure = flatness.plot_range_test(tests)
        figure.savefig(tmp_path / "range.svg")
    assert (tmp_path / "range.svg").stat().st_size > 1000
    assert matplotlib.get_backend()  # asking is allowed; nothing above chose one


@pytest.mark.parametrize("panels", [{}, {"r = 1": {}}, [], None], ids=str)
@pytest.mark.parametrize("plot", ["plot_curves", "plot_contours", "plot_surfaces", "plot_range_test"])
def test_a_plot_of_nothing_says_what_it_needs(plot, panels):
    with pytest.raises(ValueError, match=r"at least one .* got"):
        getattr(flatness, plot)(panels)


def test_matplotlib_is_not_needed_to_measure():
    code = "import sys; sys.modules['matplotlib'] = None; import flatopt; flatopt.flatness.expected_sharpness"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(dtype):
    model = lora_mlp(dtype).cuda()
    data = [(x.to("cuda", dtype), y.cuda()) for x, y in BATCHES]
    before, state = snapshot(model), torch.cuda.get_rng_state().tolist()
    found = [measure(model, loss_fn, data) for measure in everything()]
    assert_as_it_was(model, before)
    assert torch.cuda.get_rng_state().tolist() == state
    assert found[0] == next(everything())(model, loss_fn, data)
    if dtype == torch.float32:
        on_cpu = flatness.worst_case_sharpness(copy.deepcopy(model).cpu(), loss_fn, BATCHES, steps=2)
        assert found[1].value == pytest.approx(on_cpu.value, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: flatness.expected_sharpness(m, loss_fn, []), ValueError, "batches is empty"),
        (lambda m: flatness.expected_sharpness(m, loss_fn, BATCHES, draws=1), ValueError, "at least 2"),
        (lambda m: flatness.expected_sharpness(m, lambda m, b: m(b[0]), BATCHES), TypeError, "scalar"),
        (lambda m: flatness.expected_sharpness(m, lambda m, b: 1.0, BATCHES), TypeError, "scalar"),
        (lambda m: flatness.expected_sharpness(Mlp(), loss_fn, BATCHES), ValueError, "no low-rank module"),
        (lambda m: flatness.worst_case_sharpness(m, _detached, BATCHES), ValueError, "without a graph"),
        (lambda m: flatness.worst_case_sharpness(m, loss_fn, BATCHES, rho=0), ValueError, "rho"),
        (lambda m: flatness.worst_case_sharpness(m, loss_fn, BATCHES, space="W"), ValueError, "'full' or 'adapter'"),
        (
            lambda m: flatness.worst_case_sharpness(_frozen(m), loss_fn, BATCHES, space="adapter"),
            ValueError,
            "requires_grad_",
        ),
        (lambda m: flatness.hessian_trace(m, loss_fn, BATCHES, draws=1), ValueError, "at least 2"),
        (lambda m: flatness.hessian_top_eigenvalue(m, loss_fn, BATCHES, max_iterations=0), ValueError, "max_iterations"),
        (lambda m: flatness.loss_curve(m, loss_fn, BATCHES, points=4), ValueError, "odd"),
        (lambda m: flatness.sigma_range_test(m, loss_fn, BATCHES, sigmas=(0.2, 0.1)), ValueError, "rising"),
        # a boolean is no number, nor is what only compares like one
        (lambda m: flatness.expected_sharpness(m, loss_fn, BATCHES, sigma=True), ValueError, "sigma must be"),
        (lambda m: flatness.expected_sharpness(m, loss_fn, BATCHES, sigma="0.1"), ValueError, "sigma must be"),
        (lambda m: flatness.expected_sharpness(m, loss_fn, BATCHES, sigma=float("nan")), ValueError, "sigma must be"),
        (lambda m: flatness.expected_sharpness(m, loss_fn, BATCHES, draws=2.5), ValueError, "draws must be an integer"),
        (lambda m: flatness.worst_case_sharpness(m, loss_fn, BATCHES, rho=True), ValueError, "rho must be"),
        (lambda m: flatness.worst_case_sharpness(m, loss_fn, BATCHES, steps=True), ValueError, "steps must be an integer"),
        (lambda m: flatness.hessian_trace(m, loss_fn, BATCHES, draws="8"), ValueError, "draws must be an integer"),
        (lambda m: flatness.hessian_top_eigenvalue(m, loss_fn, BATCHES, max_iterations=True), ValueError, "max_iterations"),
        (lambda m: flatness.loss_curve(m, loss_fn, BATCHES, span=True), ValueError, "span must be"),
        (lambda m: flatness.loss_surface(m, loss_fn, BATCHES, points=5.0), ValueError, "points must be an integer"),
        (lambda m: flatness.sigma_range_test(m, loss_fn, BATCHES, sigmas=[True]), ValueError, "rising"),
    ],
)
def test_errors_say_what_to_do(call, error, match):
    model = lora_mlp()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        call(model)
    if match != "requires_grad_":
        assert_as_it_was(model, before)


def _detached(model, batch):
    return loss_fn(model, batch).detach()


def _frozen(model):
    return model.requires_grad_(False)
