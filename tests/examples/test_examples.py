"""The ViT example: its command, its adapters, its network path, and the digits it trains on."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import digits  # noqa: E402
import finetune_vit  # noqa: E402

from flatopt import FlatPerturbOptimizer  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "no-cache")}
    command = [sys.executable, str(ROOT / "examples" / "finetune_vit.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


def check_record(path, seeds):
    assert path.with_suffix(".png").read_bytes()[:8] == PNG
    record = json.loads(path.with_suffix(".json").read_text())
    assert len(record["runs"]) == seeds
    for name, row in record["summary"].items():
        pairs = [[finetune_vit.measures(run[arm])[name] for arm in ("plain", "flat")] for run in record["runs"]]
        mean = sum(flat - plain for plain, flat in pairs) / seeds
        assert row["difference"]["mean"] == pytest.approx(mean, abs=1e-9)
        assert (row["difference"]["low"] is None) == (seeds == 1)
        if seeds > 1:
            assert row["difference"]["low"] <= mean <= row["difference"]["high"]
    run = record["runs"][0]
    assert run["plain"]["train_loss"] != run["flat"]["train_loss"]
    assert run["plain"]["train_loss"] < 2.6
    assert set(run["flat"]["corrupted"]) == set(digits.CORRUPTIONS)
    return record


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(finetune_vit.DIGITS, "source_steps", 60)


def test_the_command_writes_the_comparison(tmp_path):
    done = run("--seeds", "1", "--epochs", "2", "--out", "sub/result", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    record = check_record(tmp_path / "sub" / "result", seeds=1)
    assert record["command"] == "python examples/finetune_vit.py --seeds 1 --epochs 2 --out sub/result"


@pytest.mark.parametrize(("adapter", "seeds"), [("dora", 1), ("custom", 2)])
def test_the_other_adapters(adapter, seeds, tmp_path, short):
    finetune_vit.main(
        ["--adapter", adapter, "--seeds", str(seeds), "--epochs", "2", "--device", "cpu", "--out", str(tmp_path / "result")]
    )
    runs = check_record(tmp_path / "result", seeds)["runs"]
    assert len({run["plain"]["train_loss"] for run in runs}) == seeds  # each seed is a run of its own


@pytest.mark.parametrize("adapter", ["lora", "dora", "custom"])
def test_every_linear_of_the_blocks_is_perturbed_and_restored(adapter):
    data = digits.load(0)
    model = finetune_vit.add_adapter(digits.source_model(data.source, 0, steps=1), adapter, rank=2)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert sum(name.count("blocks") and name.endswith("weight") and p.dim() == 2 for name, p in frozen.items()) == 12
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable, lr=0.1), model, sigma=0.5, schedule="constant")
    model.train()
    model(data.train.images).square().mean().backward()
    now = dict(model.named_parameters())
    moved = {name for name, p in frozen.items() if not torch.equal(p, now[name])}
    assert moved == {name for name, p in frozen.items() if "blocks" in name and p.dim() == 2}
    optimizer.step()
    assert all(torch.equal(p, now[name]) for name, p in frozen.items())


def test_by_hand_and_by_peft_are_the_same_adapter():
    data = digits.load(0)
    source, models = digits.source_model(data.source, 0, steps=1), []
    for kind in ("lora", "custom"):
        model = finetune_vit.add_adapter(finetune_vit.copy.deepcopy(source), kind, rank=2)
        torch.manual_seed(1)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1)
        models.append(model.eval())
    first, second = (model(data.train.images) for model in models)
    torch.testing.assert_close(first, second)
    assert (first - source.eval()(data.train.images)).abs().max() > 0.01


def offline():
    try:
        finetune_vit.urllib.request.urlopen("https://huggingface.co", timeout=5).close()
    except OSError:
        return True
    return False


PRETRAINED = ("--model", "vit_base_patch32_clip_224.openai", "--pretrained", "--data", "cifar100")


@pytest.mark.skipif(not offline(), reason="this machine has a network")
def test_without_a_network_it_says_what_to_do_and_at_once(tmp_path):
    start = time.monotonic()
    done = run(*PRETRAINED, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "hf download timm/vit_base_patch32_clip_224.openai" in done.stderr
    assert "needs no network" in done.stderr
    assert time.monotonic() - start < 45  # the imports; the hub's own retries alone take 50 s


def without_weights(monkeypatch):
    create = finetune_vit.timm.create_model
    monkeypatch.setattr(finetune_vit.timm, "create_model", lambda name, pretrained, **k: create(name, **k))
    monkeypatch.setattr(finetune_vit, "_be_offline_at_once", lambda: None)


def test_data_that_cannot_be_downloaded_says_what_to_do(tmp_path, monkeypatch):
    without_weights(monkeypatch)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "test_vit.r160_in1k", "--pretrained", "--data", "cars", "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"(?s)data set cars.*cannot download it any more.*put the files there"):
        finetune_vit.main(arguments)


def test_the_network_path_on_a_small_model(tmp_path, monkeypatch):
    """Everything but the download: head fitted and frozen, the paper's settings, normalised images corrupted."""
    without_weights(monkeypatch)
    real = torch.utils.data.Subset

    def dataset(root, train, transform):
        from torchvision.datasets import FakeData

        return real(FakeData(64, (3, 32, 32), 10, transform, random_offset=0 if train else 64), range(48 if train else 16))

    monkeypatch.setitem(finetune_vit.TORCHVISION, "cifar10", (10, dataset))
    monkeypatch.setitem(finetune_vit.PAPER, "workers", 0)
    out = tmp_path / "result"
    arguments = ["--model", "test_vit.r160_in1k", "--pretrained", "--data", "cifar10", "--device", "cpu", "--out", str(out)]
    finetune_vit.main([*arguments, "--seeds", "1", "--epochs", "2"])
    settings = check_record(out, seeds=1)["settings"]
    assert (settings["sigma"], settings["rank"], settings["lr"], settings["weight_decay"]) == (0.15, 16, 5e-4, 0.1)


