"""Tables and pictures from the results of the study: paired differences, 95 % t-intervals, Holm down each column."""

import importlib
from pathlib import Path
from statistics import mode

import numpy as np

from ..statistics import holm, paired
from .study import FORMATS, SEEDS, STRENGTHS, TASKS, TUNING_SEEDS, Store, label, plain_of

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


def steps_of(name: str) -> int:
    """The number of steps of a task, without its data."""
    return getattr(importlib.import_module(f"benchmarks.tasks.{name}"), TASKS[name]).steps


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


def lost_table(pairs: "list[tuple[str, dict, dict]]") -> str:
    """What rounding costs in points of accuracy, and the share of what it costs plain LoRA where that is a point or more."""
    formats = ("int4", "int4/128", "int4/64", "int4/32", "nf4/64")
    lines = ["| | norm of sBA over that of W, % | " + " | ".join(formats) + " |", "|---" * (2 + len(formats)) + "|"]
    for name, ours, theirs in pairs:
        common = sorted(set(ours) & set(theirs))
        cells = []
        for form in formats:
            mean, plain = (np.mean([lost(of[s], form) for s in common]) for of in (ours, theirs))
            cells.append(f"{mean:.1f} ({mean / plain:.2f})" if ours is not theirs and plain >= 1 else f"{mean:.1f}")
        update = 100 * np.mean([ours[s]["relative_update"] for s in common])
        lines.append(f"| {name} | {update:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuned_table(along: "dict[str, dict[float, dict]]") -> str:
    """Plain LoRA at the lr and noise at the lr and σ that are best for the very format. For each seed they are chosen by the
    other seeds' validation accuracy in that format, and that seed's test accuracy counts."""
    rows = {(line, lr): seeds for line, lrs in along.items() for lr, seeds in lrs.items()}
    most = max(map(len, rows.values()))
    rows = {row: seeds for row, seeds in rows.items() if len(seeds) >= 0.75 * most}
    seeds = sorted(set.intersection(*(set(each) for each in rows.values())))
    lines = ["| format | plain | Δ noise | Δ there at full precision | plain's lr | noise's σ and lr |", "|---" * 6 + "|"]

    def chosen(mine: "list[tuple[str, float]]", form: str) -> "list[tuple[str, float]]":
        """For each seed the row that the others choose."""

        def validation(row, but):
            return np.mean([rows[row][s][form]["validation"][0] for s in seeds if s != but])

        return [max(mine, key=lambda row: validation(row, but=seed)) for seed in seeds]

    plain_rows, noisy_rows = ([row for row in rows if (row[0] == "plain") is plain] for plain in (True, False))
    found = {}
    for form in ("full", *FORMATS):
        best = [chosen(mine, form) for mine in (plain_rows, noisy_rows)]
        plain, noisy = (
            np.array([[rows[row][seed][f]["test"][0] for f in (form, "full")] for row, seed in zip(each, seeds)])
            for each in best
        )
        deltas = [paired(each) for each in (noisy - plain).T]
        found[form] = plain[:, 0].mean(), deltas, [mode(each) for each in best]
    stars = dict(zip(found, holm([deltas[0][2] for _, deltas, _ in found.values()])))
    for form, (plain, (here, full), ((_, lr), (sigma, its_lr))) in found.items():
        star = "\\*" if stars[form] < 0.05 else ""
        lines.append(
            f"| {form} | {plain:.1f} | {here[0]:+.1f} ± {here[1]:.1f}{star} | {full[0]:+.1f} ± {full[1]:.1f} | {lr:g} | "
            f"{sigma}, {its_lr:g} |"
        )
    return f"Over {len(seeds)} seeds; the settings most seeds chose.\n\n" + "\n".join(lines)


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


def pairs_of(store: Store, configs, seeds, steps: int) -> "dict[str, tuple[str, dict, dict]]":
    """Each row with enough of ``seeds``, and plain LoRA's by the same lr."""
    found = {}
    for config in sorted(configs, key=place):
        ours, plain = by_seed(store, config, seeds), plain_of(config, steps)
        theirs = ours if plain == config else by_seed(store, plain, seeds)
        if len(set(ours) & set(theirs)) >= LEAST_SEEDS:
            row = label(config, steps)
            found[row] = (row, ours, theirs)
    return found


def equal_accuracy(named: "dict[str, dict[int, dict]]", lr: float) -> "list[tuple[str, dict, dict]]":
    """Each row of group noise with the row of filter noise that is nearest in validation accuracy at full precision."""

    def accuracy(name):
        return np.mean([m["full"]["validation"][0] for m in named[name].values()])

    flats = [f"flat σ {s:g}, lr {lr:g}" for s in STRENGTHS["flat"]]
    found = []
    for name in named:
        if name.startswith("group") and name.endswith(f", lr {lr:g}"):
            nearest = min((flat for flat in flats if flat in named), key=lambda flat: abs(accuracy(flat) - accuracy(name)))
            names = (each.rpartition(", lr ")[0] for each in (name, nearest))
            found.append((" against ".join(names), named[name], named[nearest]))
    return found


def by_sigma(named: "dict[str, dict[int, dict]]") -> "dict[str, dict[float, dict]]":
    """Plain LoRA and the noise's σ -> lr -> metrics by seed; nothing where they have no lr in common."""
    found = {}
    for line in ("plain", *(f"flat σ {s:g}" for s in STRENGTHS["flat"])):
        along = {float(n.rpartition(" lr ")[2]): m for n, m in named.items() if n.rpartition(", lr ")[0] == line}
        if along:
            found[line.replace("flat ", "")] = along
    return found if "plain" in found and set.intersection(*map(set, found.values())) else {}


def best_lr(along: "dict[str, dict[float, dict]]") -> float:
    """Plain LoRA's best by validation accuracy at full precision, among those that every σ has."""
    common = set.intersection(*map(set, along.values()))
    return max(common, key=lambda lr: np.mean([m["full"]["validation"][0] for m in along["plain"][lr].values()]))


def styles(labels) -> "dict[str, dict]":
    from matplotlib import pyplot

    noisy = [label for label in labels if label != "plain"]
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, len(noisy)))
    return {"plain": {"color": "black", "marker": "s"}} | {n: {"color": c, "marker": "o"} for n, c in zip(noisy, colours)}


