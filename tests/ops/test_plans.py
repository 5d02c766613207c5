"""Every backend is held to the same: the reference's standard deviations and bits, every bit back, and nothing lost.

The kernels run on a CUDA device; without one, these tests run once more in Triton's interpreter.
"""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import bits
from made_weights import Plans, clones, factors, gaussian, looked_at, weight_view
from torch.utils._python_dispatch import TorchDispatchMode

from flatopt import ops
from flatopt.core.weight import WeightUpdate
from flatopt.ops import backend, reference
from flatopt.ops.noise import weight_key
from flatopt.ops.reversible import grid
from flatopt.ops.rounding import rounding
from flatopt.ops.torch_backend import TorchBackend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
KEY, OTHER_KEY = ops.step_key(3, 1, 0), ops.step_key(3, 2, 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


def cases():
    """(backend, device) of all that is registered and can run here; in the interpreter, of what it interprets."""
    views = [weight_view(torch.zeros(2, 2, device=device)) for device in ("cpu", *(["cuda"] if CUDA else []))]
    found = [(b.name, v.tensor.device.type) for v in views for b in backend.BACKENDS if b.supports(v, "filter") is None]
    return [case for case in found if case[0] != "torch"] if INTERPRETED else found


@pytest.fixture(params=cases(), ids="-".join)
def device(request, monkeypatch):
    name, device = request.param
    monkeypatch.setattr(backend, "BACKENDS", [b for b in backend.BACKENDS if b.name == name])
    return device


def supported(device, noise="filter", dtype=torch.float32):
    return backend.BACKENDS[0].supports(weight_view(torch.zeros(2, 2, dtype=dtype, device=device)), noise) is None


@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED or CUDA, reason="the tests below run as they are")
def test_the_tests_below_in_tritons_interpreter():
    pytest.importorskip("triton", minversion="3.2", reason="the kernels need Triton 3.2")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


LAYOUTS = {
    "rows": lambda dtype: (gaussian(19, 64, dtype=dtype), "rows"),
    "odd": lambda dtype: (gaussian(9, 33, dtype=dtype), "rows"),
    "columns": lambda dtype: (gaussian(24, 16, dtype=dtype), "columns"),
    "experts": lambda dtype: (gaussian(3, 6, 16, dtype=dtype), "experts"),
    "conv": lambda dtype: (gaussian(6, 4, 3, 3, dtype=dtype), "rows"),
    "channels_last": lambda dtype: (gaussian(6, 4, 3, 3, dtype=dtype).to(memory_format=torch.channels_last), "rows"),
    "strided": lambda dtype: (gaussian(24, 80, dtype=dtype)[::2, 8:72], "rows"),
    "one row": lambda dtype: (gaussian(1, 100, dtype=dtype), "rows"),
    "vector": lambda dtype: (gaussian(40, dtype=dtype), "rows"),
}


def views_of_all_layouts(dtype, device):
    views = []
    for index, make in enumerate(LAYOUTS.values(), 1):
        tensor, layout = make(dtype)
        view = weight_view(tensor.to(device), index=index, layout=layout)
        view.update = factors(*view.rows.shape, seed=index, device=device)
        views.append(view)
    return views


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_references(device, dtype):
    if not supported(device, dtype=dtype):
        pytest.skip("not a dtype of this backend")
    views, sigma = views_of_all_layouts(dtype, device), 0.05
    plans, clean = Plans(views), [view.rows.clone() for view in views]
    plans.fill_std(sigma)
    plans.perturb(KEY)
    for name, view, before in zip(LAYOUTS, views, clean):
        ((B, A, s),) = view.update.factors
        before, after = before.cpu(), view.rows.cpu()
        std = reference.standard_deviation(before, s * B.cpu().double() @ A.cpu().double(), sigma)
        z = ops.normals(weight_key(KEY, view.index), *before.shape)
        rho, delta, step = grid(std.float(), sigma, dtype)
        torch.testing.assert_close(step.double(), reference.grid_step(std, sigma, dtype))
        expected = reference.toggled(before, rho, delta, step, z)
        # a step more or less where |z| is at its edge, another side where w/a is an integer but for rounding
        off = ((after.double() - expected.double()).abs() > 0.01 * std + 1e-6 * before.double().abs()).double().mean()
        assert off <= (0.0 if backend.BACKENDS[0].name == "torch" and device == "cpu" else 0.06), name
        assert (after != before).double().mean() > 0.7, name
    plans.restore()
    assert not plans.written()
    assert all(torch.equal(bits(view.rows), bits(before)) for view, before in zip(views, clean))


