"""W is back, bit for bit, after every step and after everything that can come between a forward and ``step()``."""

import copy
import gc
import io
import math
import pickle
import signal
import threading
import time

import pytest
import torch
from helpers import batch, bits, changed, frozen, lora_mlp, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXACT = ["reversible", "copy"]


def wrap(model, **options):
    options = {"sigma": 0.2, "schedule": "constant", **options}
    return FlatPerturbOptimizer(torch.optim.AdamW(trainable(model), lr=1e-3), model, **options)


def backward(model, dtype=torch.float32, seed=0):
    x, y = batch(dtype=dtype, seed=seed)
    loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("noise", ["filter", "element"])
def test_every_weight_is_back_after_every_step(noise, restore, dtype):
    steps = 120
    model = lora_mlp(dtype)
    before = frozen(model)
    bases = sorted(name for name in before if "base_layer.weight" in name)
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD(trainable(model), lr=0.05), model, sigma=0.2, total_steps=steps, restore=restore, noise=noise
    )
    losses = []
    for step in range(steps):
        losses.append(backward(model, dtype))
        assert sorted(changed(model, before)) == (bases if step > steps // 4 else changed_early(model, before, bases))
        optimizer.step()
        optimizer.zero_grad()
        assert not changed(model, before)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])  # and it was real training


def changed_early(model, before, bases):
    """Where the cosine starts, sigma_t is 0 or so small that in 16 bits nothing may move."""
    now = sorted(changed(model, before))
    assert set(now) <= set(bases)
    return now


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_subtract_drifts_in_half_precision(dtype):
    weight = nn.Parameter(torch.randn(64, 64).to(dtype), requires_grad=False)
    clean = weight.detach().clone()
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
        [{"params": weight}],
        sigma=0.05,
        schedule="constant",
        restore="subtract",
    )
    drift = []
    for _ in range(100):
        optimizer.perturb()
        optimizer.step()
        drift.append(((weight.double() - clean.double()).norm() / clean.double().norm()).item())
    assert 0 < drift[0] < drift[-1]  # rounding errors pile up
    # a random walk of roundings, which are uniform and hit most elements: ~ eps / 4 each, sqrt(100) of them
    eps = torch.finfo(dtype).eps
    assert 0.2 * eps < drift[-1] < 10 * eps
    assert (bits(weight) != bits(clean)).float().mean() > 0.2


