"""Training through the rounding to one format (``noise="int4/32"``), judged in that one and in others, beside noise.

    python -m benchmarks.quantized.formats                       # EfficientNet, eight seeds, 20 minutes on two cores
    python -m benchmarks.quantized.formats --seeds 2 --steps 4    # a look

At the learning rate and σ that ``quantized_efficientnet.json`` chose for the noise. Resumes where it stopped.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flatopt.flatness import quantization_test

from ..statistics import holm, paired
from .methods import Trainer
from .study import HERE, Store, load, make_config

JUDGED = {
    "full": "full precision",
    "int4": "int4, a scale a row",
    "int4/32": "int4, groups of 32",
    "nf4/64": "NF4, groups of 64",
}
TRAINED = ("int4/32", "nf4/64")
IMAGES = 500  # of the test set

_trainer: "Trainer | None" = None


def _start(cache: Path) -> None:
    global _trainer
    torch.set_num_threads(1)
    _trainer = Trainer(load("efficientnet", "cuda" if torch.cuda.is_available() else "cpu", cache, False))


def _run(config: dict, seed: int) -> "dict[str, float]":
    assert _trainer is not None
    _trainer.run(config, seed)
    batches = list(zip(*(t[:IMAGES].split(500) for t in _trainer.task.evaluation("test"))))
    found = quantization_test(_trainer.model, _trainer.task.loss_and_accuracy, batches, formats=list(JUDGED)[1:])
    return {name: round(100 * r.accuracy, 3) for name, r in {"full": found.full, **found.rounded}.items()}


def table(results: "dict[str, dict[str, dict[str, float]]]") -> str:
    """Accuracy of plain LoRA, and differences to it; \\*: p < .05 after Holm over all of them."""
    plain, rows = results["plain"], [name for name in results if name != "plain"]
    cells, tests = {}, []
    for name in rows:
        seeds = sorted(set(plain) & set(results[name]))
        for column in JUDGED:
            found = paired(np.array([results[name][s][column] - plain[s][column] for s in seeds]))
            cells[name, column] = found
            tests.append((name, column, found[2]))
    adjusted = dict(zip([t[:2] for t in tests], holm([t[2] for t in tests])))
    lines = ["| | seeds | " + " | ".join(JUDGED.values()) + " |", "|---" * (2 + len(JUDGED)) + "|"]
    means = [f"{np.mean([run[column] for run in plain.values()]):.1f}" for column in JUDGED]
    lines.append(f"| plain | {len(plain)} | " + " | ".join(means) + " |")
    for name in rows:
        shown = [
            f"{d:+.1f} ± {h:.1f}" + ("\\*" if adjusted[name, c] < 0.05 else "")
            for c in JUDGED
            for d, h, _ in [cells[name, c]]
        ]
        lines.append(f"| {name} | {len(set(plain) & set(results[name]))} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    task = load("efficientnet", "cpu", args.cache, False)
    task.steps = args.steps or task.steps
    chosen = Store(HERE / "results" / "quantized_efficientnet.json").chosen
    lr, sigma = chosen["lr"]["flat"], chosen["strength"]["flat"]
    configs = {"plain": make_config(task, "plain", 0.0, lr), f"noise, σ {sigma:g}": make_config(task, "flat", sigma, lr)}
    configs |= {f"half rounded to {form}": make_config(task, "rounded", 1.0, lr, form=form) for form in TRAINED}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    here = {"device": device, "data": task.fingerprint, "steps": task.steps, "lr": lr}
    here |= {package: importlib.metadata.version(package) for package in ("torch", "peft", "timm")}
    file = args.results / "quantized_formats.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"environment": here, "runs": {}}
    if content["environment"] != here:
        raise SystemExit(f"{file} was measured elsewhere: {content['environment']}, not {here}. Move it away first")
    runs = content["runs"]
    jobs = [(name, seed) for seed in range(args.seeds) for name in configs if str(seed) not in runs.setdefault(name, {})]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), _start, (args.cache,)) as pool:
        waiting = {pool.submit(_run, configs[name], seed): (name, seed) for name, seed in jobs}
        for done in tqdm(as_completed(waiting), total=len(waiting), mininterval=10):
            name, seed = waiting[done]
            runs[name][str(seed)] = done.result()
            args.results.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = f"Written by `python -m benchmarks.quantized.formats` ({device}, torch {here['torch']}).\n\n{table(runs)}\n"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
