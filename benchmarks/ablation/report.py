"""Tables and pictures from the results: paired differences, 95 % t-intervals, Holm's adjustment over each table."""

import json
import os
import re
from pathlib import Path

import numpy as np

from flatopt import flatness

from ..statistics import LEVEL, holm, paired
from .settings import pairs

COSTS = Path(__file__).parents[1] / "results" / "cost_nvidia-h200.json"
COLUMNS = {  # title -> what is taken from a run's metrics, decimals
    "accuracy, %": (lambda m: m["test_accuracy"], 2),
    "corrupted, %": (lambda m: float(np.mean(m["corrupted_accuracy"])), 2),
    "out of domain, %": (lambda m: m["ood_accuracy"], 2),
    "test loss": (lambda m: m["test_loss"], 3),
    "train loss": (lambda m: m["train_loss"], 3),
}


def paired_runs(store, study: dict, base: dict, seeds: int) -> "list[tuple[str, list[dict], list[dict]]]":
    """``(name, metrics by seed, metrics of the reference by seed)`` of every row, from the environment that ``store`` is at;
    empty unless all seeds of all rows were run there."""
    rows = [row for row in pairs(study, base, store.tuned) if row[1] != row[2]] if store.tuned else []
    found = [(row[0], *([store.get(c, seed) for seed in range(seeds)] for c in row[1:])) for row in rows]
    return found if all(None not in side for row in found for side in row[1:]) else []


def complete(store, study: dict, base: dict, seeds: int) -> "list[tuple[str, list[dict], list[dict]]]":
    """:func:`paired_runs` of the first environment that has any, where ``store.index`` is left; empty if there is none."""
    for index in range(len(store.environments)):
        store.index = index
        if found := paired_runs(store, study, base, seeds):
            return found
    return []


def differences(rows, take) -> "list[tuple[float, float, float, float]]":
    """Per row: mean of the reference, paired difference, its half-width, and the p-value adjusted over the rows."""
    result = []
    for _, runs, references in rows:
        ours, theirs = (np.array([take(m) for m in side]) for side in (runs, references))
        result.append((theirs.mean(), *paired(ours - theirs)))
    return [(*r[:3], p) for r, p in zip(result, holm([r[3] for r in result]))]


def shown(reference: float, mean: float, half: float, p: float, digits: int) -> str:
    star = "\\*" if p < 1 - LEVEL else ""
    return f"{reference:.{digits}f} | {mean:+.{digits}f} ± {half:.{digits}f}{star}"


def table(rows) -> str:
    """A Markdown table: for each quantity the reference's mean and the paired difference from it."""
    heads = " | ".join(f"reference: {title} | Δ" for title in COLUMNS)
    lines = [f"| | {heads} |", "|---" * (1 + 2 * len(COLUMNS)) + "|"]
    columns = [[shown(*d, digits) for d in differences(rows, take)] for take, digits in COLUMNS.values()]
    lines += [f"| {row[0]} | {' | '.join(column[i] for column in columns)} |" for i, row in enumerate(rows)]
    return "\n".join(lines)


def pristine_table(rows) -> str:
    """What restoring did to W, and what the adapter loses when it is served on the W it was meant for."""
    lines = [
        "| restore | weights changed, % | relative drift, % | accuracy on its own W, % | Δ on the pristine W | Δ loss |"
    ]
    lines.append("|---" * 6 + "|")
    for name, runs, _ in rows:
        of = {key: np.array([m[key] for m in runs]) for key in runs[0] if not isinstance(runs[0][key], list)}
        accuracy = paired(of["pristine_accuracy"] - of["test_accuracy"])
        loss = paired(of["pristine_loss"] - of["test_loss"])
        lines.append(
            f"| {name} | {of['weights_changed'].mean():.1f} | {of['drift'].mean():.3f} | {of['test_accuracy'].mean():.2f} "
            f"| {accuracy[0]:+.2f} ± {accuracy[1]:.2f} | {loss[0]:+.4f} ± {loss[1]:.4f} |"
        )
    return "\n".join(lines)


