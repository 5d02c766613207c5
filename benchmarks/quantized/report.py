"""Tables and pictures from the results of the study: paired differences, 95 % t-intervals, Holm down each column."""

import math
from pathlib import Path

import numpy as np

from ..statistics import holm, paired
from .study import FORMATS, STRENGTHS, TASKS, TUNING_SEEDS, Store, make_config, rows

COLUMNS = {  # title -> (format, part, accuracy 0 or loss 1, decimals)
    "full precision": ("full", "test", 0, 1),
    "int4, a scale a row": ("int4", "test", 0, 1),
    "int4, groups of 32": ("int4/32", "test", 0, 1),
    "NF4, groups of 64": ("nf4/64", "test", 0, 1),
    "int3, groups of 32": ("int3/32", "test", 0, 1),
    "out of domain": ("full", "ood", 0, 1),
    "loss": ("full", "test", 1, 3),
}
TITLES = {"efficientnet": "EfficientNet-Lite0, MNIST from 100 labels", "smollm2": "SmolLM2-135M, reasoning-gym problems"}
TITLES["minilm"] = "MiniLM-L6 (22M), sentiment of tweets"
LEAST_SEEDS = 6  # fewer are shown as tuning runs only


class TaskOnly:
    """What :func:`rows` asks of a task, without its data."""

    def __init__(self, name: str):
        import importlib

        self.steps, self.lr, self.grid = (
            getattr(getattr(importlib.import_module(f"benchmarks.tasks.{name}"), TASKS[name]), key)
            for key in ("steps", "lr", "grid")
        )


def by_seed(store: Store, config: dict, seeds) -> "dict[int, dict]":
    return {seed: metrics for seed in seeds if (metrics := store.get(config, seed)) is not None}


def difference_table(pairs: "list[tuple[str, dict, dict]]", reference: str = "plain") -> str:
    """``pairs``: name, metrics by seed, metrics of the reference by seed. Over the seeds that both have."""
    lines = ["| | seeds | " + " | ".join(f"{reference} | Δ {title}" for title in COLUMNS) + " |"]
    lines.append("|---" * (2 + 2 * len(COLUMNS)) + "|")
    cells = {}
    for title, (form, part, kind, digits) in COLUMNS.items():
        found = []
        for _, ours, theirs in pairs:
            common = sorted(set(ours) & set(theirs))
            value = [theirs[s][form][part][kind] for s in common]
            found.append((np.mean(value), *paired(np.array([ours[s][form][part][kind] for s in common]) - value)))
        for (name, *_), (mean, delta, half, _), p in zip(pairs, found, holm([f[3] for f in found])):
            star = "\\*" if p < 0.05 else ""
            cells[name, title] = f"{mean:.{digits}f} | {delta:+.{digits}f} ± {half:.{digits}f}{star}"
    for name, ours, theirs in pairs:
        lines.append(f"| {name} | {len(set(ours) & set(theirs))} | " + " | ".join(cells[name, t] for t in COLUMNS) + " |")
    return "\n".join(lines)


def lost(metrics: dict, form: str) -> float:
    return metrics["full"]["test"][0] - metrics[form]["test"][0]


