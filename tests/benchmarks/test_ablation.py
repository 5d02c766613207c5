"""The ablation benchmark: statistics against SciPy, what a run is, and the whole of it, small, twice."""

import json
import random

import numpy as np
import pytest
import torch
from scipy import stats

for extra in ("peft", "timm", "transformers", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(extra)

from benchmarks import statistics, tasks  # noqa: E402  after the skips
from benchmarks.ablation import __main__ as ablation  # noqa: E402
from benchmarks.ablation import report, settings, train  # noqa: E402
from benchmarks.ablation.store import Store  # noqa: E402
from benchmarks.tasks import text  # noqa: E402


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits(cache):
    return tasks.load("digits", "cpu", cache, quick=True)


@pytest.fixture(scope="module")
def passages(cache):
    return tasks.load("text", "cpu", cache, quick=True)


def test_paired_differences_are_scipys_t_test():
    gaps = np.random.default_rng(0).normal(0.4, 1, 10)
    mean, half, p = statistics.paired(gaps)
    expected = stats.ttest_1samp(gaps, 0)
    interval = expected.confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert p == pytest.approx(expected.pvalue)
    assert statistics.paired(np.zeros(5)) == (0, 0, 1)


def test_holm_by_hand():
    # sorted .01 .02 .03 .5: times 4, 3, 2, 1, and never below the one before
    assert statistics.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_settings_that_an_objective_does_not_read_do_not_make_another_run():
    assert train.canonical({"sigma": 0.1, "rho": 1.0}) == train.canonical({"objective": "plain"})
    assert train.canonical({"objective": "flat", "sigma": 0.1}) != train.canonical({"objective": "flat", "sigma": 0.2})
    with pytest.raises(ValueError, match="sigmma"):
        train.canonical({"sigmma": 0.1})
    with pytest.raises(ValueError, match="sharp"):
        train.canonical({"objective": "sharp"})


def test_every_study_reads_and_each_row_differs_from_its_reference_in_the_objective_alone():
    base, tuned = settings.read_base(False), {"sigma": 0.3, "lr": dict.fromkeys(train.ADAPTERS, 0.01)}
    studies = settings.read_studies([])
    assert [study["title"][:3] for study in studies.values()] == [f"({letter})" for letter in "abcdefghijk"]
    of_objectives = {key for keys in train.OBJECTIVES.values() for key in keys} | {"objective"}
    for study in studies.values():
        for _, config, reference in settings.pairs(study, base["digits"], tuned):
            differing = {key for key in {*config, *reference} if config.get(key) != reference.get(key)}
            assert "objective" in differing <= of_objectives
            assert reference["objective"] == "plain"
    assert not set(base["tuning"]["seeds"]) & set(range(100))
    with pytest.raises(SystemExit, match="no study nothing"):
        settings.read_studies(["nothing"])


def test_relative_settings():
    base, tuned = {"steps": 100, "labels": 40}, {"sigma": 0.4, "lr": {"lora": 0.01}}
    config = settings.settings(
        base, tuned, {"objective": "flat", "sigma_times": 0.5, "labels_times": 0.25, "steps_times": 3}
    )
    assert (config["sigma"], config["labels"], config["steps"]) == (0.2, 10, 300)


@pytest.mark.parametrize("name", ["digits", "passages"])
def test_tasks_keep_their_splits_apart_and_pairs_share_everything(name, request):
    task = request.getfixturevalue(name)
    labels = 20 if name == "digits" else 4
    x, y = task.train(3, labels)
    sets = task.evaluation(3, labels)
    assert set(sets) == {"validation", "test", "ood", "corrupted"}
    assert len(sets["corrupted"]) % 5 == 0
    training = {row.numpy().tobytes() for row in x}
    for split in ("validation", "test"):
        assert not training & {row.numpy().tobytes() for row in sets[split][0][0]}
    again = task.train(3, labels)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert not torch.equal(x, task.train(4, labels)[0])
    assert y.bincount().unique().numel() == 1  # as many of each class
    first, second = task.model(3), task.model(3)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert int(y.max()) + 1 == {"digits": 10, "passages": len(text.CLASSES)}[name]


def test_typing_errors_hit_the_share_asked_for():
    line = "the quick brown fox jumps over the lazy dog " * 200
    assert text.misspell(line, 0.0, random.Random(0)) == line
    small, large = (text.misspell(line, share, random.Random(0)) for share in (0.02, 0.3))
    kept = [sum(a.count(word) for word in ("quick", "brown", "jumps")) / 600 for a in (small, large)]
    # a word of five letters survives with (1 - share)^5, or a little less by its neighbours; 600 words, ± 4 standard errors
    for k, share in zip(kept, (0.02, 0.3)):
        low, high = (1 - share) ** 6, (1 - share) ** 5
        assert low - 4 * (low * (1 - low) / 600) ** 0.5 < k < high + 4 * (high * (1 - high) / 600) ** 0.5 + share / 25


@pytest.mark.parametrize("adapter", train.ADAPTERS)
def test_every_adapter_starts_as_the_source_model_and_is_seen_by_flatopt(digits, adapter):
    config = train.canonical({"adapter": adapter, "rank": 2, "objective": "flat", "sigma": 0.3, "steps": 4, "labels": 20})
    source = digits.model(0).eval()
    images = digits.train(0, 20)[0]
    expected = source(images)
    model = train.adapt(digits.model(0), digits, config).eval()
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    optimizer = train.make_optimizer(model, config, 0)
    assert sum(len(group["targets"]) for group in optimizer.perturb_groups) == 12  # four layers in each of three blocks
    assert len(train.base_weights(model)) == 12


def test_without_fan_in_the_noise_does_not_shrink_with_it(digits):
    config = train.canonical({"objective": "flat", "sigma": 0.2, "fan_in": False, "steps": 4})
    model = train.adapt(digits.model(0), digits, config)
    groups = train.make_optimizer(model, config, 0).perturb_groups
    sizes = [group["targets"][0].rows().shape[1] for group in groups]
    constant = [group["sigma"] / size**0.5 for group, size in zip(groups, sizes)]  # times the row norm: the element's std
    assert constant == pytest.approx([0.2 / (sum(sizes) / len(sizes)) ** 0.5] * 12)


def test_a_run_repeats_and_sam_and_restore_are_measured(digits):
    config = {"rank": 2, "steps": 3, "batch": 8, "labels": 20}
    flat = {**config, "objective": "flat", "sigma": 0.3}
    first, second = (train.run(digits, flat, 1) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert len(first["corrupted_accuracy"]) == 5
    sam = train.run(digits, {**config, "objective": "sam", "space": "full"}, 1)
    assert 0 <= sam["test_accuracy"] <= 100
    exact, drifted = (train.run(digits, {**flat, "dtype": "bfloat16", "restore": r}, 1) for r in ("reversible", "subtract"))
    assert exact["weights_changed"] == exact["drift"] == 0
    assert exact["pristine_loss"] == exact["test_loss"]
    assert drifted["weights_changed"] > 1
    assert drifted["drift"] > 0


def test_costs_are_those_of_the_cost_benchmark():
    results = json.loads(report.COSTS.read_text(encoding="utf-8"))
    rows = {
        line.split(" | ")[0].strip("| "): line.count("|") for line in report.cost_table(results).splitlines() if "|" in line
    }
    assert set(rows) >= {"plain LoRA", "ours, reversible", "SAM on the adapter", "SAM on W"}
    assert len(set(rows.values())) == 1  # as many cells in each
    row = next(r for r in results["models"]["llama-7b"]["rows"] if (r["method"], r["accumulation"]) == ("SAM on W", 1))
    assert f"| SAM on W | {row['parts']['device_ratio']['median']:.3f} ± " in report.cost_table(results)


def test_the_benchmark_runs_resumes_and_reports(cache, tmp_path, monkeypatch):
    arguments = [
        "schedule",
        "severity",
        "landscape",
        "--quick",
        "--tasks",
        "digits",
        "text",
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    arguments += ["--cache", str(cache), "--results", str(tmp_path)]
    ablation.main(arguments)
    stored = {name: json.loads((tmp_path / f"ablation_{name}.json").read_text()) for name in ("digits", "text")}
    for content in stored.values():
        # tuning: each adapter, a σ, a ρ in each space; plain and four schedules (severity has one); four landscapes
        assert len(content["runs"]) == 7 + 1 + 2 + (5 + 4) * 2
        assert set(content["tuned"]["lr"]) == set(train.ADAPTERS)
        assert content["tuned"]["rho"] == {"adapter": 0.05, "full": 0.05}
    page = (tmp_path / "ablation.md").read_text()
    assert page.count("| constant, σ/2 |") == 4  # a task: against plain, and against the cosine
    runs = {
        (r["config"]["objective"], r["config"].get("schedule"), r["seed"]): r["metrics"]
        for r in stored["text"]["runs"]
        if not r["config"]["landscape"]
    }
    plain = [runs["plain", None, seed]["test_accuracy"] for seed in (0, 1)]
    linear = [runs["flat", "linear", seed]["test_accuracy"] for seed in (0, 1)]
    half = stats.t.ppf(0.975, 1) * abs(np.diff(np.subtract(linear, plain))[0]) / 2
    expected = f"| linear | {np.mean(plain):.2f} | {np.mean(linear) - np.mean(plain):+.2f} ± {half:.2f}"
    assert expected in page
    for picture in ("ablation_schedule.png", "ablation_severity.png", "ablation_landscape_text_surfaces.png"):
        assert picture in page
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    letter = page.split("\n## ")[1][:3]
    (tmp_path / "results.md").write_text(f"words\n<!-- {letter} -->\nold\n<!-- end -->\nmore words\n")
    report.fill(tmp_path / "results.md", tmp_path)
    filled = (tmp_path / "results.md").read_text()
    assert "\nold\n" not in filled
    assert expected in filled
    assert filled.startswith("words")
    assert filled.endswith("more words\n")

    def not_again(*_):
        raise AssertionError("a run that is there was run again")

    monkeypatch.setattr(train, "run", not_again)
    ablation.main(arguments)
    known = {Store.key(r["config"], r["seed"]): r["metrics"] for r in stored["digits"]["runs"]}
    lost = next(r for r in stored["digits"]["runs"] if r["seed"] == 0)
    stored["digits"]["runs"].remove(lost)
    (tmp_path / "ablation_digits.json").write_text(json.dumps(stored["digits"]))
    again = []

    def remember(task, config, seed):
        again.append((config, seed))
        return known[Store.key(config, seed)]

    monkeypatch.setattr(train, "run", remember)
    ablation.main(arguments)
    assert again == [(lost["config"], lost["seed"])]

    stored["digits"]["environments"][0]["torch"] = "0.1"  # runs of another version count for nothing here
    (tmp_path / "ablation_digits.json").write_text(json.dumps(stored["digits"]))
    ablation.main(arguments)
    assert len(again) == 1 + (5 + 4) * 2
