"""What a method adds to the device's part of a step and to the host's, which ``cost.py`` cannot tell apart.

    python benchmarks/cost_parts.py                                          # after cost.py, on a GPU: some 3 minutes
    python benchmarks/cost_parts.py --methods "ours, reversible" --accumulation 16

Where the host is the slower of the two and its speed wanders, ratios of whole steps say little. Two numbers do. The
device's: how long it works on a step, the sum over the kernels and copies that torch.profiler saw, as a ratio to the plain
steps before and after. The host's: how long it takes to queue perturb and restore, as a share of the rest of the very same
step. A whole step costs what the slower part costs. Cells are medians over turns, their spread half the range between the
quartiles. They go into the rows that ``cost.py`` left in ``cost_<device>.json``, and into its picture.
"""

import argparse
import json
import shlex
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from cost import METHODS, MODELS, ON_GPU, Case, made, over_plain, picture, results_file, shown_cell, summary
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

HOST_TURNS, HOST_SECONDS = 15, 10  # steps at most; no more of them after so long


def device_ms(name: str, case: Case, accumulation: int) -> float:
    """Milliseconds the device works on one step, however long it waits for the host in between."""
    with made(METHODS[name], case) as method:
        method.step(1)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            method.step(accumulation)
            torch.cuda.synchronize()
    work = (e for e in trace.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    return sum(event.device_time for event in work) / 1e3


def on_device(name: str, case: Case, accumulation: int, turns: int) -> dict:
    plain, own = [device_ms("plain LoRA", case, accumulation)], []
    for _ in range(turns):  # in turns, as the clock of a busy GPU drifts
        own.append(device_ms(name, case, accumulation))
        plain.append(device_ms("plain LoRA", case, accumulation))
    ratio = over_plain([[turn] for turn in own], [[turn] for turn in plain])
    return {"device_ms": summary(own), "device_plain_ms": summary(plain), "device_ratio": ratio}


def on_host(name: str, case: Case, accumulation: int) -> dict:
    added, shares, began = [], [], time.perf_counter()
    with made(METHODS[name], case) as method:
        if not hasattr(method, "perturb"):
            return {}
        method.step(1)
        while len(added) < HOST_TURNS and time.perf_counter() - began < HOST_SECONDS:
            torch.cuda.synchronize()
            points = [time.perf_counter()]
            for part in (method.perturb, lambda: method.gradients(accumulation), method.restore, method.optimizer.step):
                part()
                points.append(time.perf_counter())
            method.optimizer.zero_grad()
            perturb, gradients, restore, update = (1e3 * (b - a) for a, b in pairwise(points))
            added.append(perturb + restore)
            shares.append((perturb + restore) / (gradients + update))
    return {"host_ms": summary(added), "host_share": summary(shares)}


def table(models: dict) -> Table:
    shown = Table()
    for column in ("model", "accumulation", "method"):
        shown.add_column(column)
    for column in ("device ms, plain", "device ms", "ratio", "host ms added", "share of the rest, %"):
        shown.add_column(column, justify="right")
    for model, result in models.items():
        for row in result["rows"]:
            if parts := row.get("parts"):
                shown.add_row(
                    model,
                    str(row["accumulation"]),
                    row["method"],
                    shown_cell(parts["device_plain_ms"]),
                    shown_cell(parts["device_ms"]),
                    shown_cell(parts["device_ratio"], digits=4),
                    shown_cell(parts.get("host_ms")),
                    shown_cell(parts.get("host_share"), scale=100),
                )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=ON_GPU)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS)[1:], default=list(METHODS)[1:])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1])
    parser.add_argument("--turns", type=int, default=3, help="of the device, each a step between two plain ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA device, and host and device are one")
    file = results_file(args.out, "cuda")
    if not file.exists():
        parser.error(f"{file} is not there; run cost.py first")
    results = json.loads(file.read_text(encoding="utf-8"))

    for model in args.models:
        torch.manual_seed(args.seed)
        case = MODELS[model]("cuda")
        rows = [
            row
            for row in results["models"].get(model, {"rows": []})["rows"]
            if row["method"] in args.methods and row["accumulation"] in args.accumulation
        ]
        for row in rows:  # all of the host's first: after torch.profiler a launch may take longer
            row["parts"] = {"command": shlex.join(sys.argv), **on_host(row["method"], case, row["accumulation"])}
        for row in track(rows, f"{model}, device"):
            row["parts"].update(on_device(row["method"], case, row["accumulation"], args.turns))
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        del case
    Console(width=150).print(table(results["models"]))
    picture(results, file.with_suffix(".png"))
    print(f"written: {file}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