def odd_weights(dtype):
    """The values and shapes that floating point makes hard."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.max, -info.max, info.tiny, -info.tiny]
    special += [info.tiny / 2, -info.tiny * info.eps, info.tiny * info.eps, 1.0, -1.0, 1.0 + info.eps, 1.0 - info.eps / 2]
    finite = [x for x in special if math.isfinite(x)]
    rows = torch.randn(len(special), 37)
    rows[range(len(special)), 5] = torch.tensor(special, dtype=torch.float64).to(rows.dtype)
    outlier = torch.randn(4, 50)
    outlier[1, 3], outlier[2, 7] = 300.0, -1e4
    return {
        "special in a row": torch.tensor(special, dtype=torch.float64).repeat(3, 5),
        "special, one a row": rows,
        "finite": torch.tensor(finite, dtype=torch.float64).repeat(2, 3),
        "negative zeros": -torch.zeros(5, 6),
        "zero rows": torch.randn(6, 8) * torch.tensor([0.0, 1.0]).repeat(3).unsqueeze(1),
        "subnormal": torch.randn(8, 9, dtype=torch.float64) * info.tiny * 0.1,
        "about the smallest normal": torch.randn(8, 9, dtype=torch.float64) * info.tiny * 4,
        "large": torch.randn(8, 9, dtype=torch.float64) * info.max * 0.2,
        "outliers": outlier,
        "powers of two": torch.exp2(torch.arange(-14, 14, dtype=torch.float64)).repeat(3, 1),
        "one element": torch.randn(1, 1),
        "one column": torch.randn(7, 1),
        "odd columns": torch.randn(3, 101),
        "vector": torch.randn(13),
        "scalar": torch.randn(()),
        "kernel": torch.randn(4, 3, 5, 2),
        "kernel channels_last": torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 11).t(),
        "wider than a chunk": torch.randn(2, (1 << 17) + 3),
        "more rows than a chunk": torch.randn(1 << 12, 33),
    }


@pytest.mark.parametrize("sigma", [1e-4, 0.05, 1.0, 50.0])
@pytest.mark.parametrize("noise", ["filter", "layer", "isotropic", "element"])
@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_weights_come_back(dtype, restore, noise, sigma):
    weights = {name: nn.Parameter(w.to(dtype), requires_grad=False) for name, w in odd_weights(dtype).items()}
    if sigma not in (0.05, 1.0):  # the large ones are about chunks
        weights = {name: w for name, w in weights.items() if "chunk" not in name}
    clean = {name: w.detach().clone() for name, w in weights.items()}
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
        [{"params": w} for w in weights.values()],
        sigma=sigma,
        schedule="constant",
        restore=restore,
        noise=noise,
    )
    moved = set()
    for _ in range(3):
        optimizer.perturb()
        moved |= {name for name, w in weights.items() if not torch.equal(w, clean[name])}
        optimizer.step()
        assert [name for name, w in weights.items() if not torch.equal(bits(w), bits(clean[name]))] == []
    if sigma >= 0.05:
        assert {"odd columns", "kernel", "kernel channels_last", "transposed"} <= moved
    assert "negative zeros" not in moved or noise == "isotropic"  # no scale, no noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_row_gets_no_noise_and_its_neighbours_do(dtype):
    weight = torch.randn(6, 64).to(dtype)
    weight[::2] = 0
    weight = nn.Parameter(weight, requires_grad=False)
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), [{"params": weight}], sigma=0.2, schedule="constant"
    )
    with optimizer.perturbed():
        assert not weight[::2].any()
        assert weight[1::2].isfinite().all()


@pytest.mark.parametrize("noise", ["filter", "element"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_may_change_between_perturb_and_restore(dtype, noise):
    weights = [nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False) for shape in [(301, 517), (3, 70001), (9, 7)]]
    clean = [w.detach().clone() for w in weights]
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
        [{"params": weights}],
        sigma=0.1,
        schedule="constant",
        noise=noise,
    )
    for first, second in [(1, 2), (2, 1), (1, 3)]:
        torch.set_num_threads(first)
        optimizer.perturb()
        torch.set_num_threads(second)
        optimizer.step()
        assert all(torch.equal(bits(w), bits(c)) for w, c in zip(weights, clean))


# --- what comes between a forward and step() ----------------------------------------------------------------------------


@pytest.fixture(params=EXACT)
def run(request):
    """A model and its optimizer, a forward and backward into a step, and the clean weights."""
    model = lora_mlp(torch.bfloat16)
    before = frozen(model)
    optimizer = wrap(model, restore=request.param)
    backward(model, torch.bfloat16)
    assert len(changed(model, before)) == 3
    return model, optimizer, before


def goes_on(model, optimizer, before, dtype=torch.bfloat16):
    """Training continues: perturbed in the next forward, clean after its step."""
    optimizer.zero_grad()
    backward(model, dtype)
    assert len(changed(model, before)) == 3
    optimizer.step()
    assert not changed(model, before)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of memory, say")


def test_a_backward_that_raises(run):
    model, optimizer, before = run
    optimizer.step()
    x, y = batch(dtype=torch.bfloat16)
    loss = nn.functional.cross_entropy(Fails.apply(model(x)).float(), y)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        loss.backward()
    optimizer.restore()
    assert not changed(model, before)
    goes_on(model, optimizer, before)


def test_a_forward_that_raises(run):
    model, optimizer, before = run
    optimizer.step()
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, dtype=torch.bfloat16))  # a wrong width
    optimizer.restore()
    assert not changed(model, before)
    goes_on(model, optimizer, before)


@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("during", ["perturb", "restore"])
def test_ctrl_c_while_weights_are_written(during, restore):
    weights = [nn.Parameter(torch.randn(1000, 1000), requires_grad=False) for _ in range(4)]
    clean = [w.detach().clone() for w in weights]
    optimizer = FlatPerturbOptimizer(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
        [{"params": weights}],
        sigma=0.1,
        schedule="constant",
        restore=restore,
    )
    optimizer.perturb(), optimizer.restore()  # warm
    if during == "restore":
        optimizer.perturb()
    # perturbing takes tens of milliseconds, putting a copy back a few
    delay = 0.002 if (during, restore) == ("restore", "copy") else 0.015

    def interrupted():
        presses = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
        presses.start()
        getattr(optimizer, during)()
        presses.join()
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    optimizer.restore()
    assert all(torch.equal(bits(w), bits(c)) for w, c in zip(weights, clean))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("restore", EXACT)
def test_a_step_that_gradscaler_skips(restore):
    model = lora_mlp()
    before = frozen(model)
    optimizer = wrap(model, restore=restore)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=True)
    x, y = batch()
    adapter = [p.detach().clone() for p in trainable(model)]
    seen = []
    for scale in (float("inf"), float("nan"), 1.0):
        loss = nn.functional.cross_entropy(model(x), y) * scale
        scaler.scale(loss).backward()
        seen.append({name: p.detach().clone() for name, p in model.named_parameters() if name in before})
        old = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = not math.isfinite(scale)
        assert (scaler.get_scale() < old) == skipped
        assert all(torch.equal(a, b) for a, b in zip(adapter, trainable(model))) == skipped
    # a skipped step is no step: its perturbation stands for the next attempt, and is not laid on a second time
    for later in seen[1:]:
        assert all(torch.equal(bits(later[name]), bits(seen[0][name])) for name in before)
    assert len([name for name in before if not torch.equal(seen[0][name], before[name])]) == 3
    assert not changed(model, before)
    assert optimizer.param_groups[0]["flatopt_step"] == 1


def test_an_evaluation_inside_an_accumulation_window(run):
    model, optimizer, before = run
    noisy = frozen(model)
    model.eval()
    with torch.no_grad():
        model(batch(dtype=torch.bfloat16)[0])
    assert not changed(model, before)
    model.train()
    backward(model, torch.bfloat16, seed=1)
    assert not changed(model, noisy)  # the second micro-batch sees the same noise
    optimizer.step()
    assert not changed(model, before)
    goes_on(model, optimizer, before)


@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_no_grad_forward_between_forward_and_backward(restore, dtype):
    """It sees clean weights, and the gradients are those without it, bit for bit."""
    x, y = batch(dtype=dtype)
    model = lora_mlp(dtype)
    with torch.no_grad():
        clean_output = model(x)
    gradients = {}
    for between in (False, True):
        before = frozen(model)
        optimizer = wrap(model, restore=restore)
        output = model(x)
        noisy = frozen(model)
        if between:
            with torch.no_grad():
                assert torch.equal(model(x), clean_output)
            with torch.inference_mode():
                assert torch.equal(model(x), clean_output)
            assert not changed(model, before)  # until a training forward or backward wants the noise again
            with pytest.raises(RuntimeError), torch.no_grad():
                model(x[:, :3])
            assert not changed(model, before)
        assert not torch.equal(output, clean_output)
        nn.functional.cross_entropy(output.float(), y).backward()
        gradients[between] = [p.grad.clone() for p in trainable(model)]
        assert not changed(model, noisy)
        optimizer.restore()
        assert not changed(model, before)
        for p in trainable(model):
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True]))


def weights_saved(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def test_eval_after_a_short_last_window(run):
    model, optimizer, before = run
    plain = copy.deepcopy(model)
    del optimizer
    x = batch(dtype=torch.bfloat16)[0]
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not changed(model, before)


def test_state_dict_after_a_short_last_window(run):
    model, optimizer, before = run
    saved = model.state_dict()
    assert all(torch.equal(bits(saved[name]), bits(w)) for name, w in before.items())
    goes_on(model, optimizer, before)


def test_state_dict_of_a_part(run):
    model, optimizer, before = run
    layer = model.base_model.model.second
    saved = layer.state_dict()["base_layer.weight"]
    assert torch.equal(bits(saved), bits(before["base_model.model.second.base_layer.weight"]))
    optimizer.step()
    assert not changed(model, before)


@pytest.mark.parametrize("restore", EXACT)
def test_save_pretrained_after_a_short_last_window(restore, tmp_path):
    transformers = pytest.importorskip("transformers")
    from peft import LoraConfig, get_peft_model

    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    before = frozen(model)
    name = next(name for name in before if "c_attn" in name and "weight" in name)
    clean = copy.deepcopy(model).merge_and_unload().transformer.h[0].attn.c_attn.weight
    optimizer = wrap(model, restore=restore)
    ids = torch.randint(20, (2, 6))

    def window():
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert changed(model, before) == [name]

    window()
    model.save_pretrained(tmp_path / "adapter")
    window()
    model.base_model.model.save_pretrained(tmp_path / "base")
    saved = [w for key, w in weights_saved(tmp_path / "base").items() if "c_attn" in key and w.shape == before[name].shape]
    assert len(saved) == 1
    assert torch.equal(bits(saved[0]), bits(before[name]))
    window()
    merged = model.merge_and_unload()
    assert torch.equal(bits(merged.transformer.h[0].attn.c_attn.weight), bits(clean))
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(bits(weights_saved(tmp_path / "merged")["transformer.h.0.attn.c_attn.weight"]), bits(clean))
    optimizer.restore()
    assert torch.equal(bits(merged.transformer.h[0].attn.c_attn.weight), bits(clean))


def base_of(model, name="second"):
    return dict(model.named_modules())[name].weight


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_after_a_short_last_window(run, safe):
    model, optimizer, before = run
    optimizer.restore()
    expected = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    backward(model, torch.bfloat16)
    assert changed(model, before)
    merged = model.merge_and_unload(safe_merge=safe)
    assert torch.equal(bits(base_of(merged)), bits(base_of(expected)))
    optimizer.restore()
    assert torch.equal(bits(base_of(merged)), bits(base_of(expected)))


def test_unload_after_a_short_last_window(run):
    model, optimizer, before = run
    plain = model.unload()
    assert torch.equal(bits(base_of(plain)), bits(before["base_model.model.second.base_layer.weight"]))
    optimizer.restore()
    assert torch.equal(bits(base_of(plain)), bits(before["base_model.model.second.base_layer.weight"]))


def test_merge_adapter_after_a_short_last_window(run):
    model, optimizer, before = run
    optimizer.restore()
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    backward(model, torch.bfloat16)
    assert changed(model, before)
    model.merge_adapter()
    name = "base_model.model.second.base_layer"
    assert torch.equal(bits(model.get_submodule(name).weight), bits(merged.get_submodule(name).weight))
    with pytest.raises(ValueError, match="unmerge_adapter"):
        backward(model, torch.bfloat16)
    assert torch.equal(bits(model.get_submodule(name).weight), bits(merged.get_submodule(name).weight))


def test_merging_one_layer_after_a_short_last_window(run):
    model, optimizer, before = run
    layer = model.base_model.model.second
    layer.merge()
    optimizer.restore()
    expected = before["base_model.model.second.base_layer.weight"] + layer.get_delta_weight("default")
    assert torch.equal(bits(layer.base_layer.weight), bits(expected))


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("copier", COPIERS)
def test_copies_of_the_model_are_clean(run, copier):
    model, optimizer, before = run
    twin = COPIERS[copier](model)
    assert not changed(twin, before)
    goes_on(model, optimizer, before)
    # and nobody perturbs the copy
    backward(twin, torch.bfloat16)
    assert not changed(twin, before)
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("copier", ["deepcopy", "torch.save"])
def test_copies_of_a_part_are_clean(run, copier):
    model, optimizer, before = run
    part = COPIERS[copier](model.base_model.model.second)
    assert torch.equal(bits(part.base_layer.weight), bits(before["base_model.model.second.base_layer.weight"]))
    optimizer.step()
    assert not changed(model, before)


class Own(nn.Module):
    """A low-rank module that is the root and holds the weight itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 16), requires_grad=False)
        self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 16))

    def low_rank_base(self):
        return self.weight

    def low_rank_delta(self):
        return self.up, self.down, 1.0

    def forward(self, x):
        return nn.functional.linear(x, self.weight + self.up @ self.down)