@pytest.mark.parametrize("mode", ["reversible", "copy", "subtract"])
@pytest.mark.parametrize("noise", ops.NOISES)
def test_size_and_shape_of_every_noise(device, noise, mode):
    """W's move in units of the noise's own standard deviation is the normals, rounded."""
    if not supported(device, noise):
        pytest.skip("not a noise of this backend")
    views, sigma = views_of_all_layouts(torch.float32, device), 0.05
    plans, clean = Plans(views, noise, mode), [view.rows.double().cpu() for view in views]
    plans.fill_std(sigma)
    plans.perturb(KEY)
    merged = [w + u[2] * u[0].cpu().double() @ u[1].cpu().double() for w, v in zip(clean, views) for u in v.update.factors]
    every = torch.cat([m.flatten() for m in merged]).square().mean().sqrt()
    for name, view, before, whole in zip(LAYOUTS, views, clean, merged):
        rms = {
            "filter": whole.square().mean(1, keepdim=True).sqrt(),
            "layer": whole.square().mean().sqrt(),
            "isotropic": every,
            "element": before.abs(),
        }[noise]
        z = ops.normals(weight_key(KEY, view.index), *before.shape).double()
        epsilon = (view.rows.cpu().double() - before) / (sigma * rms)
        if mode == "reversible":
            moved = epsilon != 0
            assert moved.double().mean() > 0.7, name
            assert (epsilon[moved].abs() - z[moved].abs()).abs().mean() < 0.03, name
        else:
            torch.testing.assert_close(epsilon, z, rtol=3e-3, atol=3e-4)
    plans.restore()
    for view, before in zip(views, clean):
        if mode == "subtract":
            torch.testing.assert_close(view.rows.cpu().double(), before, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(view.rows.cpu().double(), before)


def strange(dtype, device):
    tensor = gaussian(20, 64, dtype=dtype, device=device)
    tensor[0, :5] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    tensor[1] = 0.0
    tensor[2, :3] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 4])
    return tensor