def picture(path: Path, title: str, along: "dict[str, dict[float, dict]]", lr: float) -> None:
    """Accuracy against format, one line a σ, at one lr."""
    from matplotlib import pyplot

    forms = ("full", "int8", "int4/32", "int4/64", "int4/128", "int4", "int3/32", "int3/64")
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for line, style in styles(along).items():
        values = np.array([[m[f]["test"][0] for f in forms] for m in along[line][lr].values()])
        half = [paired(column)[1] for column in values.T]
        axis.errorbar(range(len(forms)), values.mean(0), half, label=line, capsize=2, linewidth=1.5, **style)
    axis.set_xticks(range(len(forms)), ["full", *(f.replace("/", ", groups of ") for f in forms[1:])], rotation=20)
    axis.set(ylabel="test accuracy, %", title=f"{title}, lr {lr:g}")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def frontier(path: Path, title: str, along: "dict[str, dict[float, dict]]") -> None:
    """Accuracy at full precision and in few bits along the learning rate, one line a σ."""
    from matplotlib import pyplot

    forms = {"full": "full precision", "nf4/64": "NF4, groups of 64", "int4": "int4, one scale a row"}
    forms["int3/32"] = "int3, groups of 32"
    figure, axes = pyplot.subplots(1, len(forms), figsize=(14, 4), layout="constrained")
    for axis, (form, form_title) in zip(axes, forms.items()):
        for shift, (line, style) in enumerate(styles(along).items()):
            found = {lr: np.array([m[form]["test"][0] for m in seeds.values()]) for lr, seeds in sorted(along[line].items())}
            apart = [lr * 1.015 ** (shift - len(along) / 2) for lr in found]  # so that bars can be told apart
            mean, half = zip(*((v.mean(), paired(v)[1]) for v in found.values()))
            axis.errorbar(apart, mean, half, label=line, capsize=2, linewidth=1, **style)
        axis.set(xlabel="learning rate", title=form_title, xscale="log")
        lrs = sorted({lr for lines in along.values() for lr in lines})
        axis.set_xticks(lrs, [f"{lr:g}" for lr in lrs], fontsize=8)
        axis.minorticks_off()
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def place(config: dict) -> tuple:
    """Where its row stands in a table."""
    return list(STRENGTHS).index(config["method"]), "base" in config, "rank" in config, config["strength"]