def cost_table(results: dict) -> str:
    """What a step costs, from what ``benchmarks.cost`` measured: runs here share their machine and are too small to tell.

    The device's time is that of its ``--parts``; whole steps wait for the host there.
    """
    lines = ["| | " + " | ".join(f"{name}: GPU time of a step | GB" for name in results["models"]) + " |"]
    lines.append("|---" * (1 + 2 * len(results["models"])) + "|")
    for method in ("plain LoRA", "ours, reversible", "SAM on the adapter", "SAM on W"):
        cells = []
        for model in results["models"].values():
            rows = {row["method"]: row for row in model["rows"] if row["accumulation"] == 1}
            if method == "plain LoRA":
                milliseconds = rows["ours, reversible"]["parts"]["device_plain_ms"]["median"]
                cells += [f"{milliseconds:.1f} ms", f"{rows[method]['peak_gb']:.2f}"]
            else:
                ratio, over = rows[method]["parts"]["device_ratio"], rows[method]["peak_gb_over_plain"]
                cells += [f"{ratio['median']:.3f} ± {ratio['spread']:.3f} ×", f"{over:+.2f}"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    commands = f"Time and memory on one {results['device']} (`python -m benchmarks.cost`, then the same with `--parts`; "
    spread = "GPU time over plain, median ± half the range between the quartiles; peak memory, over plain"
    return f"{commands}{spread}):\n\n" + "\n".join(lines)


def severity_table(rows) -> str:
    lines = ["| severity | plain, % | flat, % | Δ |", "|---" * 4 + "|"]
    levels = len(rows[0][1][0]["corrupted_accuracy"])
    takes = [lambda m: m["test_accuracy"], *(lambda m, i=i: m["corrupted_accuracy"][i] for i in range(levels))]
    every = [differences(rows, take)[0] for take in takes]
    for level, (entry, p) in enumerate(zip(every, holm([e[3] for e in every]))):
        plain, mean, half, _ = entry
        star = "\\*" if p < 1 - LEVEL else ""
        lines.append(f"| {level or 'clean'} | {plain:.2f} | {plain + mean:.2f} | {mean:+.2f} ± {half:.2f}{star} |")
    return "\n".join(lines)


def differences_picture(path: Path, title: str, by_task: dict) -> None:
    """Δ accuracy, clean and corrupted, with intervals; a panel a task."""
    from matplotlib.figure import Figure

    rows = max(len(r) for r in by_task.values())
    figure = Figure(figsize=(5 * len(by_task), 1.7 + 0.32 * rows), layout="constrained")
    for axes, (task, rows) in zip(figure.subplots(1, len(by_task), squeeze=False)[0], by_task.items()):
        y = np.arange(len(rows))[::-1]
        for shift, name, colour in ((0.13, "accuracy, %", "C0"), (-0.13, "corrupted, %", "C1")):
            _, mean, half, _ = zip(*differences(rows, COLUMNS[name][0]))
            axes.errorbar(mean, y + shift, xerr=half, fmt="o", ms=4, capsize=2, color=colour, label=name)
        axes.axvline(0, color="0.6", lw=1, zorder=0)
        axes.set_yticks(y, [row[0] for row in rows])
        axes.set(title=task, xlabel="difference from the reference, points")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def severity_picture(path: Path, title: str, by_task: dict) -> None:
    """Accuracy by severity, plain and flat, and their paired difference below; a column a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(by_task), 5), layout="constrained")
    axes = figure.subplots(2, len(by_task), squeeze=False, sharex=True)
    for column, (task, rows) in enumerate(by_task.items()):
        top, bottom = axes[0][column], axes[1][column]
        levels = range(1 + len(rows[0][1][0]["corrupted_accuracy"]))
        per_level = [[[m["test_accuracy"], *m["corrupted_accuracy"]] for m in side] for side in rows[0][1:]]
        for label, values in zip(("flat", "plain"), per_level):
            top.plot(levels, np.mean(values, axis=0), "o-", ms=4, label=label)
        gaps = np.array(per_level[0]) - np.array(per_level[1])
        mean, half, _ = zip(*(paired(gaps[:, i]) for i in levels))
        bottom.errorbar(levels, mean, yerr=half, fmt="o-", ms=4, capsize=2, color="C2")
        bottom.axhline(0, color="0.6", lw=1, zorder=0)
        top.set(title=task, ylabel="accuracy, %")
        bottom.set(xlabel="severity", ylabel="flat - plain, points", xticks=levels)
        bottom.set_xticklabels(["clean", *levels[1:]])
        top.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def landscape_table(rows) -> str:
    lines = ["| | expected sharpness of plain, nats | Δ |", "|---" * 3 + "|"]
    for row, entry in zip(rows, differences(rows, lambda m: m["expected_sharpness"])):
        lines.append(f"| {row[0]} | {shown(*entry, 4)} |")
    return "\n".join(lines)


def landscape_pictures(folder: Path, by_task: dict) -> "list[str]":
    """Curves, the mean over seeds, and the surfaces of seed 0, in the manner of the paper's Figure 6."""
    names = []
    for task, rows in by_task.items():
        curves, surfaces = {}, {}
        for name, *both in rows:
            at = np.array(both[0][0]["curve"]["position"])
            mean = [np.mean([m["curve"]["loss"] for m in side], axis=0) for side in both]
            curves[name] = {label: flatness.Curve(at, loss) for label, loss in zip(("flat", "plain"), mean)}
            found = [{key: np.array(value) for key, value in side[0]["surface"].items()} for side in both]
            surfaces[name] = {label: flatness.Surface(**surface) for label, surface in zip(("flat", "plain"), found)}
        for kind, figure in (("curves", flatness.plot_curves(curves)), ("surfaces", flatness.plot_contours(surfaces))):
            figure.suptitle(f"{task}: training loss around the merged weights")
            names.append(f"ablation_landscape_{task}_{kind}.png")
            figure.savefig(folder / names[-1], dpi=110)
    return names


def write(folder: Path, studies: dict, base: dict, stores: dict, seeds: int) -> None:
    """``ablation.md`` and a picture a study in ``folder``, from the runs that are there."""
    parts = []
    for name, study in studies.items():
        by_task = {task: complete(store, study, base[task], seeds) for task, store in stores.items()}
        by_task = {task: rows for task, rows in by_task.items() if rows}
        if by_task:
            where = {task: stores[task].environments[stores[task].index]["device"] for task in by_task}
            also = {}
            if "also_against" in study:
                other = {**study, "reference": study["also_against"]}
                also = {task: paired_runs(stores[task], other, base[task], seeds) for task in by_task}
            parts.append(section(folder, name, study, by_task, also, where, seeds))
    if parts:
        (folder / "ablation.md").write_text("\n".join([head(stores), *parts]), encoding="utf-8")


def section(folder: Path, name: str, study: dict, by_task: dict, also: dict, where: dict, seeds: int) -> str:
    """A study in Markdown; its pictures are saved on the way."""
    by, pictures = study.get("by"), [f"ablation_{name}.png"]
    if by == "landscape":
        pictures = landscape_pictures(folder, by_task)
    elif by == "severity":
        severity_picture(folder / pictures[0], study["title"], by_task)
    else:
        differences_picture(folder / pictures[0], study["title"], by_task)
    make_table = {"severity": severity_table, "landscape": landscape_table}.get(by, table)
    parts = [f"## {study['title']}", study["question"], f"`python -m benchmarks.ablation {name}`"]
    for task, rows in by_task.items():
        parts += [f"**{task}**, {seeds} paired seeds, {where[task]}", make_table(rows)]
        if also:
            parts += [f"The same runs against {study['also_against']['name']}:", table(also[task])]
        if "pristine_accuracy" in rows[0][1][0]:
            parts.append(pristine_table(rows))
    if study.get("costs") and COSTS.exists():
        parts.append(cost_table(json.loads(COSTS.read_text(encoding="utf-8"))))
    parts += [f"![{study['title']}]({picture})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def fill(page: Path, folder: Path) -> None:
    """Put the sections of ``ablation.md`` into ``page``, each between the marks ``<!-- (a) -->`` and ``<!-- end -->``."""
    written = (folder / "ablation.md").read_text(encoding="utf-8").split("\n## ")
    by_letter = {part[:3]: part.split("\n\n", 1)[1].strip() for part in written[1:]}
    by_letter["(0)"] = written[0].split("\n\n", 1)[1].strip()
    where = os.path.relpath(folder, page.parent)
    text = page.read_text(encoding="utf-8")
    for letter, content in by_letter.items():
        content = content.replace("](ablation_", f"]({where}/ablation_")
        pattern = re.escape(f"<!-- {letter} -->") + ".*?" + re.escape("<!-- end -->")
        text = re.sub(pattern, lambda _, c=content, l=letter: f"<!-- {l} -->\n{c}\n<!-- end -->", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def head(stores: dict) -> str:
    lines = [
        "# Ablations",
        "",
        "Written by `python -m benchmarks.ablation --report` from the `ablation_*.json` beside it. Mean over paired seeds "
        "of the reference, and Δ = row - reference, ± the half-width of its 95 % t-interval (not adjusted). \\*: p < .05 "
        "after Holm's adjustment over the rows of that table, per column.",
        "",
    ]
    for task, store in stores.items():
        if store.tuned:
            lr = ", ".join(f"{adapter} {rate:g}" for adapter, rate in store.tuned["lr"].items())
            seeds = store.tuned["grid"]["seeds"]
            rho = "; ρ {adapter:g} on (A, B), {full:g} on W".format(**store.tuned["rho"]) if "rho" in store.tuned else ""
            chosen = f"σ {store.tuned['sigma']:g}; lr {lr}{rho}"
            lines.append(f"- {task}: {chosen}; chosen on seeds {seeds[0]}-{seeds[-1]}.")
            for environment in store.environments:
                lines.append(f"  - {', '.join(f'{key} {value}' for key, value in environment.items())}")
    return "\n".join([*lines, ""])