@pytest.mark.parametrize("sigma", [1e-4, 0.05, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", ops.NOISES)
def test_odd_bits_come_back(device, dtype, sigma, noise):
    if not supported(device, noise, dtype) or (INTERPRETED and noise != "filter"):
        pytest.skip("not of this backend, or too slow")
    views = [weight_view(strange(dtype, device)), weight_view(strange(dtype, device).t().contiguous().t(), index=2)]
    plans, clean = Plans(views, noise), clones(views)
    plans.fill_std(sigma)
    for key in (KEY, OTHER_KEY):
        plans.perturb(key)
        plans.restore()
        assert not plans.written()
        assert all(torch.equal(bits(view.tensor), bits(before)) for view, before in zip(views, clean))


@pytest.mark.parametrize("mode", ops.RESTORES)
def test_standard_deviations_of_updates_the_kernels_do_not_know(device, mode):
    """Dense, two factors, DoRA's norms, several adapters of DoRA: the same as by the reference."""
    rows, columns = 12, 48
    base, one, two = gaussian(rows, columns), factors(rows, columns), factors(rows, columns, seed=7)
    product = [s * B.double() @ A.double() for update in (one, two) for B, A, s in update.factors]
    norms, alpha = gaussian(rows, seed=3).abs() + 1, gaussian(rows, seed=4).abs() + 1
    updates = {
        "dense": (WeightUpdate(dense=product[0].float()), base.double() + product[0]),
        "two": (WeightUpdate((*one.factors, *two.factors)), base.double() + product[0] + product[1]),
        "norms": (WeightUpdate(row_norm=norms), norms.double().unsqueeze(1).expand(-1, columns) / columns**0.5),
        "alpha": (WeightUpdate(one.factors, alpha=alpha), alpha.double().unsqueeze(1) * base.double() + product[0]),
        "none": (WeightUpdate(), base.double()),
    }

    def there(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    views = []
    for index, (update, _) in enumerate(updates.values(), 1):
        moved = WeightUpdate(tuple(tuple(map(there, f)) for f in update.factors), *map(there, update[1:]))
        views.append(weight_view(base.clone().to(device), moved, index))
    plans = Plans(views, restore=mode)
    plans.fill_std(0.1)
    plans.perturb(KEY)
    for view, (name, (_, merged)) in zip(views, updates.items()):
        z = ops.normals(weight_key(KEY, view.index), rows, columns).double()
        std = reference.standard_deviation(merged, torch.zeros(()), 0.1)
        epsilon = view.rows.cpu().double() - base.double()
        moved = epsilon != 0
        assert (epsilon[moved].abs() - (z * std)[moved].abs()).abs().max() < 0.02 * std.max(), name
    plans.restore()
    assert not plans.written()


def test_rows_of_a_shard_get_the_noise_they_have_in_the_whole(device):
    whole = gaussian(20, 64, device=device)
    views = [weight_view(whole.clone()), weight_view(whole[8:].clone(), first_row=8)]
    after = []
    for view in views:
        plans = Plans([view])
        plans.fill_std(0.1)
        plans.perturb(KEY)
        after.append(view.tensor.clone())
    assert torch.equal(after[0][8:], after[1])


# --- what stands in memory ---------------------------------------------------------------------------------------------


def perturbed_pair(device, mode="reversible", dtype=torch.float32, shape=(24, 64)):
    views = [weight_view(gaussian(*shape, dtype=dtype, seed=i, device=device), index=i) for i in (1, 2)]
    clean, plans = clones(views), Plans(views, restore=mode)
    plans.fill_std(0.1)
    plans.perturb(KEY)
    return views, clean, plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["reversible", "subtract"])
def test_a_weight_written_to_is_told_and_keeps_what_was_written(device, mode, dtype):
    views, clean, plans = perturbed_pair(device, mode, dtype)
    written = gaussian(24, 64, dtype=dtype, seed=9, device=device)
    views[0].tensor.copy_(written)
    plans.restore()
    assert plans.written() == [views[0]]
    if mode == "reversible":
        assert torch.equal(views[0].tensor, written)
        assert torch.equal(views[1].tensor, clean[1])
    else:
        torch.testing.assert_close(views[0].tensor, written, rtol=1e-2, atol=1e-4)
    assert not plans.written()  # told once
    plans.perturb(OTHER_KEY)
    plans.restore()
    assert not plans.written()


@pytest.mark.parametrize("shape", [(7, 33)] if INTERPRETED else [(24, 64), (7, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_changed_bit_is_noticed(device, dtype, shape):
    """Wherever it is, also where two rows, or two elements of a row, were exchanged."""
    views, _, plans = perturbed_pair(device, dtype=dtype, shape=shape)
    for row, column in [(0, 0), (shape[0] - 1, shape[1] - 1), (3, 17)]:
        views[0].tensor.view({4: torch.int32, 2: torch.int16}[dtype.itemsize])[row, column] ^= 1
        plans.restore()
        assert plans.written() == [views[0]]
        plans.perturb(OTHER_KEY if row else KEY)
        plans.restore()
        plans.perturb(KEY)
    changes = {
        "two rows": lambda t: t[[1, 0, *range(2, len(t))]],
        "two columns": lambda t: t[:, [2, 1, 0, *range(3, t.shape[1])]],
        "all exponents": lambda t: 2 * t,
        "all signs": lambda t: -t,
    }
    for name, change in changes.items():
        views[1].tensor.copy_(change(views[1].tensor.clone()))
        plans.restore()
        assert plans.written() == [views[1]], name
        plans.perturb(KEY)


def test_copy_puts_the_clean_bits_back_whatever_was_written_and_tells(device):
    views, clean, plans = perturbed_pair(device, "copy")
    views[0].tensor.mul_(2)
    plans.restore()
    assert plans.written() == [views[0]]
    assert all(torch.equal(view.tensor, before) for view, before in zip(views, clean))


def test_a_rebuilt_weight_is_put_back_and_not_told(device):
    view = weight_view(gaussian(8, 64, device=device), rebuilt=True)
    clean, plans = view.tensor.clone(), Plans([view], restore="copy")
    plans.fill_std(0.1)
    plans.perturb(KEY)
    view.tensor.mul_(1 + 2**-20)
    plans.restore()
    plans.perturb(KEY)
    view.tensor.mul_(1 + 2**-20)
    plans.restore()
    assert torch.equal(view.tensor, clean)
    assert not plans.written()


@pytest.mark.parametrize("mode", ops.RESTORES)
def test_clean_bits_put_back_by_somebody_are_clean(device, mode):
    """An EMA's swap: store, copy_to, restore."""
    views, clean, plans = perturbed_pair(device, mode)
    views[0].tensor.copy_(clean[0])
    plans.restore()
    assert not plans.written()
    torch.testing.assert_close(
        views[0].tensor, clean[0], rtol=0, atol=1e-7 if mode == "subtract" and device != "cpu" else 1e-8
    )
    if mode != "subtract":
        assert all(torch.equal(view.tensor, before) for view, before in zip(views, clean))


@pytest.mark.parametrize("mode", ["reversible", "copy"])
def test_perturbed_bits_put_back_by_somebody_are_perturbed(device, mode):
    """Suspended for an evaluation; somebody then puts back what it had stored before; the step goes on."""
    views, clean, plans = perturbed_pair(device, mode)
    perturbed = clones(views)
    plans.restore()
    views[0].tensor.copy_(perturbed[0])
    plans.perturb(KEY)
    assert all(torch.equal(view.tensor, after) for view, after in zip(views, perturbed))
    plans.restore()
    assert not plans.written()
    assert all(torch.equal(view.tensor, before) for view, before in zip(views, clean))


@pytest.mark.parametrize(("noise", "mode"), [("filter", "reversible"), ("filter", "copy"), ("int4/32", "copy")])
def test_a_weight_written_to_while_it_stood_clean_is_perturbed_as_it_now_is(device, noise, mode):
    """A checkpoint loaded amid a step."""
    updates = [factors(24, 64, device=device), factors(24, 64, device=device), WeightUpdate()]
    views = [weight_view(gaussian(24, 64, seed=i, device=device), u, i) for i, u in enumerate(updates, 1)]
    plans = Plans(views, noise, mode)
    plans.fill_std(0.5)
    plans.perturb(KEY)
    plans.restore()
    views[0].tensor.copy_(gaussian(24, 64, seed=11, device=device))
    views[2].tensor[5, 7] += 1
    new = clones(views)
    for _ in range(2):
        plans.perturb(KEY)
        assert not any(torch.equal(view.tensor, before) for view, before in zip(views, new))
        plans.restore()
        assert not plans.written()
        assert all(torch.equal(view.tensor, before) for view, before in zip(views, new))
    plans.release()


def test_fingerprint():
    tensor = gaussian(100, 300)
    known = ops.fingerprint(tensor)
    assert known == ops.fingerprint(tensor.clone()) == ops.fingerprint(tensor.t().contiguous().t())
    others = [tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), tensor.roll(1, 1), -tensor, tensor[:-1]]
    assert len({known, *map(ops.fingerprint, others)}) == len(others) + 1
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for size in (1, 3, 1021, 4096, 16383, 16385, 40_000):
            whole = gaussian(size, dtype=dtype)
            seen = {ops.fingerprint(whole)}
            for place in {0, size // 2, size - 1}:
                changed = whole.clone()
                changed[place] += 1
                seen.add(ops.fingerprint(changed))
            assert len(seen) == len({0, size // 2, size - 1}) + 1


# --- an exception anywhere ---------------------------------------------------------------------------------------------


class Raised(Exception):
    pass


class RaiseAt(TorchDispatchMode):
    """Raises at the ``number``-th operation, before it runs or after."""

    def __init__(self, number, after):
        super().__init__()
        self.number, self.after, self.seen = number, after, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen == self.number and not self.after:
            raise Raised
        result = function(*args, **(kwargs or {}))
        if self.seen == self.number:
            raise Raised
        return result


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("during", ["perturb", "restore", "fill_std"])
@pytest.mark.parametrize("mode", ops.RESTORES)
@pytest.mark.parametrize("noise", ops.NOISES)
def test_an_exception_at_any_operation_loses_nothing(device, noise, mode, during, after):
    if not supported(device, noise) or (INTERPRETED and noise != "filter"):
        pytest.skip("not of this backend, or too slow")
    views = [
        weight_view(gaussian(5, 6, device=device), factors(5, 6, device=device)),
        weight_view(gaussian(4, 7, dtype=torch.bfloat16, device=device), index=2),
    ]
    clean = clones(views)
    plans = Plans(views, noise, mode)
    plans.fill_std(0.3)
    plans.perturb(KEY)
    expected = clones(views)
    plans.restore()
    number, raised = 0, True
    while raised:
        number += 53 if INTERPRETED else 1 if noise == "filter" else 3  # the interpreter counts its own, and is slow
        for view, before in zip(views, clean):
            view.tensor.copy_(before)
        plans = Plans(views, noise, mode)
        if during != "fill_std":
            plans.fill_std(0.3)
        if during == "restore":
            plans.perturb(KEY)
        arguments = {"perturb": (KEY,), "restore": (), "fill_std": (0.3,)}[during]
        try:
            with RaiseAt(number, after):
                getattr(plans, during)(*arguments)
            raised = False
        except Raised:
            pass
        if number % 2 == 0 and during != "fill_std":  # or else go on where it broke off
            plans.perturb(KEY)
            for view, want in zip(views, expected):
                if mode == "reversible":
                    assert torch.equal(view.tensor, want)
                else:
                    torch.testing.assert_close(view.tensor, want)
        plans.restore()
        assert not plans.written()
        for view, before in zip(views, clean):
            if mode == "subtract":
                torch.testing.assert_close(view.tensor, before, rtol=1e-2, atol=1e-3)  # drift, not noise
            else:
                assert torch.equal(view.tensor, before), number
        plans.release()
    assert number > 8 or during == "fill_std"


def test_what_needs_clean_weights_says_so(device):
    _, _, plans = perturbed_pair(device)
    for act in (lambda: plans.fill_std(0.1), lambda: plans.perturb(OTHER_KEY), plans.release):
        with pytest.raises(RuntimeError, match=r"layer1.weight and others are perturbed: call restore\(\)"):
            act()
    plans.restore()


# --- formats -----------------------------------------------------------------------------------------------------------

FORMATS = ["int4", "int3/32", "uint4/16", "uint2", "nf4/64", "nf4", "int8/4096"]


def expected_rounded(view, before, form, sigma):
    """What :func:`rounding` gives for the merged weight, and the way there in float64."""
    merged = before.cpu().float()
    for B, A, s in view.update.factors:
        merged = merged + s * (B.cpu().float() @ A.cpu().float())
    if view.update.dense is not None:
        merged = merged + view.update.dense.cpu()
    offset = rounding(form)(merged).double() - merged.double()
    offset[~merged.isfinite().all(1)] = 0
    return before.cpu().double() + sigma * offset


def assert_rounded(views, clean, form, sigma):
    for view, before in zip(views, clean):
        want, got = expected_rounded(view, before, form, sigma), view.rows.cpu().double()
        assert torch.equal(want.isfinite(), got.isfinite())
        ulp = torch.finfo(before.dtype).eps * (2 if INTERPRETED else 1)  # the interpreter cuts bfloat16's bits off
        close = (got - want).abs().nan_to_num(0) <= ulp * want.abs().nan_to_num(0) + 1e-6
        assert (~close).double().mean() <= 0.004, (form, view.index)  # in the middle of two levels but for rounding
        if view.index == 1:
            assert (got != before.cpu().double()).double().mean() > 0.4


def with_strange_rows(views):
    rows = views[0].rows
    rows[2], rows[3, 5], rows[4, 1] = 0, float("inf"), float("nan")
    return views


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_the_roundings(device, form, dtype):
    if INTERPRETED and dtype != torch.float32 and form != "int3/32":
        pytest.skip("on a GPU; the interpreter is slow")
    views, sigma = with_strange_rows(views_of_all_layouts(dtype, device)), 0.7
    plans, clean = Plans(views, form, "copy"), [view.rows.clone() for view in views]
    assert len(plans.plans) == 1
    plans.fill_std(sigma)
    plans.perturb(KEY)
    assert_rounded(views, clean, form, sigma)
    plans.perturb(KEY)  # at what it is, and anew after a reader
    plans.restore()
    plans.perturb(KEY)
    assert_rounded(views, clean, form, sigma)
    plans.restore()
    assert not plans.written()
    assert all(torch.equal(bits(view.rows), bits(before)) for view, before in zip(views, clean))
    plans.release()


def test_updates_of_every_kind_are_rounded(device):
    shape, form = (24, 96), "int4/32"
    dense = WeightUpdate(dense=gaussian(*shape, seed=9, device=device))
    two = WeightUpdate(tuple(f for seed in (1, 7) for f in factors(*shape, seed=seed, device=device).factors))
    updates = [WeightUpdate(), factors(*shape, device=device), two, factors(*shape, r=70, device=device), dense]
    views = [weight_view(gaussian(*shape, seed=i, device=device), u, i) for i, u in enumerate(updates, 1)]
    plans, clean = Plans(views, form, "copy"), clones(views)
    plans.fill_std(1.0)
    plans.perturb(KEY)
    assert_rounded(views, clean, form, 1.0)
    views[1].update, views[2].update = views[3].update, views[0].update  # the adapter, between a closure's evaluations
    plans.restore()
    plans.perturb(KEY)
    assert_rounded(views, clean, form, 1.0)
    plans.restore()
    assert not plans.written()
    assert all(torch.equal(view.tensor, before) for view, before in zip(views, clean))
    plans.release()
    norms = torch.ones(24, device=device)
    for index, update in enumerate((WeightUpdate(row_norm=norms), WeightUpdate(alpha=norms)), 1):
        rescaled = Plans([weight_view(gaussian(*shape, device=device), update, index)], form, "copy")
        with pytest.raises(ValueError, match=rf"cannot round layer{index}.weight: its adapter rescales"):
            rescaled.fill_std(1.0)
            rescaled.perturb(KEY)


def test_a_write_to_a_rounded_weight_is_told_and_its_clean_value_back(device):
    views = [weight_view(gaussian(16, 64, seed=i, device=device), index=i) for i in (1, 2)]
    plans, clean = Plans(views, "int4/32", "copy"), clones(views)
    plans.fill_std(1.0)
    plans.perturb(KEY)
    views[1].tensor[3, 7] += 1
    plans.restore()
    assert [view.index for view in plans.written()] == [2]
    assert all(torch.equal(view.tensor, before) for view, before in zip(views, clean))
    plans.perturb(KEY)
    plans.restore()
    assert not plans.written()


@pytest.mark.parametrize("during", ["perturb", "restore"])
def test_an_exception_amid_a_format_loses_nothing(device, during):
    number, raised = 0, True
    while raised:
        number += 4 if INTERPRETED else 1  # whose own operations are among them
        views = [weight_view(gaussian(16, 64, seed=i, device=device), factors(16, 64, device=device), i) for i in (1, 2)]
        views[1].update = WeightUpdate(dense=gaussian(16, 64, seed=9, device=device))  # not the kernels' own
        plans, clean = Plans(views, "int4/32", "copy"), clones(views)
        plans.fill_std(1.0)
        if during == "restore":
            plans.perturb(KEY)
        try:
            with RaiseAt(number, number % 8 < 4):
                plans.perturb(KEY) if during == "perturb" else plans.restore()
            raised = False
        except Raised:
            pass
        if number % 3 == 0:  # else go back from where it broke off
            plans.perturb(KEY)
            assert_rounded(views, clean, "int4/32", 1.0)
        plans.restore()
        assert not plans.written()
        assert all(torch.equal(view.tensor, before) for view, before in zip(views, clean)), number
        plans.release()
    assert number > 2


@pytest.mark.skipif(not (INTERPRETED or CUDA), reason="needs the kernels")
def test_groups_that_the_kernels_do_not_take_go_to_torch():
    device = "cpu" if INTERPRETED else "cuda"
    view = weight_view(gaussian(4, 64, device=device), factors(4, 64, device=device))
    for form, name in (
        ("int4/3", "TorchPlan"),
        ("int4/4", "TritonPlan"),
        ("int4/64", "TritonPlan"),
        ("int4/99", "TritonPlan"),
    ):
        (plan,) = ops.plan([view], form, "copy")
        assert type(plan).__name__ == name, form


# --- backends ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (INTERPRETED or CUDA), reason="needs the kernels")
def test_one_refused_weight_does_not_slow_the_others():
    device = "cpu" if INTERPRETED else "cuda"
    views = [weight_view(gaussian(8, 64, dtype=d, device=device), index=i) for i, d in enumerate(DTYPES, 1)]
    plans = ops.plan(views, "filter", "reversible")
    assert [len(plan.views) for plan in plans] == [3, 1]
    assert [type(plan).__name__ for plan in plans] == ["TritonPlan", "TorchPlan"]
    isotropic = Plans([looked_at(view) for view in views], "isotropic", "copy")
    isotropic.fill_std(0.1)
    clean = clones(views)
    isotropic.perturb(KEY)
    stds = [(view.tensor.double() - before.double()).std().item() for view, before in zip(views, clean)]
    assert max(stds) < 1.15 * min(stds)
    isotropic.restore()


def test_a_weight_that_no_backend_takes_is_named():
    view = weight_view(torch.zeros(4, 4))
    view.rows = view.rows.to(torch.complex64)
    with pytest.raises(ValueError, match=r"layer1.weight cannot be perturbed .*torch: torch.complex64 is not fp32"):
        ops.plan([view], "filter", "reversible")


@pytest.mark.skipif(INTERPRETED, reason="the same in a process of its own")
def test_a_missing_or_old_triton_is_told_once():
    code = """
import warnings, torch, triton
triton.__version__ = "3.1.0"
from flatopt.ops.triton import TritonBackend
from made_weights import gaussian, weight_view
backend = TritonBackend()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert "3.2" in backend.supports(weight_view(gaussian(4, 8)), "filter")
    assert "3.2" in backend.supports(weight_view(gaussian(4, 8)), "filter")
seen = [str(w.message) for w in seen if "flatopt" in str(w.message)]
assert len(seen) == 1 and "3.1.0" in seen[0], seen
"""
    pytest.importorskip("triton")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_without_a_gpu_the_kernels_are_not_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not INTERPRETED:
            (plan,) = ops.plan([weight_view(gaussian(4, 8))], "filter", "reversible")
            assert type(plan).__name__ == "TorchPlan"
    assert TorchBackend().supports(weight_view(gaussian(4, 8)), "element") is None


# --- where it is first used --------------------------------------------------------------------------------------------

FIRST_USES = {
    "fake tensors": "from torch._subclasses.fake_tensor import FakeTensorMode as C; context = C(allow_non_fake_inputs=True)",
    "meta": "context = torch.device('meta')",
    "inference": "context = torch.inference_mode()",
    "double": "torch.set_default_dtype(torch.float64)",
    "bfloat16": "torch.set_default_dtype(torch.bfloat16)",
}


def bits_after(first_use):
    code = f"""
import contextlib, torch
from flatopt import ops
from made_weights import Plans, factors, gaussian, weight_view
context = contextlib.nullcontext()
def views():
    return [weight_view(gaussian(20, 64)), weight_view(gaussian(20, 64, dtype=torch.bfloat16), index=2)]
made = views(), views(), views(), views(), views(), views()
{first_use}
def bits(noise, views):
    plans, clean = Plans(views, noise), [view.tensor.clone() for view in views]
    plans.fill_std(0.1)
    plans.perturb((1, 2))
    found = [ops.fingerprint(view.tensor.clone()) for view in views]
    plans.restore()
    assert all(torch.equal(view.tensor, before) for view, before in zip(views, clean))
    return found
def inside(noise, views):
    plans = Plans(views, noise)
    with context:
        plans.fill_std(0.1)
        plans.perturb((1, 2))
    found = [ops.fingerprint(view.tensor) for view in views]
    with context:
        plans.restore()
    return found
found = [inside("filter", made[0]), inside("element", made[1]), bits("filter", made[2]), bits("element", made[3])]
torch.set_default_dtype(torch.float32)
found += [bits("filter", made[4]), bits("element", made[5])]
assert found[0] == found[2] == found[4] and found[1] == found[3] == found[5], found
print(found)
"""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bits_at_once():
    return bits_after("")


@pytest.mark.skipif(INTERPRETED, reason="the same in a process of its own")
@pytest.mark.parametrize("first", FIRST_USES)
def test_the_noise_does_not_depend_on_where_it_is_first_used(first, bits_at_once):
    """On real weights inside such a context: the same bits, and nothing in the caches that would spoil what comes after."""
    assert bits_after(FIRST_USES[first]) == bits_at_once
