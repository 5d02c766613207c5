"""The digits task, and the benchmark of corruption on it."""

import itertools
import json

import pytest
import torch

for extra in ("peft", "timm", "sklearn", "matplotlib", "rich", "scipy"):
    pytest.importorskip(extra)

from benchmarks import corruption  # noqa: E402  after the skips
from benchmarks.tasks import digits  # noqa: E402


def test_the_benchmark_of_corruption_writes_the_comparison(tmp_path):
    corruption.main(["--quick", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path)])
    assert (tmp_path / "corruption.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "corruption.json").read_text())
    assert record["command"].startswith("python -m benchmarks.corruption --quick --seeds 2")
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    for name, row in record["summary"].items():
        pairs = [[corruption.measures(run[arm])[name] for arm in corruption.ARMS] for run in record["runs"]]
        mean = sum(flat - plain for plain, flat in pairs) / 2
        assert row["difference"]["mean"] == pytest.approx(mean, abs=1e-9)
        assert row["difference"]["low"] <= mean <= row["difference"]["high"]
    run = record["runs"][0]
    assert run["plain"]["train_loss"] != run["flat"]["train_loss"]
    assert set(run["flat"]["corrupted"]) == set(digits.CORRUPTIONS)


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
