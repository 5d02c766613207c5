"""What each method adds to a training step, in time and in memory, side by side in one run.

    python -m benchmarks.cost                     # on a GPU: Llama-2-7B, T5-base and ViT-B/32, some 6 minutes on an H200
    python -m benchmarks.cost --parts             # then, on a GPU: what of it is the device's, what the host's; 3 minutes
    python -m benchmarks.cost --device cpu        # the tiny model, some 2 minutes
    python -m benchmarks.cost --parts --methods "ours, reversible" --accumulation 16

Methods: plain LoRA; FlatPerturbOptimizer in each restore mode; the procedure of the Flat-LoRA authors' code, written anew
from its description; SAM on the adapter and on the frozen weights. Models are made from their configurations with random
weights: what they compute has no meaning, what it costs does. Steps are timed with device events on a GPU and the wall clock
on a CPU. Plain and a method take turns of a third of a second (or one step); a ratio is that of a turn's median step to the
plain one's before and after it. A cell is the median over steps or turns, its spread half the range between the quartiles.
Perturb and restore are timed by themselves with the host ahead of the device, as it is in training. Memory is
what torch allocated on a GPU; on a CPU the resident process, which is rough. ``parts.py`` tells what the parts are.

Results: ``cost_<device>.json`` and ``.png`` in ``benchmarks/results``; models that are not measured again stay in them, and
``--parts`` go into the rows that are there.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track

from .methods import METHODS
from .models import MODELS, ON_GPU
from .parts import on_device, on_host
from .show import parts_table, picture, steps_table
from .steps import measure, time_toggles

RESULTS = Path(__file__).parents[1] / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--parts", action="store_true", help="the device's part and the host's, of rows that are there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all but tiny on a GPU, tiny on a CPU")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS)[1:], default=list(METHODS)[1:])
    parser.add_argument("--accumulation", nargs="+", type=int, help="default: 1 4 16; 1 with --parts")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to repeat one cell for (at least 3 turns)")
    parser.add_argument(
        "--turns", type=int, default=3, help="of the device with --parts, each a step between two plain ones"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.models = args.models or (ON_GPU if args.device == "cuda" else ["tiny"])
    args.accumulation = args.accumulation or ([1] if args.parts else [1, 4, 16])
    if args.device == "cuda" and not gpu:
        parser.error("this machine has no CUDA device; use --device cpu")
    if args.parts and args.device == "cpu":
        parser.error("--parts needs a CUDA device: on a CPU host and device are one")
    args.file = args.out / f"cost_{device_name(args.device).lower().replace(' ', '-')}.json"
    if args.parts and not args.file.exists():
        parser.error(f"{args.file} is not there; run without --parts first")
    return args


def device_name(device: str) -> str:
    return "CPU" if device == "cpu" else torch.cuda.get_device_name()


def versions() -> "dict[str, str | None]":
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "peft", "transformers", "timm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def measure_steps(args: argparse.Namespace, results: dict, save, console: Console) -> None:
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with bar if console.is_terminal else nullcontext():
        for name in args.models:
            task = bar.add_task(name, total=len(args.accumulation) * len(args.methods))

            def tick(what: str, task: int = task, name: str = name) -> None:
                bar.update(task, advance=1, description=f"{name}, {what}")

            torch.manual_seed(args.seed)
            case = MODELS[name](args.device)
            layers = [m for m in case.model.modules() if isinstance(m, LoraLayer)]
            weights = sum(layer.get_base_layer().weight.numel() for layer in layers)
            run = {"command": args.command, "versions": versions(), "seed": args.seed}
            toggles = time_toggles(args.methods, case, args.device)
            sizes = {"what": case.what, "layers": len(layers), "weights": weights, "toggles": toggles}
            for rows in measure(case, args.accumulation, args.methods, args.device, args.seconds, tick):
                results["models"][name] = {**run, **sizes, "plain_ms": rows[0]["step_ms"]["median"], "rows": rows}
                save()
            Console(width=max(console.width, 120)).print(steps_table(name, results["models"][name]))
            del case, layers


def measure_parts(args: argparse.Namespace, results: dict, save) -> None:
    for model in args.models:
        torch.manual_seed(args.seed)
        case = MODELS[model]("cuda")
        rows = [
            row
            for row in results["models"].get(model, {"rows": []})["rows"]
            if row["method"] in args.methods and row["accumulation"] in args.accumulation
        ]
        for row in rows:  # all of the host's first: after torch.profiler a launch may take longer
            row["parts"] = {"command": args.command, **on_host(row["method"], case, row["accumulation"])}
        for row in track(rows, f"{model}, device"):
            row["parts"].update(on_device(row["method"], case, row["accumulation"], args.turns))
        save()
        del case
    Console(width=150).print(parts_table(results["models"]))


def main() -> None:
    args = arguments()
    args.command = shlex.join(["python", "-m", "benchmarks.cost", *sys.argv[1:]])
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.file.read_text(encoding="utf-8")) if args.file.exists() else {"models": {}}
    console = Console()

    def save() -> None:
        args.file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if args.parts:
        measure_parts(args, results, save)
    else:
        threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
        results["device"] = device_name(args.device) + threads
        measure_steps(args, results, save, console)
    picture(results, args.file.with_suffix(".png"))
    console.print(f"written: {args.file}, {args.file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
