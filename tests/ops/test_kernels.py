"""The Triton kernels against the reference twin, on a CUDA device; without one, small cases in Triton's interpreter."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from helpers import bits, lora_mlp
from made_weights import factors, looked_at, weight_view
from torch import nn

from flatopt import FlatPerturbOptimizer, ops
from flatopt.core.weight import WeightUpdate, WeightView
from flatopt.ops.norms import standard_deviations
from flatopt.ops.reference import standard_deviation, toggled
from flatopt.ops.reversible import grid
from flatopt.ops.triton import TritonBackend

pytest.importorskip("triton", minversion="3.2", reason="the kernels need Triton 3.2")

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIGMA, SEED, SCALING = 0.05, 3, 2.0

runs = (
    pytest.mark.gpu
    if DEVICE == "cuda"
    else pytest.mark.skipif(not INTERPRETED, reason="no CUDA device; these run again in Triton's interpreter below")
)
gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")


@pytest.mark.timeout(1800)
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run as they are")
def test_the_tests_below_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


class Kernels:
    """What was perturbed by the kernels: their plans, in the order they were made."""

    def __init__(self):
        self.plans = []

    @property
    def views(self):
        return self.plans[-1].views if self.plans else []

    @property
    def stds(self):
        return [std.cpu() for std in self.plans[-1]._stds]


@pytest.fixture
def kernels(monkeypatch):
    made, make = Kernels(), TritonBackend.plan

    def plan(*args):
        made.plans.append(make(*args))
        return made.plans[-1]

    monkeypatch.setattr(TritonBackend, "plan", plan)
    return made


class LowRank(nn.Module):
    """A frozen weight with factors B A of rank r; 0: none at all."""

    def __init__(self, weight, r, factor_dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        rows, fan_in = weight.shape[0], weight[0].numel()
        self.A = nn.Parameter(0.3 * torch.randn(r, fan_in, device=weight.device).to(factor_dtype))
        self.B = nn.Parameter(0.02 * torch.randn(rows, r, device=weight.device).to(factor_dtype))

    def low_rank_base(self):
        return self.weight

    def low_rank_delta(self):
        return self.B, self.A, SCALING


def gaussian(*shape, dtype, scale=0.02):
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)


def strange(rows, columns, dtype):
    weight = gaussian(rows, columns, dtype=dtype)
    weight[0, :5] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    weight[1] = 0.0
    weight[2, :3] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 4])
    return weight


# name -> (weight, rank): aligned or not, odd, one row, one column, transposed, every other row, conv kernels
LAYOUTS = {
    "aligned": (lambda dtype: gaussian(40, 512, dtype=dtype), 8),
    "odd": (lambda dtype: gaussian(19, 333, dtype=dtype), 3),
    "rank 20": (lambda dtype: gaussian(16, 128, dtype=dtype), 20),
    "rank 64": (lambda dtype: gaussian(70, 128, dtype=dtype), 64),
    "rank 65": (lambda dtype: gaussian(70, 128, dtype=dtype), 65),
    "rank 0": (lambda dtype: gaussian(20, 128, dtype=dtype), 0),
    "one row": (lambda dtype: gaussian(1, 1000, dtype=dtype), 2),
    "one column": (lambda dtype: gaussian(37, 1, dtype=dtype), 1),
    "transposed": (lambda dtype: gaussian(64, 24, dtype=dtype).t(), 4),
    "strided": (lambda dtype: gaussian(24, 80, dtype=dtype)[::2, 8:72], 4),
    "unaligned": (lambda dtype: gaussian(8 * 64 + 1, dtype=dtype)[1:].view(8, 64), 4),
    "conv": (lambda dtype: gaussian(12, 8, 3, 3, dtype=dtype), 4),
    "channels_last": (lambda dtype: gaussian(12, 8, 3, 3, dtype=dtype).to(memory_format=torch.channels_last), 4),
}


def optimizer_for(*modules, **options):
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    options = {"schedule": "constant", "sigma": SIGMA, "seed": SEED, **options}
    return FlatPerturbOptimizer(torch.optim.SGD(parameters, lr=0.0), [{"modules": modules}], **options)


@torch.no_grad()
def reference(view, clean):
    """What the twin makes of the weight, on the CPU, its std and the update."""
    module, rows_of = view.weight.owner, view.weight.rows
    update = (SCALING * module.B.double() @ module.A.flatten(1).double()).cpu()
    weight = clean.cpu()
    update = torch.empty_like(weight, dtype=torch.float64).copy_(update.view(weight.shape))  # strides and all
    std = standard_deviation(rows_of(weight), rows_of(update), SIGMA)
    z = ops.normals(ops.sub_key(ops.step_key(SEED, 0, 0), view.index), *rows_of(weight).shape)
    return toggled(rows_of(weight), *grid(std.float(), SIGMA, weight.dtype), z), std, rows_of(update)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_the_references_and_restoring_is_exact(kernels, dtype):
    modules = [LowRank(make(dtype), r).to(DEVICE) for make, r in LAYOUTS.values()]
    clean = [module.weight.detach().clone(memory_format=torch.preserve_format) for module in modules]
    optimizer = optimizer_for(*modules)
    optimizer.perturb()
    assert len(kernels.views) == len(modules)
    for name, view, found, before in zip(LAYOUTS, kernels.views, kernels.stds, clean):
        expected, std, update = reference(view, before)
        rows, before = view.rows.cpu(), view.weight.rows(before).cpu()
        # A is rounded to W's dtype, or to tf32, by truncation at worst: errors of W's and BA's sizes, however they cancel
        sizes = standard_deviation(before, torch.zeros(()), SIGMA) + standard_deviation(update, torch.zeros(()), SIGMA)
        assert ((found.double().square() - std.square()).abs() <= 8e-3 * sizes.square()).all(), name
        moved, should = (rows - before).double(), (expected - before).double()
        off = (moved.abs() - should.abs()).abs() > 0.01 * std + 1e-6 * before.abs()
        # where w/a is an integer but for rounding, the sides may differ; a step more or less where |z| is at its edge
        assert off.sum() <= 0.02 * off.numel() + 2, (name, off.float().mean())
        assert (moved * should < 0).sum() <= 0.05 * off.numel() + 2, name
        assert (moved != 0).sum() >= 0.7 * off.numel() - 4, name
    optimizer.restore()
    for name, module, before in zip(LAYOUTS, modules, clean):
        assert torch.equal(bits(module.weight), bits(before)), name


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["copy", "subtract"])
def test_plainly_added_noise_is_the_references(kernels, dtype, mode):
    layouts = LAYOUTS if DEVICE == "cuda" else ("odd", "transposed", "unaligned", "conv")  # the interpreter is slow
    modules = [LowRank(make(dtype), r).to(DEVICE) for make, r in map(LAYOUTS.get, layouts)]
    modules.append(LowRank(strange(20, 64, dtype), 4))
    clean = [module.weight.detach().clone(memory_format=torch.preserve_format) for module in modules]
    optimizer = optimizer_for(*modules, restore=mode)
    optimizer.perturb()
    assert len(kernels.views) == len(modules)
    for view, std, before in zip(kernels.views, kernels.stds, clean):
        rows, before = view.rows.cpu().double(), view.weight.rows(before).cpu().double()
        z = ops.normals(ops.sub_key(ops.step_key(SEED, 0, 0), view.index), *rows.shape).double()
        whole = before.isfinite().all(1)  # a row with inf or NaN gets no noise
        assert torch.equal(rows[~whole].nan_to_num(7.0), before[~whole].nan_to_num(7.0))
        expected = (before + z * std.double())[whole]
        # the functions are good to 2^-18, the sum is rounded to W's dtype
        error = 2**-18 * std.double()[whole] + torch.finfo(dtype).eps * expected.abs()
        assert ((rows[whole] - expected).abs() <= error + torch.finfo(dtype).tiny).all()
    perturbed = [module.weight.detach().clone() for module in modules]
    optimizer.restore()
    for module, before, moved in zip(modules, clean, perturbed):
        if mode == "copy":
            assert torch.equal(bits(module.weight), bits(before))
        else:  # rounded twice (the interpreter cuts bf16 off)
            now, before, moved = (t.detach().double()[moved.isfinite()] for t in (module.weight, before, moved))
            bound = torch.finfo(dtype).eps * (before.abs() + moved.abs()) + torch.finfo(dtype).tiny
            assert ((now - before).abs() <= bound).all()


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", [1e-4, 0.05, 2.0] if DEVICE == "cuda" else [0.05])
def test_odd_bits_come_back(kernels, dtype, sigma):
    modules = [LowRank(strange(20, 64, dtype), 4), LowRank(strange(9, 33, dtype).t().contiguous().t(), 2)]
    clean = [module.weight.detach().clone() for module in modules]
    optimizer = optimizer_for(*modules, sigma=sigma)
    for _ in range(3):
        optimizer.perturb()
        optimizer.restore()
        for module, before in zip(modules, clean):
            assert torch.equal(bits(module.weight), bits(before))
        optimizer.step()
    assert kernels.plans


@runs
@pytest.mark.parametrize("kind", ["layer", "isotropic", "dense", "element", "fp64"])
def test_what_the_kernels_do_not_compute_is_computed_by_torch(kernels, kind):
    weight = gaussian(24, 96, dtype=torch.float64 if kind == "fp64" else torch.float32)
    module = LowRank(weight, 4)
    if kind == "dense":
        module.low_rank_delta = None
        LowRankDense = type("LowRankDense", (LowRank,), {"low_rank_delta": lambda self: SCALING * self.B @ self.A})
        module = LowRankDense(weight, 4)
    clean = weight.detach().clone()
    optimizer = optimizer_for(module, noise=kind if kind in ("layer", "isotropic", "element") else "filter")
    optimizer.perturb()
    assert bool(kernels.plans) == (kind not in ("element", "fp64"))
    eps = (module.weight - clean).double()
    merged = clean.double() + (SCALING * module.B @ module.A).double()
    if kind == "element":
        z = (eps / (SIGMA * clean)).flatten()
    elif kind in ("layer", "isotropic"):
        z = (eps / (SIGMA * merged.square().mean().sqrt())).flatten()
    else:
        z = (eps / (SIGMA * merged.square().mean(1, keepdim=True).sqrt())).flatten()
    assert 0.85 < z.std() < 1.1  # 2304 draws: +-.06 at four sigma, and some weights that stay
    optimizer.restore()
    assert torch.equal(bits(module.weight), bits(clean))


@runs
def test_a_dense_update_is_made_once_a_step(kernels):
    made = []

    class LowRankDense(LowRank):
        def low_rank_delta(self):
            made.append(SCALING * self.B @ self.A)  # as large as W, and as slow
            return made[-1]

    optimizer = optimizer_for(LowRankDense(gaussian(24, 96, dtype=torch.float32), 4))
    made.clear()
    for step in range(3):
        optimizer.perturb()
        optimizer.step()
        assert kernels.plans
        assert len(made) == step + 1


@runs
def test_noise_does_not_depend_on_the_launch(monkeypatch):
    from flatopt.ops.triton import launch

    module = LowRank(gaussian(20, 264, dtype=torch.bfloat16), 8)
    clean = module.weight.detach().clone()
    seen = []
    for rows, pairs, warps in [(16, 64, 4), (8, 32, 2), (32, 128, 8)]:
        for name, value in zip(("ROWS", "PAIRS", "WARPS"), (rows, pairs, warps)):
            monkeypatch.setattr(launch, name, value)
        optimizer = optimizer_for(module)
        optimizer.perturb()
        seen.append(bits(module.weight).clone())
        optimizer.restore()
        optimizer.detach()
    strided = LowRank(torch.empty(20, 2 * 264, dtype=torch.bfloat16, device=DEVICE)[:, ::2].copy_(clean), 8)
    strided.A, strided.B = module.A, module.B
    optimizer = optimizer_for(strided)
    optimizer.perturb()
    assert all(torch.equal(other, seen[0]) for other in seen[1:])
    # another order of summation may change the last bit of a row's std, and so where a rare element is rounded to
    assert (bits(strided.weight) == seen[0]).double().mean() > 0.995


@runs
@pytest.mark.parametrize("columns", [1 << 17, 40_001] if DEVICE == "cuda" else [16_641])  # the interpreter is slow
def test_rows_that_several_programs_share(kernels, columns):
    module = LowRank(gaussian(2 if DEVICE == "cuda" else 1, columns, dtype=torch.bfloat16), 2)
    clean = module.weight.detach().clone()
    optimizer = optimizer_for(module)
    optimizer.perturb()
    expected, std, _ = reference(kernels.views[0], clean)
    torch.testing.assert_close(kernels.stds[0].double(), std, rtol=4e-3, atol=0)
    moved, should = ((w.detach().cpu() - clean.cpu()).double() for w in (module.weight, expected))
    assert (moved.abs() - should.abs()).abs().gt(0.01 * std).double().mean() < 0.02
    for part in moved.split(1 << 14, dim=1):  # SPAN pairs of columns: none left out, none moved twice
        assert (part != 0).double().mean() > 0.8
    optimizer.restore()
    assert torch.equal(bits(module.weight), bits(clean))


def written(layer):
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)


def moved(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data.clone()


def replaced(layer):
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach() * 3)


def stepped(layer):
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.weight.mul_(1.5)


def cut(layer):
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = A.data[:1], B.data[:, :1]


CHANGES = {
    "nothing": lambda layer: None,
    "an optimizer's step": stepped,
    "scaling": lambda layer: layer.set_scale("default", 3.0),
    "another adapter": lambda layer: layer.set_adapter("other"),
    "two adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "no adapter": lambda layer: layer.enable_adapters(False),
    "W written": written,
    "other memory": moved,
    "A replaced": replaced,
    "a lower rank": cut,
    "another dtype": lambda layer: layer.to(torch.bfloat16),
}


def of_interest(change, dora):
    """In the interpreter, which is slow: of DoRA, what its table has to follow."""
    return DEVICE == "cuda" or not dora or change in ("an optimizer's step", "W written")


@runs
@pytest.mark.parametrize(("change", "dora"), [(c, d) for c in CHANGES for d in (False, True) if of_interest(c, d)])
def test_the_table_is_kept_while_the_model_stays_and_follows_it_when_it_changes(kernels, change, dora):
    model = lora_mlp(use_dora=dora)
    model.add_adapter("other", model.peft_config["default"])
    model.to(DEVICE)
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    optimizer = optimizer_for(model)
    for _ in range(2):
        optimizer.perturb()
        optimizer.step()
    kept = kernels.plans[-1]._launches
    CHANGES[change](layers[0])
    weights = optimizer.perturb_groups[0]["targets"]
    updates = weights[0].adapter.updates(weights)
    views = [looked_at(WeightView(weight, 1, update=update)) for weight, update in zip(weights, updates)]
    expected = standard_deviations(views, "filter", SIGMA, views)
    clean = [layer.base_layer.weight.detach().clone() for layer in layers]
    optimizer.perturb()
    if change in ("nothing", "an optimizer's step"):
        assert kernels.plans[-1]._launches is kept
    elif not dora:  # DoRA's row norms are its magnitudes: of A, B and the scale its table says nothing
        assert kernels.plans[-1]._launches is not kept
    by_weight = {}
    for plan in {id(plan): plan for plan in kernels.plans[-2:]}.values():  # of another dtype: another launch
        by_weight.update({id(view.weight): std for view, std in zip(plan.views, plan._stds)})
    for layer, weight, std, before in zip(layers, weights, expected, clean, strict=True):
        rtol = 2e-3 if before.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(by_weight[id(weight)], std, rtol=rtol, atol=0)
        assert not torch.equal(bits(layer.base_layer.weight), bits(before))
    optimizer.restore()
    for layer, before in zip(layers, clean):
        assert torch.equal(bits(layer.base_layer.weight), bits(before))


@runs
def test_a_deleted_model_is_not_kept_by_its_table():
    gc.collect()
    gc.disable()  # a cycle would wait for it
    try:
        view = weight_view(gaussian(16, 64, dtype=torch.float32))
        (plan,) = ops.plan([view], "filter", "reversible")
        for key in ((1, 2), (3, 4)):
            plan.fill_std(SIGMA)
            plan.perturb(key)
            plan.restore()
            plan.release()
        weight = weakref.ref(view.parameter)
        view.weight.owner.weight = None
        view.parameter = view.tensor = view.rows = None
        assert weight() is None
    finally:
        gc.enable()


@runs
def test_the_table_is_kept_for_updates_told_anew():
    """A module of one's own tells its factors each step: new objects, the same tensors."""
    A, B = (gaussian(*shape, dtype=torch.float32, scale=0.3) for shape in ((4, 64), (16, 4)))
    view = weight_view(gaussian(16, 64, dtype=torch.float32), WeightUpdate(((B, A, SCALING),)))
    (plan,) = ops.plan([view], "filter", "reversible")
    plan.fill_std(SIGMA)
    kept = plan._launches
    B.mul_(2)
    view.update = WeightUpdate(((B, A, SCALING),))
    plan.fill_std(SIGMA)
    assert plan._launches is kept
    expected = SIGMA * (view.rows + SCALING * B @ A).square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(plan._stds[0], expected, rtol=2e-3, atol=0)
    view.update = WeightUpdate(((B, A, 2 * SCALING),))
    plan.fill_std(SIGMA)
    assert plan._launches is not kept