@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("copier", ["deepcopy", "torch.save"])
def test_copies_of_a_root_that_holds_the_weight_are_clean(restore, copier):
    model = Own()
    before = frozen(model)
    optimizer = wrap(model, restore=restore)
    backward(model)
    assert changed(model, before)
    assert not changed(COPIERS[copier](model), before)
    optimizer.step()
    assert not changed(model, before)


def test_a_parameter_copied_alone_is_the_one_thing_that_is_not(run):
    # a Parameter has no hook: what is read from it mid-step is what it holds
    model, optimizer, before = run
    name = "base_model.model.second.base_layer.weight"
    assert not torch.equal(copy.deepcopy(model.get_parameter(name)), before[name])
    optimizer.step()
    assert not changed(model, before)


def test_load_state_dict_inside_a_window(run):
    model, optimizer, before = run
    other = {name: w + 1 if name in before else w for name, w in copy.deepcopy(model).state_dict().items()}
    model.load_state_dict(other)
    now = {name: other[name] for name in before}
    assert not changed(model, now)
    optimizer.step()
    assert not changed(model, now)
    goes_on(model, optimizer, now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_model_to_another_dtype_inside_a_window(run, dtype):
    model, optimizer, before = run
    model.to(dtype)
    optimizer.restore()
    after = {name: w.to(dtype) for name, w in before.items()}
    assert not changed(model, after)
    goes_on(model, optimizer, after, dtype)


def test_model_to_another_memory_format_inside_a_window():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    before = frozen(model)
    optimizer = wrap(model)
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    model.to(memory_format=torch.channels_last)
    optimizer.step()
    assert not changed(model, before)


def test_an_optimizer_that_is_deleted_leaves_clean_weights():
    model = lora_mlp()
    before = frozen(model)
    optimizer = wrap(model)
    backward(model)
    assert len(changed(model, before)) == 3
    del optimizer
    gc.collect()
    assert not changed(model, before)
    backward(model)
    assert not changed(model, before)


@pytest.mark.parametrize("action", ["step", "pickle", "deepcopy", "state_dict", "load_state_dict"])
def test_what_is_done_to_the_optimizer_inside_a_window(run, action):
    model, optimizer, before = run
    if action == "step":
        optimizer.step()
    elif action == "pickle":
        pickle.dumps(optimizer)
    elif action == "deepcopy":
        copy.deepcopy(optimizer)
    else:
        state = optimizer.state_dict()
        if action == "state_dict":
            assert len(changed(model, before)) == 3  # it holds nothing of W
        else:
            optimizer.load_state_dict(state)
    optimizer.restore()
    assert not changed(model, before)
    goes_on(model, optimizer, before)


def test_bits_are_the_same_on_every_run_of_a_seed():
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        model = lora_mlp(torch.bfloat16)
        optimizer = wrap(model, seed=5)
        for seed in range(5):
            backward(model, torch.bfloat16, seed)
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*runs))