def test_model_pretrained_and_data_go_together(capsys):
    for arguments in (PRETRAINED[:2], PRETRAINED[:3], PRETRAINED[3:], ("--epochs", "0")):
        with pytest.raises(SystemExit):
            finetune_vit.main(list(arguments))
        assert "go together" in (message := capsys.readouterr().err) or "at least 1, got 0" in message


def test_the_fitted_head_separates_the_features():
    torch.manual_seed(0)
    data = digits.load(0)
    model = digits.source_model(data.source, 0, steps=1)
    before = digits.evaluate(model, *data.train)
    finetune_vit.fit_head(model, [data.train])
    after = digits.evaluate(model, *data.train)
    assert after[0] > before[0] + 0.2
    assert after[1] < before[1]


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_split_without_overlap_and_the_test_images_are_never_trained_on():
    raw = torch.tensor(digits.load_digits().images).float().flatten(1)
    assert len(raw) == len(raw.unique(dim=0))  # so that an image can tell where it went
    one, other = digits.load(0), digits.load(1)
    sizes = [len(part.labels) for part in one]
    assert sizes == [700, 100, 397, 600]
    assert torch.equal(one.test.labels, other.test.labels)
    assert not torch.equal(one.train.labels, other.train.labels)
    assert one.train.labels.bincount().min() >= 9
    for part in one:
        assert part.images.min() >= 0
        assert part.images.max() <= 1
    assert all(torch.equal(a, b) for p, q in zip(one, digits.load(0)) for a, b in zip(p, q))
    with pytest.raises(ValueError, match="between 10"):
        digits.load(0, labels=5)


@pytest.mark.parametrize("kind", digits.CORRUPTIONS)
def test_corruptions_grow_with_severity(kind):
    images = digits.load(0).test.images
    distances = []
    for severity in digits.SEVERITIES:
        worse = digits.corrupt(images, kind, severity, torch.Generator().manual_seed(0))
        assert worse.shape == images.shape
        assert worse.min() >= 0
        assert worse.max() <= 1
        distances.append((worse - images).square().mean())
    assert all(a < b for a, b in itertools.pairwise(distances))
    large = digits.corrupt(torch.rand(2, 3, 64, 64), kind, 3, torch.Generator().manual_seed(0))
    assert large.shape == (2, 3, 64, 64)


def test_unknown_corruptions_are_refused():
    for kind, severity in (("fog", 1), ("blur", 6)):
        with pytest.raises(ValueError, match="kind is one of"):
            digits.corrupt(torch.rand(1, 1, 16, 16), kind, severity, torch.Generator())


def test_adapting_lowers_the_loss_and_is_repeatable():
    data = digits.load(0)

    def losses():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(digits.SIZE**2, 10))
        return digits.adapt(model, data.train, lambda p: torch.optim.AdamW(p, lr=1e-2), steps=40, seed=3)

    first = losses()
    assert sum(first[-5:]) < 0.8 * sum(first[:5])
    assert first == losses()
