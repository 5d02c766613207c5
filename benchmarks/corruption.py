"""A small ViT adapted to shifted digits, plain and flat over paired seeds: accuracy by kind and severity of corruption.

    python -m benchmarks.corruption --seeds 40      # 3 minutes on an H200 with 16 cores

A seed's two runs share the source model, the adapter's initial values, the batches and the test images. The settings were
chosen by validation accuracy on seeds 100 to 103 (``python -m benchmarks.tune_digits`` repeats it); the seeds reported here,
0 and up, and the test images played no part. Writes ``corruption.json`` and ``.png`` into ``benchmarks/results``.
"""

import argparse
import concurrent.futures
import copy
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import peft
import rich.console
import rich.progress
import rich.table
import timm
import torch
from torch import nn

import flatopt

from .statistics import paired
from .tasks import digits

ARMS = ("plain", "flat")
SETTINGS = {"sigma": 0.45, "rank": 4, "labels": 100, "steps": 800, "batch": 25, "lr": 1e-2, "weight_decay": 0.01}
SOURCE_STEPS = 600
ADAPTED = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def adapted(source: nn.Module, data: digits.Digits, settings: dict, seed: int) -> "tuple[nn.Module, list[float]]":
    """A copy of ``source`` with LoRA trained on ``data.train``, flat if ``sigma`` > 0; the losses of its steps."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=settings["rank"], lora_alpha=16, target_modules=ADAPTED)
    model = peft.get_peft_model(copy.deepcopy(source), config)

    def make_optimizer(parameters):
        optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=settings["weight_decay"])
        if settings["sigma"] == 0:
            return optimizer
        noise = {"sigma": settings["sigma"], "total_steps": settings["steps"], "seed": seed}
        return flatopt.FlatPerturbOptimizer(optimizer, model, **noise)

    return model, digits.adapt(model, data.train, make_optimizer, settings["steps"], settings["batch"], seed)


def run_seed(seed: int, settings: dict, device: str, source_steps: int = SOURCE_STEPS) -> "dict[str, dict]":
    """Both arms of one seed: accuracies in per cent, losses in nats."""
    torch.set_num_threads(1)
    data = digits.load(seed, settings["labels"], device)
    source = digits.source_model(data.source, seed, source_steps)
    result = {}
    for arm in ARMS:
        start = time.perf_counter()
        model, losses = adapted(source, data, settings if arm == "flat" else {**settings, "sigma": 0.0}, seed)
        seconds = time.perf_counter() - start
        accuracy, loss = digits.evaluate(model, *data.test)
        corrupted = {kind: [0.0] * len(digits.SEVERITIES) for kind in digits.CORRUPTIONS}
        for kind, severity, images in digits.corruptions(data.test.images, seed):
            corrupted[kind][severity - 1] = 100 * digits.evaluate(model, images, data.test.labels)[0]
        last_epoch = losses[-max(1, settings["labels"] // settings["batch"]) :]
        result[arm] = {
            "train_loss": statistics.fmean(last_epoch), "train_seconds": seconds,
            "accuracy": 100 * accuracy, "loss": loss, "corrupted": corrupted,
        }  # fmt: skip
    return result


def measures(result: dict) -> "dict[str, float]":
    """Every number of one run that is compared."""
    corrupted = result["corrupted"]
    by_kind = {kind: statistics.fmean(values) for kind, values in corrupted.items()}
    by_severity = {f"severity {s}": statistics.fmean(c[s - 1] for c in corrupted.values()) for s in digits.SEVERITIES}
    return {
        "test accuracy": result["accuracy"],
        "corrupted accuracy": statistics.fmean(by_kind.values()),
        **by_severity,
        **by_kind,
        "test loss": result["loss"],
        "train loss": result["train_loss"],
    }


def interval(values: "list[float]") -> "dict[str, float | None]":
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None}
    mean, half, _ = map(float, paired(np.array(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarise(runs: "list[dict[str, dict]]") -> "dict[str, dict]":
    """Per measure: each arm's mean and interval, the paired difference and its interval, and the seeds flat is ahead on."""
    per_run = [{arm: measures(run[arm]) for arm in ARMS} for run in runs]
    summary = {}
    for name in per_run[0]["plain"]:
        plain, flat = ([run[arm][name] for run in per_run] for arm in ARMS)
        differences = [f - p for p, f in zip(plain, flat)]
        better = sum(d < 0 if name.endswith("loss") else d > 0 for d in differences)
        summary[name] = {
            "plain": interval(plain),
            "flat": interval(flat),
            "difference": interval(differences),
            "flat_better": f"{better}/{len(differences)}",
        }
    return summary