@runs
@pytest.mark.parametrize("change", ["merged", "trainable"])
def test_a_weight_that_may_no_longer_be_perturbed_is_refused(kernels, change):
    model = lora_mlp().to(DEVICE)
    optimizer = optimizer_for(model)
    optimizer.perturb()
    optimizer.step()
    layer = next(module for module in model.modules() if hasattr(module, "base_layer"))
    layer.merge() if change == "merged" else layer.base_layer.weight.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=change):
        optimizer.perturb()
    assert all(torch.equal(bits(p), bits(before[name])) for name, p in model.named_parameters())


@runs
def test_a_graph_that_saved_the_perturbed_weight_notices_the_restore(kernels):
    module = LowRank(gaussian(16, 64, dtype=torch.float32), 4)
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    optimizer = optimizer_for(module)
    optimizer.perturb()
    y = (x @ module.weight.t()).sum()
    optimizer.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@runs
def test_a_write_to_the_perturbed_weight_raises(kernels):
    module = LowRank(gaussian(16, 64, dtype=torch.float32), 4)
    optimizer = optimizer_for(module)
    optimizer.perturb()
    with torch.no_grad():
        module.weight[0, 0] = 1.0
    with pytest.raises(RuntimeError, match="was written to while"):
        optimizer.restore()