def lost_table(named: "dict[str, dict[int, dict]]") -> str:
    """What rounding costs, in points of accuracy, with the share of what it costs plain LoRA."""
    formats = ("int4", "int4/128", "int4/64", "int4/32", "nf4/64")
    lines = ["| | norm of sBA over that of W, % | " + " | ".join(formats) + " |", "|---" * (2 + len(formats)) + "|"]
    for name, ours in named.items():
        common = sorted(set(ours) & set(named["plain"]))
        cells = []
        for form in formats:
            mean, plain = (np.mean([lost(of[s], form) for s in common]) for of in (ours, named["plain"]))
            cells.append(f"{mean:.1f} ({mean / plain:.2f})" if name != "plain" and plain else f"{mean:.1f}")
        update = 100 * np.mean([ours[s]["relative_update"] for s in common])
        lines.append(f"| {name} | {update:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning_table(store: Store) -> str:
    """Means over the tuning seeds, at every lr that was tried."""
    shown = {"full precision": "full", "int4": "int4", "int4/32": "int4/32", "NF4": "nf4/64", "int3/32": "int3/32"}
    lines = ["| | lr | seeds | " + " | ".join(shown) + " | out of domain | loss |", "|---" * (5 + len(shown)) + "|"]
    groups: dict[tuple, list[dict]] = {}
    for run in store.runs.values():
        if run["seed"] in TUNING_SEEDS:
            c = run["config"]
            groups.setdefault((list(STRENGTHS).index(c["method"]), c["method"], c["strength"], c["lr"]), []).append(run)
    for (_, method, strength, lr), runs in sorted(groups.items(), key=lambda item: item[0]):
        metrics = [run["metrics"] for run in runs]
        cells = [f"{np.mean([m[f]['test'][0] for m in metrics]):.1f}" for f in shown.values()]
        cells += [f"{np.mean([m['full']['ood'][k] for m in metrics]):.{d}f}" for k, d in ((0, 1),)]
        cells.append(f"{np.mean([m['full']['test'][1] for m in metrics]):.3f}")
        name = method if method == "plain" else f"{method} {strength:g}"
        lines.append(f"| {name} | {lr:g} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def on_tuning_seeds(task: TaskOnly, store: Store) -> "list[tuple[str, dict, dict]]":
    """Methods at every strength and lr that at least two tuning seeds have, against plain at its own lr."""
    plain = by_seed(store, make_config(task, "plain", 0.0, store.chosen["lr"]["plain"]), TUNING_SEEDS)
    configs = {Store.key(r["config"], 0): r["config"] for r in store.runs.values() if r["seed"] in TUNING_SEEDS}
    found = []
    for config in sorted(configs.values(), key=lambda c: (list(STRENGTHS).index(c["method"]), c["strength"], c["lr"])):
        ours = by_seed(store, config, TUNING_SEEDS)
        finite = all(math.isfinite(m["full"]["test"][1]) for m in ours.values())
        if len(ours) > 1 and finite and ours != plain:
            found.append((f"{config['method']} {config['strength']:g}, lr {config['lr']:g}", ours, plain))
    return found


def equal_accuracy(named: "dict[str, dict[int, dict]]") -> "list[tuple[str, dict, dict]]":
    """Each row of group noise with the row of filter noise that is nearest in validation accuracy at full precision."""

    def accuracy(name):
        return np.mean([m["full"]["validation"][0] for m in named[name].values()])

    flats = [name for name in named if name.startswith("flat") and "," not in name]
    found = []
    for name in named:
        if name.startswith("group"):
            nearest = min(flats, key=lambda flat: abs(accuracy(flat) - accuracy(name)))
            found.append((f"{name} against {nearest}", named[name], named[nearest]))
    return found


def picture(path: Path, title: str, named: "dict[str, dict[int, dict]]") -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    forms = ("full", "int8", "int4/32", "int4/64", "int4/128", "int4", "int3/32", "int3/64")
    shown = [name for name in named if name in ("plain", "plain, lr × 2") or (name.startswith("flat") and "," not in name)]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, sum(n.startswith("flat") for n in shown)))
    styles = {n: {"color": c, "marker": "o"} for n, c in zip([n for n in shown if n.startswith("flat")], colours)}
    styles |= {
        "plain": {"color": "black", "marker": "s"},
        "plain, lr × 2": {"color": "grey", "linestyle": ":", "marker": "s"},
    }
    for name in shown:
        values = np.array([[m[f]["test"][0] for f in forms] for m in named[name].values()])
        half = [paired(column)[1] for column in values.T]
        axis.errorbar(range(len(forms)), values.mean(0), half, label=name, capsize=2, linewidth=1.5, **styles[name])
    axis.set_xticks(range(len(forms)), ["full", *(f.replace("/", ", groups of ") for f in forms[1:])], rotation=20)
    axis.set(ylabel="test accuracy, %", title=title)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def frontier(path: Path, title: str, named: "dict[str, dict[int, dict]]") -> None:
    """Accuracy in 4 bits against accuracy at full precision: plain LoRA along its learning rates, noise along σ. What lies
    above the line of the learning rates is bought by more than those."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    forms = {"int4": "int4, one scale a row", "int4/32": "int4, groups of 32", "nf4/64": "NF4, groups of 64"}
    times = {"plain, lr × ½": 0.5, "plain": 1, "plain, lr × 1.5": 1.5, "plain, lr × 2": 2, "plain, lr × 3": 3}
    lines = {"plain, by lr": ({n: f"×{t:g}" for n, t in times.items() if n in named}, "black", "s")}
    for end, label, colour in (("", "flat, by σ", "tab:blue"), (", lr × 2", "flat at twice the lr", "tab:orange")):
        names = [n for n in named if n.startswith("flat σ") and n.partition(",")[1] + n.partition(",")[2] == end]
        lines[label] = ({n: n.split()[2].strip(",") for n in names}, colour, "o")
    figure, axes = pyplot.subplots(1, len(forms), figsize=(13, 4.2), layout="constrained")
    for axis, (form, form_title) in zip(axes, forms.items()):
        for label, (points, colour, marker) in lines.items():
            if not points:
                continue
            seeds = sorted(set.intersection(*(set(named[n]) for n in points)))  # the last seed may lack some rows
            values = np.array([[[named[n][s][f]["test"][0] for f in ("full", form)] for s in seeds] for n in points])
            x, y = values.mean(1).T
            half = [paired(v)[1] for v in values[..., 1]]
            axis.errorbar(x, y, half, color=colour, marker=marker, label=label, capsize=2, linewidth=1)
            for each, text in zip(zip(x, y), points.values()):
                axis.annotate(text, each, xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
        axis.set(xlabel="test accuracy at full precision, %", title=form_title)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(results: Path, tasks: "list[str]") -> None:
    """``quantized.md`` and ``quantized_<task>.png`` beside the JSON."""
    text = [
        "Written by `python -m benchmarks.quantized --report` from the `quantized_*.json` beside it. Accuracy in %, loss in "
        "nats, on the test set; Δ = row - reference over paired seeds ± the half-width of its 95 % t-interval (not "
        "adjusted). \\*: p < .05 after Holm's adjustment over the rows of that table, per column."
    ]
    for name in tasks:
        store = Store(results / f"quantized_{name}.json")
        if not store.chosen:
            continue
        text.append(f"## {TITLES[name]}\n\n{', '.join(f'{k} {v}' for k, v in store.environment.items())}")
        error = next(iter(store.runs.values()))["metrics"]["error"]
        text.append(
            "Rounding's relative rms error of the merged weights, which is the σ of noise as large: "
            + ", ".join(f"{form} {error[form]:.3f}" for form in FORMATS)
            + "."
        )
        task = TaskOnly(name)
        seeds = sorted({run["seed"] for run in store.runs.values()} - set(TUNING_SEEDS))
        named = {n: by_seed(store, config, seeds) for n, config in rows(task, store.chosen).items()}
        named = {n: found for n, found in named.items() if len(found) >= LEAST_SEEDS}
        if "plain" in named:
            chosen = ", ".join(f"{m} lr {lr:g}" for m, lr in store.chosen["lr"].items())
            text.append(f"Chosen on seeds {min(TUNING_SEEDS)}-{max(TUNING_SEEDS)}: {chosen}.")
            text.append(difference_table([(n, found, named["plain"]) for n, found in named.items() if n != "plain"]))
            text.append("### What rounding costs, in points (and as a share of what it costs plain)\n\n" + lost_table(named))
            if pairs := equal_accuracy(named):
                text.append(
                    "### Noise by groups against noise by filter, nearest in validation accuracy at full precision\n\n"
                    + difference_table(pairs, "filter noise")
                )
            picture(results / f"quantized_{name}.png", TITLES[name], named)
            text.append(f"![{TITLES[name]}](quantized_{name}.png)")
            frontier(results / f"quantized_{name}_frontier.png", TITLES[name], named)
            text.append(f"![In 4 bits against full precision](quantized_{name}_frontier.png)")
        else:
            text.append("Rows on seeds of their own: *not measured*. On the tuning seeds, against plain LoRA at its lr:")
            text.append(difference_table(on_tuning_seeds(task, store)))
        text.append("### Tuning seeds\n\n" + tuning_table(store))
    (results / "quantized.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