def write(results: Path, tasks: "list[str]") -> None:
    """``quantized.md``, ``quantized_<task>.png`` and ``quantized_<task>_lr.png`` beside the JSON."""
    import matplotlib

    matplotlib.use("Agg")
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
        error = next(run["metrics"]["error"] for run in store.runs.values() if "base" not in run["config"])
        text.append(
            "Rounding's relative rms error of the merged weights, which is the σ of noise as large: "
            + ", ".join(f"{form} {error[form]:.3f}" for form in FORMATS)
            + "."
        )
        steps = steps_of(name)
        configs = {Store.key(run["config"], 0): run["config"] for run in store.runs.values()}.values()
        pairs = pairs_of(store, configs, SEEDS, steps)
        named = {row: ours for row, (_, ours, _) in pairs.items()}
        lr = store.chosen["lr"]["flat"]
        chosen = ", ".join(f"{m} {lr:g}" for m, lr in store.chosen["lr"].items())
        text.append(f"Learning rates chosen on seeds {min(TUNING_SEEDS)}-{max(TUNING_SEEDS)}: {chosen}.")
        for each in sorted({c["lr"] for c in configs}):
            here = [pair for row, pair in pairs.items() if row.endswith(f", lr {each:g}") and pair[1] is not pair[2]]
            if here:
                text.append(f"### At lr {each:g}, against plain LoRA at that lr\n\n" + difference_table(here))
        fresh = sorted({run["seed"] for run in store.runs.values() if SEEDS[-1] < run["seed"] < min(TUNING_SEEDS)})
        again = [pair for pair in pairs_of(store, configs, fresh, steps).values() if pair[1] is not pair[2]]
        if again:
            rows = f"{difference_table(again)}\n\n{lost_table(again)}"
            text.append(f"### Chosen by seeds {SEEDS[0]}-{SEEDS[-1]}, measured again on {fresh[0]}-{fresh[-1]}\n\n{rows}")
        text.append("### Tuning seeds\n\n" + tuning_table(store))
        along = by_sigma(named)
        if not along:
            continue
        best = best_lr(along)
        text.append("### Each tuned for the format that it is served in\n\n" + tuned_table(along))
        at = [pair for row, pair in pairs.items() if row.endswith((f", lr {lr:g}", f", lr {best:g}"))]
        text.append("### What rounding costs, in points (and as a share of what it costs plain)\n\n" + lost_table(at))
        if equal := equal_accuracy(named, lr):
            text.append(
                "### Noise by groups against noise by filter, nearest in validation accuracy at full precision\n\n"
                + difference_table(equal, "filter noise")
            )
        picture(results / f"quantized_{name}.png", TITLES[name], along, best)
        text.append(f"![{TITLES[name]}](quantized_{name}.png)")
        frontier(results / f"quantized_{name}_lr.png", TITLES[name], along)
        text.append(f"![Along the learning rate](quantized_{name}_lr.png)")
    (results / "quantized.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