class Compiles:
    """As a function of triton.jit: ``kernel[grid](...)`` launches and gives the compiled kernel, which is called alike."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.calls.append((grid, arguments, "compiled"))


@pytest.mark.parametrize("calls_compiled", [True, False])
def test_a_kernel_is_looked_up_once(monkeypatch, calls_compiled):
    from flatopt.ops.triton import launch

    monkeypatch.setattr(launch, "CALLS_COMPILED", calls_compiled)
    jit = Compiles()
    kernel = launch.Kernel(jit, 7, ("bf16", 16), num_warps=4)
    tables = [torch.zeros(1) for _ in range(3)]  # the address is that of the tensor given, not of one before
    for number, table in enumerate(tables):
        kernel(table, number)
    again = "compiled" if calls_compiled else {"num_warps": 4}
    given = [table.data_ptr() if calls_compiled else table for table in tables]
    grid, constants = (7, 1, 1), ("bf16", 16)
    assert jit.calls == [
        (grid, (tables[0], 0, *constants), {"num_warps": 4}),
        (grid, (given[1], 1, *constants), again),
        (grid, (given[2], 2, *constants), again),
    ]


@gpu
@pytest.mark.gpu
def test_a_compiled_kernel_is_launched_on_the_current_stream():
    from flatopt.ops.triton import launch

    kernel = launch._current_stream(torch.zeros(1, device=DEVICE))
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        assert kernel() == other.cuda_stream
    assert kernel() == torch.cuda.current_stream().cuda_stream


@runs
def test_scratch_that_is_kept_and_not_kept_gives_the_same(monkeypatch):
    from flatopt.ops.triton import launch

    found = []
    for limit in (launch.SCRATCH_KEPT, 0):
        monkeypatch.setattr(launch, "SCRATCH_KEPT", limit)
        torch.manual_seed(0)
        A, B = (gaussian(*shape, dtype=torch.float32, scale=0.3) for shape in ((4, 64), (16, 4)))
        view = weight_view(gaussian(16, 64, dtype=torch.float32), WeightUpdate(((B, A, SCALING),)))
        (plan,) = ops.plan([view], "filter", "reversible")
        for _ in range(2):
            plan.fill_std(SIGMA)
            found.append(plan._stds[0].clone())
            A.mul_(-2)  # what the scratch holds is of the step before
        assert (plan._launches[0]._scratch is None) == (limit == 0)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


@runs
@pytest.mark.parametrize("on_host", [True, False])
def test_each_mark_is_read_once(on_host):
    from flatopt.ops.fingerprint import Flags

    flags = Flags(3, torch.device(DEVICE), on_host)
    assert flags.read(wait=True) == []
    flags.set[1] = 1
    assert flags.read(wait=True) == []  # nothing was sent
    flags.send()
    assert flags.read(wait=True) == [1]
    assert flags.read(wait=True) == []
    flags.set[2] = 1
    flags.send()
    assert flags.read(wait=True) == [2]
    flags.send()
    assert flags.read(wait=True) == []


@runs
def test_a_step_is_four_launches(monkeypatch):
    """Factors, norms, perturb; restore. What somebody wrote to is put right in the last."""
    from flatopt.ops.triton import launch

    launched, call = [], launch.Kernel.__call__
    monkeypatch.setattr(launch.Kernel, "__call__", lambda self, *args: (launched.append(self), call(self, *args))[1])
    views = [weight_view(gaussian(16, 64, dtype=torch.float32), factors(16, 64, device=DEVICE), i) for i in (1, 2)]
    clean = [view.tensor.clone() for view in views]
    (plan,) = ops.plan(views, "filter", "reversible")
    plan.fill_std(SIGMA)
    plan.perturb((1, 2))
    views[0].tensor.copy_(clean[1])
    plan.restore()
    assert len(launched) == 4
    assert plan.written(wait=True) == [views[0]]
    assert all(torch.equal(bits(view.tensor), bits(clean[1])) for view in views)


# --- a GPU's own ----------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(kernels):
    modules = [LowRank(gaussian(64, 256, dtype=torch.bfloat16), 8) for _ in range(3)]
    optimizer = optimizer_for(*modules)
    optimizer.perturb()  # compiles, and finds the square sums of W
    optimizer.restore()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.perturb()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_2_to_the_31_elements(kernels, dtype):
    weight = torch.empty(2**19 + 16, 4104, device="cuda", dtype=dtype).normal_(0, 0.02)
    module = LowRank(weight, 8)
    clean = weight.clone()
    optimizer = optimizer_for(module)
    optimizer.perturb()
    last = (module.weight[-64:] - clean[-64:]).float()
    std = SIGMA * (clean[-64:].float() + SCALING * (module.B[-64:] @ module.A)).square().mean(1, keepdim=True).sqrt()
    assert 0.9 < (last / std).std() < 1.02
    optimizer.restore()
    view = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    assert all(torch.equal(a, b) for a, b in zip(module.weight.view(view).chunk(64), clean.view(view).chunk(64)))


def standardised(sigma=1.0, dtype=torch.float32, steps=1, shape=(2048, 4096), layers=2):
    """eps/std, float64 (steps, layers, *shape), of constant rows, all of whose elements can move."""
    # far from 0 and from the next binade, so that nothing stays and what is measured is the noise alone
    modules = [LowRank(torch.full(shape, 1.5, device="cuda", dtype=dtype), 1) for _ in range(layers)]
    for module in modules:
        nn.init.zeros_(module.B)
    optimizer = optimizer_for(*modules, sigma=sigma)
    seen = []
    for _ in range(steps):
        optimizer.perturb()
        seen.append(torch.stack([(m.weight.detach().double() - 1.5) / (1.5 * sigma) for m in modules]))
        optimizer.step()
    return torch.stack(seen)


@gpu
@pytest.mark.gpu
def test_noise_is_gaussian(kernels):
    z = standardised(sigma=0.01).flatten()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.std() - 1) < 4 / (2 * n) ** 0.5 + 2e-4  # 16-bit cells, and rounding to the grid
    assert abs((z / z.std()).pow(4).mean() - 3) < 4 * (24 / n) ** 0.5 + 2e-3
    assert abs((z / z.std()).pow(3).mean()) < 4 * (6 / n) ** 0.5
    for tail in (1.0, 2.0, 3.0, 4.0):
        p = torch.special.erfc(torch.tensor(tail / 2**0.5, dtype=torch.float64)).item()
        assert abs((z.abs() > tail).double().mean() - p) < 4 * (p / n) ** 0.5 + 0.02 * p, tail
    assert z.abs().max() < 4.9


@gpu
@pytest.mark.gpu
def test_noise_is_independent_across_steps_layers_rows_and_columns(kernels):
    z = standardised(sigma=0.01, steps=2)
    first = z[0, 0]
    pairs = {
        "steps": (first, z[1, 0]),
        "layers": (first, z[0, 1]),
        "rows": (first[1:], first[:-1]),
        "next column": (first[:, 1:], first[:, :-1]),
        "column in the pair": (first[:, 0::2], first[:, 1::2]),
        "pairs": (first[:, 2:], first[:, :-2]),
        "columns 2048 apart": (first[:, 2048:], first[:, :2048]),
    }
    for name, (x, y) in pairs.items():
        for power in (1, 2):  # correlated squares would be dependent sizes
            a, b = (t.pow(power) - t.pow(power).mean() for t in (x, y))
            assert abs((a * b).mean() / (a.std() * b.std())) < 4.5 / x.numel() ** 0.5, (name, power)


@gpu
@pytest.mark.gpu
def test_training_on_the_gpu_leaves_w_as_it_was():
    from peft import LoraConfig, get_peft_model

    for options in ({}, {"use_dora": True}):
        base = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).to("cuda", torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False, **options))
        clean = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        optimizer = FlatPerturbOptimizer(inner, model, sigma=0.1, total_steps=20)
        x, y = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16), torch.randint(8, (256,), device="cuda")
        for step in range(20):
            loss = nn.functional.cross_entropy(model(x).float(), y)
            assert optimizer.is_perturbed == (step >= 0)
            loss.backward()
            with torch.no_grad():  # in the midst of a step
                model(x[:2])
            optimizer.step()
            optimizer.zero_grad()
            now = dict(model.named_parameters())
            assert all(torch.equal(bits(now[name]), bits(w)) for name, w in clean.items())
        assert loss.isfinite()