def table(summary: "dict[str, dict]", title: str) -> rich.table.Table:
    shown = rich.table.Table(title=title, title_justify="left")
    for column, justify in (("", "left"), *((c, "right") for c in ("plain", "flat", "flat-plain", "95 %", "ahead"))):
        shown.add_column(column, justify=justify, no_wrap=True)
    for name, row in summary.items():
        places = 3 if name.endswith("loss") else 1
        mean, low, high = row["difference"].values()
        between = "one seed" if low is None else f"{low:+.{places}f} to {high:+.{places}f}"
        cells = [f"{row[arm]['mean']:.{places}f}" for arm in ARMS] + [f"{mean:+.{places}f}", between, row["flat_better"]]
        last = ("corrupted accuracy", "severity 5", digits.CORRUPTIONS[-1])
        shown.add_row(name, *cells, end_section=name in last)
    return shown


def picture(summary: "dict[str, dict]", title: str, path: Path) -> None:
    """Left: accuracy by severity of corruption. Right: the paired differences. Error bars: 95 % t-intervals over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))

    def bar(row):
        return 0 if row["low"] is None else row["high"] - row["mean"]

    rows = [summary["test accuracy"], *(summary[f"severity {s}"] for s in digits.SEVERITIES)]
    for arm, aside, marker, colour in (("plain", -0.06, "s", "#7a7a7a"), ("flat", 0.06, "o", "#0b62a4")):
        at, means = [s + aside for s in range(len(rows))], [row[arm]["mean"] for row in rows]
        error = [bar(row[arm]) for row in rows]
        left.errorbar(at, means, error, marker=marker, capsize=3, color=colour, label=arm, lw=1.8)
    left.set_xticks(range(len(rows)), ["clean", *map(str, digits.SEVERITIES)])
    left.set(xlabel=f"severity of corruption (mean of {len(digits.CORRUPTIONS)} kinds)", ylabel="test accuracy, %")
    left.legend(frameon=False)

    names = ["test accuracy", "corrupted accuracy", *digits.CORRUPTIONS]
    for y, name in enumerate(names):
        row = summary[name]["difference"]
        shade = "#0b62a4" if y < 2 else "#6fa8d6"
        right.errorbar(row["mean"], y, xerr=bar(row), marker="o", capsize=3, color=shade, lw=1.8)
        right.annotate(f"{row['mean']:+.1f}", (row["mean"], y), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(names)), ["clean", "all corruptions", *digits.CORRUPTIONS])
    right.set_ylim(len(names) - 0.5, -0.7)
    right.set_xlabel("flat - plain, percentage points of test accuracy")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    change = summary["test loss"]["difference"]
    between = "" if change["low"] is None else f" (95 % interval {change['low']:+.2f} to {change['high']:+.2f})"
    line = f"{title}\nTest loss: {change['mean']:+.2f}{between}. Error bars: 95 % t-intervals over seeds"
    figure.suptitle(line, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def main(arguments: "list[str] | None" = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corruption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=40, help="paired runs [40]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a few steps, for CI; its numbers mean nothing")
    args = parser.parse_args(arguments)
    settings, source_steps = ({**SETTINGS, "steps": 8}, 60) if args.quick else (SETTINGS, SOURCE_STEPS)

    start = time.perf_counter()
    workers = min(os.cpu_count() or 1, args.seeds, 8)  # on a GPU each takes half a GB
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_seed, seed, settings, args.device, source_steps) for seed in range(args.seeds)]
        for _ in rich.progress.track(concurrent.futures.as_completed(futures), "paired seeds", args.seeds):
            pass
    runs = [future.result() for future in futures]
    summary = summarise(runs)
    title = "Digits, turned, bent and paler: {labels} labels, LoRA rank {rank}, sigma {sigma:g}".format(**settings)
    title += f", {args.seeds} paired seeds"
    rich.console.Console().print(table(summary, title))
    args.out.mkdir(parents=True, exist_ok=True)
    picture(summary, title, args.out / "corruption.png")
    given = sys.argv[1:] if arguments is None else arguments
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.corruption", *given]),
        "settings": {**settings, "seeds": args.seeds, "source_steps": source_steps, "device": args.device},
        "summary": summary,
        "runs": [{"seed": seed, **run} for seed, run in enumerate(runs)],
        "seconds": time.perf_counter() - start,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.device}",
        "versions": {m.__name__: m.__version__ for m in (flatopt, torch, timm, peft)},
    }
    (args.out / "corruption.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.out / 'corruption.json'}, {args.out / 'corruption.png'}")


if __name__ == "__main__":
    main()
