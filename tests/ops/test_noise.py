"""The noise as statistics.

Where a distribution is claimed, the bound is the quantile of the statistic under it at a family-wise error of ALPHA a test
(Bonferroni over the comparisons in the test), so that correct code would fail with one seed in a million; the seeds are
fixed. Where a figure is documented (what the reversible map cannot move), the bound is that figure's range.
"""

import math
import random

import numpy as np
import peft
import pytest
import torch
from scipy import stats
from torch import nn

from flatopt import FlatPerturbOptimizer
from flatopt.ops import noise

ALPHA = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bound(comparisons, samples):
    """Largest |correlation| of ``samples`` independent pairs, over ``comparisons`` of them, at confidence 1 - ALPHA."""
    return stats.norm.isf(ALPHA / 2 / comparisons) / math.sqrt(samples)


def correlation(x, y):
    return torch.corrcoef(torch.stack([x.flatten().double(), y.flatten().double()]))[0, 1].item()


def gaussian_weights(rows, columns, dtype=torch.float32, rms=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((torch.randn(rows, columns, generator=generator) * rms).to(dtype), requires_grad=False)


def noise_on(weights, **options):
    """A step's ε on raw weights, and the optimizer that drew it; W is clean again."""
    options = {"schedule": "constant", **options}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = FlatPerturbOptimizer(optimizer, [{"params": list(weights)}], **options)
    return draw(optimizer, weights), optimizer


def draw(optimizer, weights):
    clean = [w.detach().clone() for w in weights]
    optimizer.perturb()
    epsilon = [w.detach().double() - c.double() for w, c in zip(weights, clean)]
    optimizer.restore()
    assert all(torch.equal(w, c) for w, c in zip(weights, clean))
    return epsilon


def assert_variances(squares, degrees):
    """``squares``: sums of ``degrees`` squared standard normals, claimed to be chi-squared."""
    squares = torch.as_tensor(squares).flatten().double().numpy()
    low, high = stats.chi2.ppf([ALPHA / 2 / squares.size, 1 - ALPHA / 2 / squares.size], degrees)
    assert low < squares.min(), f"too small by a factor {math.sqrt(squares.min() / degrees):.4f} in std"
    assert squares.max() < high, f"too large by a factor {math.sqrt(squares.max() / degrees):.4f} in std"


# --- how large -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", lambda progress: 1 - progress])
def test_std_is_sigma_t_times_row_rms_of_the_merged_weight(schedule):
    """Row by row and step by step, with an adapter as large as W itself, whose rows differ."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1024, 24, bias=False))
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    layer = net[0]
    with torch.no_grad():
        layer.lora_B["default"].weight *= torch.logspace(-1, 1, 24).unsqueeze(1)
    sigma, total = 0.07, 8
    factors = {"cosine": lambda p: (1 - math.cos(math.pi * p)) / 2, "linear": lambda p: p, "constant": lambda p: 1.0}
    factor = factors[schedule] if isinstance(schedule, str) else schedule
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(layer.lora_A.parameters(), lr=0.0),
        model,
        sigma=sigma,
        total_steps=total,
        schedule=schedule,
        restore="copy",
    )
    weight = layer.base_layer.weight
    merged = (weight + layer.get_delta_weight("default")).detach().double()
    rms = merged.square().mean(1).sqrt()
    assert rms.max() / rms.min() > 10
    for t in range(total + 2):  # past the end the factor stays
        clean = weight.detach().clone()
        model(torch.zeros(1, 1024)).sum().backward()
        epsilon = weight.detach().double() - clean.double()
        sigma_t = sigma * factor(min(t / total, 1))
        if sigma_t == 0:
            assert not epsilon.any()
        else:
            z = epsilon / (sigma_t * rms).unsqueeze(1)
            assert_variances(z.square().sum(1), 1024)
            assert abs(z.mean().item()) < bound(1, z.numel())
        optimizer.step()


@pytest.mark.parametrize("kind", ["filter", "layer", "isotropic", "element"])
def test_noise_kinds(kind):
    """What each kind scales with: the row, the layer, all layers of the group, the element."""
    weights = [gaussian_weights(32, 600, rms=0.02), gaussian_weights(20, 512, rms=0.5, seed=1)]
    with torch.no_grad():
        for weight in weights:
            weight *= torch.logspace(-1, 1, len(weight)).unsqueeze(1)
    epsilon, _ = noise_on(weights, sigma=0.1, noise=kind, restore="copy")
    everything = torch.cat([w.flatten() for w in weights]).double().square().mean().sqrt()
    for weight, eps in zip(weights, epsilon):
        w = weight.double()
        scale = {
            "filter": w.square().mean(1, keepdim=True).sqrt(),
            "layer": w.square().mean().sqrt(),
            "isotropic": everything,
            "element": w.abs(),
        }[kind]
        assert_variances((eps / scale / 0.1).square().sum(1), w.shape[1])


@pytest.mark.parametrize("kind", ["filter", "layer", "isotropic", "element"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reversible_std_of_every_kind(kind, dtype):
    """On N(0, s) weights the elements that cannot be moved reversibly cost up to 5 % of the std at sigma .05."""
    weights = [gaussian_weights(256, 1024, dtype)]
    epsilon, _ = noise_on(weights, sigma=0.05, noise=kind)
    w = weights[0].double()
    nominal = 0.05 * (w.abs() if kind == "element" else w.square().mean().sqrt())
    ratio = (epsilon[0].square().mean() / nominal.square().mean()).sqrt().item()
    assert (0.92 if kind == "element" else 0.94) < ratio < 1.0


# The untouched elements differ with where the weights' rms lies in its binade: three places in it are tried.
@pytest.mark.parametrize("rms", [0.0160, 0.0200, 0.0300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_reversible_figures(dtype, rms, sigma):
    """Share of untouched elements, std and kurtosis on N(0, s) weights, as documented."""
    weights = [gaussian_weights(512, 1024, dtype, rms)]
    (epsilon,), _ = noise_on(weights, sigma=sigma)
    z = epsilon / (sigma * weights[0].double().square().mean(1, keepdim=True).sqrt())
    samples = z.numel()
    power, kurtosis = z.square().mean().item(), (z**4).mean().item() / z.square().mean().item() ** 2
    assert (0.94 if sigma == 0.05 else 0.91) < math.sqrt(power) < 1.0
    assert 3.0 < kurtosis < (3.35 if sigma == 0.05 else 3.5)
    assert abs(z.mean().item()) < bound(1, samples) * math.sqrt(power)
    if dtype == torch.float32:
        untouched = (epsilon == 0).double().mean().item()
        assert (0.035 if sigma == 0.05 else 0.06) < untouched < (0.055 if sigma == 0.05 else 0.09)


# Where the weights' rms lies in its binade decides what can move: several places in it are tried.
@pytest.mark.parametrize("rms", [0.0160, 0.0200, 0.0280])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sigma", [1e-3, 3e-3, 1e-2, 0.05])
def test_mean_square_is_right_where_epsilon_is_below_the_grid(sigma, dtype, rms):
    """Where the cosine schedule starts. At sigma 1e-3 a bf16 weight can move by no less than 4 std, and few do."""
    weights = [gaussian_weights(512, 1024, dtype, rms)]
    (epsilon,), _ = noise_on(weights, sigma=sigma)
    z = epsilon / (sigma * weights[0].double().square().mean(1, keepdim=True).sqrt())
    squares = z.square()
    error = stats.norm.isf(ALPHA / 2) * squares.std().item() / math.sqrt(squares.numel())
    assert 0.94**2 - error < squares.mean().item() < 1 + error
    assert abs(z.mean().item()) < stats.norm.isf(ALPHA / 2) * z.std().item() / math.sqrt(z.numel())


# --- its shape -------------------------------------------------------------------------------------------------------

TAILS = [1, 2, 3, 4]


def test_copy_is_exactly_gaussian():
    """Kolmogorov-Smirnov, kurtosis, and the share beyond 1 to 4 sigma against the normal's, exact binomial bounds."""
    weights = [gaussian_weights(512, 1024)]
    (epsilon,), _ = noise_on(weights, sigma=0.05, restore="copy")
    z = (epsilon / (0.05 * weights[0].double().square().mean(1, keepdim=True).sqrt())).flatten()
    assert stats.kstest(z.numpy(), "norm").pvalue > ALPHA
    assert abs((z**4).mean().item() - 3) < stats.norm.isf(ALPHA / 2) * math.sqrt(96 / z.numel())
    for k in TAILS:
        beyond = (z.abs() > k).sum().item()
        assert stats.binomtest(beyond, z.numel(), 2 * stats.norm.sf(k)).pvalue > ALPHA / len(TAILS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_is_the_gaussian_rounded_to_the_weights_type(dtype):
    """The same key in fp32 and in ``dtype`` draws the same Gaussian: only the rounding of the sum differs."""
    low = gaussian_weights(64, 256, dtype)
    exact = nn.Parameter(low.detach().float().clone(), requires_grad=False)
    (_, first), (_, second) = (noise_on([weight], sigma=0.05, restore="copy") for weight in (low, exact))
    with first.perturbed(), second.perturbed():
        assert torch.equal(low, exact.to(dtype))


def test_reversible_tails():
    """Elements that would leave their binade or are tiny stay put, large moves more often: tails thin by up to a fifth."""
    weights = [gaussian_weights(1024, 2048)]
    (epsilon,), _ = noise_on(weights, sigma=0.05)
    z = (epsilon / (0.05 * weights[0].double().square().mean(1, keepdim=True).sqrt())).flatten()
    for k in TAILS:
        normal, beyond = 2 * stats.norm.sf(k), (z.abs() > k).sum().item()
        assert beyond > stats.binom.ppf(ALPHA, z.numel(), 0.8 * normal), f"beyond {k} sigma: {beyond / z.numel() / normal}"
        assert beyond < stats.binom.isf(ALPHA, z.numel(), normal), f"beyond {k} sigma: {beyond / z.numel() / normal}"


def test_the_normals_are_normal():
    """The generator itself, before any rounding: moments to the sixth, tails, KS. Its largest value is 4.86."""
    z = normals(step=0).double().flatten()
    samples = z.numel()
    assert stats.kstest(z[: 1 << 19].numpy(), "norm").pvalue > ALPHA
    for power, moment in {1: 0, 2: 1, 3: 0, 4: 3, 5: 0, 6: 15}.items():
        variance = math.prod(range(1, 2 * power, 2)) - moment**2
        error = stats.norm.isf(ALPHA / 12) * math.sqrt(variance / samples)
        assert abs((z**power).mean().item() - moment) < error, power
    for k in TAILS:
        beyond = (z.abs() > k).sum().item()
        assert stats.binomtest(beyond, samples, 2 * stats.norm.sf(k)).pvalue > ALPHA / len(TAILS)
    assert z.abs().max() < 4.87


# --- independence ----------------------------------------------------------------------------------------------------


def normals(seed=0, step=0, rank=0, target=1, rows=1024, columns=2048):
    key = noise.sub_key(noise.step_key(seed, step, rank), target)
    return noise.normals_of_rows(noise.row_keys(key, rows, torch.device("cpu")), 0, columns)


VIEWS = {"value": lambda z: z, "square": torch.square, "sign": torch.sign}


def assert_independent(x, y, comparisons=1):
    """No correlation of the values, of the squares, of the signs, nor of one's sign with the other's size."""
    pairs = [(VIEWS[name](x), VIEWS[name](y)) for name in VIEWS] + [(x.sign(), y.abs()), (x.abs(), y.sign())]
    for first, second in pairs:
        assert abs(correlation(first, second)) < bound(len(pairs) * comparisons, x.numel())


def test_draws_differ_by_seed_step_target_and_rank():
    z = normals()
    others = [normals(step=1), normals(step=2), normals(target=2), normals(rank=1), normals(seed=1), normals(seed=-1)]
    for other in others:
        assert_independent(z, other, len(others))


def test_neighbours_are_independent():
    """Rows, columns, the two normals of one hash, the hashes side by side; a number's sign and its size."""
    z = normals()
    pairs = [
        (z[:-1], z[1:]),
        (z[:, :-1], z[:, 1:]),
        (z[:, 0::2], z[:, 1::2]),
        (z[:, 1:-1:2], z[:, 2::2]),
        (z[:, :-2], z[:, 2:]),
        (z[:512], z[512:]),
        (z[:, :1024], z[:, 1024:]),
    ]
    for x, y in pairs:
        assert_independent(x, y, len(pairs))
    assert abs(correlation(z.sign(), z.abs())) < bound(1, z.numel())


def test_all_pairs_of_rows():
    """523,776 correlations of rows, of values and of squares."""
    z = normals().double()
    for x in (z, z.square(), z.sign()):
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
        correlations = (x @ x.t() / x.shape[1]).triu(1)
        assert correlations.abs().max().item() < bound(3 * 1024 * 1023 / 2, x.shape[1])
        # and as many moderate ones as there should be
        square_sum = correlations.square().sum().item() * x.shape[1]
        assert stats.norm.sf(abs(square_sum - 1024 * 1023 / 2) / math.sqrt(1024 * 1023)) > ALPHA / 6


@pytest.mark.parametrize("other", [{"step": 1}, {"target": 2}, {"rank": 1}, {"seed": 1}, {}], ids=str)
def test_no_row_is_another_shifted(other):
    """Circular cross-correlation at every shift, of each row with all the rows of another draw (or of its own)."""
    rows, columns = 64, 2048
    x, y = normals(rows=rows, columns=columns), normals(**other, rows=rows, columns=columns)
    for half in (slice(0, None, 2), slice(1, None, 2)):  # one hash makes two columns: shift by hashes
        fx, fy = torch.fft.rfft(x[:, half].double()), torch.fft.rfft(y[:, half].double())
        for turn in range(1, 17):
            peaks = torch.fft.irfft(fx * fy.roll(turn, 0).conj()) / (columns / 2)
            assert peaks.abs().max().item() < 1.1 * bound(2 * 16 * peaks.numel(), columns / 2)


def test_equal_rows_do_not_exist():
    """2^18 rows of one target and 2^16 targets of a step: no two keys alike, nor their first four normals."""
    key = noise.sub_key(noise.step_key(3, 1, 0), 1)
    first, second = noise.row_keys(key, 1 << 18, torch.device("cpu"))
    assert len(torch.unique((first.long() << 32) ^ second.long())) == 1 << 18
    z = noise.normals_of_rows((first, second), 0, 4)
    assert len(torch.unique(z.view(torch.int32), dim=0)) == 1 << 18
    step = noise.step_key(3, 1, 0)
    assert len({noise.sub_key(step, index) for index in range(1 << 16)}) == 1 << 16
    keys = {noise.step_key(s, t, r) for s in range(8) for t in range(200) for r in range(8)}
    assert len(keys) == 8 * 200 * 8


def hash_bits(z):
    """The 32 bits that made each pair, read back from its radius and angle; ``(pairs, 32)``."""
    x, y = z.double().flatten()[0::2], z.double().flatten()[1::2]
    high = (torch.exp(-(x * x + y * y) / 2) * 65536).floor().long().clamp(0, 65535)
    low = (torch.atan2(y, x) / (2 * math.pi) % 1 * 65536).floor().long()
    return torch.stack([(word >> b) & 1 for word in (high, low) for b in range(16)], dim=1)


def test_bits_of_the_hash():
    """Each bit fair, each pair of bits independent, each byte uniform, each difference of neighbours fair."""
    z = normals()
    bits = hash_bits(z)
    pairs = len(bits)
    quantile = stats.norm.isf(ALPHA / 2 / 32)
    assert (bits.double().mean(0) - 0.5).abs().max() < quantile * 0.5 / math.sqrt(pairs)
    signs = bits.double() * 2 - 1
    among = (signs.t() @ signs / pairs).fill_diagonal_(0)
    assert among.abs().max() < bound(32 * 31 / 2, pairs)
    after = signs[:-1].t() @ signs[1:] / (pairs - 1)  # bit i of one hash with bit j of the next
    assert after.abs().max() < bound(32 * 32, pairs - 1)
    below = signs[:-1024].t() @ signs[1024:] / (pairs - 1024)  # and of the hash in the same column, one row down
    assert below.abs().max() < bound(32 * 32, pairs - 1024)
    for byte in range(4):
        values = (bits[:, 8 * byte : 8 * byte + 8] * 2 ** torch.arange(8)).sum(1)
        assert stats.chisquare(torch.bincount(values, minlength=256).numpy()).pvalue > ALPHA / 4
    for word in (bits[:, :16], bits[:, 16:]):
        values = (word * 2 ** torch.arange(16)).sum(1)
        assert stats.chisquare(torch.bincount(values, minlength=1 << 16).numpy()).pvalue > ALPHA / 2


@pytest.mark.parametrize("restore", ["reversible", "copy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epsilon_of_an_optimizer_is_independent(dtype, restore):
    """Through the public API: of the weight, of the last step, of the next layer, row and column; sign of size."""
    weights = [gaussian_weights(512, 1024, dtype), gaussian_weights(512, 1024, dtype, seed=1)]
    (first, second), optimizer = noise_on(weights, sigma=0.05, restore=restore)
    optimizer.step()
    (later, _) = draw(optimizer, weights)
    w = weights[0].double()
    pairs = [(first, second), (first, later), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:]), (first, w)]
    for x, y in pairs:
        limit = bound(4 * len(pairs), x.numel())
        # Which moves are open depends on the weight: in `reversible` tiny ones stay where they are, and those at the top of
        # a binade move down more often than up, at every step; in bf16 the binade says how far a weight can move at all.
        same_weight = (y is w or y is later) and restore == "reversible"
        value, sign, size = (0.02, 0.04, 0.03) if same_weight else (0, 0, 0)
        assert abs(correlation(x, y)) < limit + value
        assert abs(correlation(x.sign(), y.sign())) < limit + sign
        assert abs(correlation(x.sign(), y.abs())) < limit
        assert abs(correlation(x.square(), y.square())) < limit + size
    assert abs(correlation(first.sign(), first.abs())) < bound(1, first.numel())


# --- what it depends on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", ["reversible", "copy"])
@pytest.mark.parametrize("kind", ["filter", "element"])
def test_same_seed_same_noise(kind, restore):
    def run(seed, tall=40):
        weights = [gaussian_weights(tall, 333), gaussian_weights(24, 65)]
        first, optimizer = noise_on(weights, sigma=0.1, noise=kind, restore=restore, seed=seed)
        optimizer.step()
        return first + draw(optimizer, weights)

    again = run(7)
    assert all(torch.equal(x, y) for x, y in zip(run(7), again))
    assert not any(torch.equal(x, y) for x, y in zip(run(8), again))
    for x, y in zip(run(8), again):
        bound_of_one = bound(4, x.numel()) * (2 if kind == "element" else 1)  # ε = w z has heavy tails
        assert abs(correlation(x, y)) < bound_of_one
    torch.manual_seed(123)  # global states do not enter
    np.random.seed(5)
    random.seed(5)
    assert all(torch.equal(x, y) for x, y in zip(run(7), again))
    assert torch.equal(run(7, tall=41)[1], again[1])  # nor another target's shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["filter", "layer", "isotropic", "element"])
def test_copy_and_subtract_add_the_same_noise(kind, dtype):
    def perturbed(restore):
        weight = gaussian_weights(40, 64, dtype)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        options = {"sigma": 0.3, "schedule": "constant", "noise": kind, "restore": restore}
        optimizer = FlatPerturbOptimizer(optimizer, [{"params": [weight]}], **options)
        optimizer.perturb()
        return weight.clone()

    added, of_subtract = perturbed("copy"), perturbed("subtract")
    assert not torch.equal(added, gaussian_weights(40, 64, dtype))
    assert torch.equal(added, of_subtract)


@pytest.mark.parametrize("restore", ["reversible", "copy", "subtract"])
@pytest.mark.parametrize("kind", ["filter", "layer", "isotropic", "element"])
def test_global_random_states_are_untouched(kind, restore):
    def states():
        name, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()

    weights = [gaussian_weights(40, 64)]
    before = states()
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = FlatPerturbOptimizer(
        torch.optim.AdamW([parameter]), [{"params": weights}], total_steps=4, noise=kind, restore=restore
    )
    for _ in range(3):
        optimizer.perturb()
        parameter.sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        with optimizer.perturbed():
            pass
    assert states() == before


@pytest.mark.parametrize("restore", ["reversible", "copy"])
def test_threads_do_not_change_the_noise(restore):
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        weights = [gaussian_weights(300, 1111), gaussian_weights(1111, 301)]
        runs.append(noise_on(weights, sigma=0.1, restore=restore)[0])
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other))


def test_chunks_do_not_change_the_normals():
    key = noise.step_key(0, 0, 0)
    keys = noise.row_keys(key, 50, torch.device("cpu"))
    whole = noise.normals_of_rows(keys, 0, 701)
    parts = [noise.normals_of_rows((keys[0][20:], keys[1][20:]), left, min(100, 701 - left)) for left in range(0, 701, 100)]
    assert torch.equal(torch.cat(parts, dim=1), whole[20:])
