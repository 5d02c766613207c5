"""Ablations of the flat objective: what each choice buys, over paired seeds.

    python benchmarks/ablation.py                         # every study on both tasks; resumes where it stopped
    python benchmarks/ablation.py sigma rank --tasks digits
    python benchmarks/ablation.py --quick                 # seconds: two seeds, a few steps; for CI, its numbers mean nothing
    python benchmarks/ablation.py --report                # tables and pictures from what is there; trains nothing

A study is a small file in ``benchmarks/studies``: ``rows`` of settings, each compared with the run that has the same
settings and seed but for ``reference``. ``base.json`` has what the studies share. Learning rates (one an adapter, chosen for
the plain objective), σ and SAM's ρ are chosen first, on validation data and on seeds of their own.

A run is a task, settings and a seed. Its metrics go to ``benchmarks/results/ablation_<task>.json``, and a run that is there
is not run again, whichever study asks for it; runs on another device or with other versions do not count, so that no pair is
mixed. Runs are shared out to processes of one thread each, which share the GPU.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TASKS = ("digits", "text")
TIMES = ("sigma", "lr", "labels", "steps")  # a row may give these relative to what was chosen: "sigma_times": 0.5
SAVE_EVERY = 5.0  # seconds


def read_studies(names: "list[str]") -> "dict[str, dict]":
    """Name -> study, in the order given; without ``names`` all of them, in the order of the letters in their titles.

    Raises:
        SystemExit: there is no such study.
    """
    files = {file.stem: file for file in (HERE / "studies").glob("*.json") if file.stem != "base"}
    unknown = set(names) - set(files)
    if unknown:
        raise SystemExit(f"no study {', '.join(sorted(unknown))}; there are {', '.join(sorted(files))}")
    studies = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {name: studies[name] for name in names or sorted(studies, key=lambda name: studies[name]["title"])}


def read_base(quick: bool) -> dict:
    base = json.loads((HERE / "studies" / "base.json").read_text(encoding="utf-8"))
    return base["quick"] if quick else base


def environment(task, device: str) -> dict:
    """What numbers depend on besides the settings."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "timm", "transformers", "scikit-learn")}
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    # source models of the digits are trained on the CPU, and another CPU may round otherwise
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return {
        "data": task.fingerprint,
        "device": name,
        "cpu": cpu[1] if cpu else platform.processor(),
        "python": platform.python_version(),
        **versions,
    }


class Store:
    """The results file of one task: ``tuned``, ``environments`` and ``runs``, each ``{environment, config, seed, metrics}``.

    Runs are looked up in one environment at a time, ``index``, so that pairs are never mixed from two.
    """

    def __init__(self, path: Path):
        self.path, self.saved_at, self.index = path, time.monotonic(), 0
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.environments, self.tuned = content.get("environments", []), content.get("tuned", {})
        self.runs = {self.key(r["environment"], r["config"], r["seed"]): r for r in content.get("runs", [])}

    @staticmethod
    def key(*of) -> str:
        return json.dumps(of, sort_keys=True)

    def enter(self, environment: dict) -> None:
        if environment not in self.environments:
            self.environments.append(environment)
        self.index = self.environments.index(environment)

    def get(self, config: dict, seed: int) -> "dict | None":
        found = self.runs.get(self.key(self.index, config, seed))
        return found and found["metrics"]

    def add(self, config: dict, seed: int, metrics: dict) -> None:
        run = {"environment": self.index, "config": config, "seed": seed, "metrics": metrics}
        self.runs[self.key(self.index, config, seed)] = run
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """One run a line; written beside and moved, so that a run stopped at any time leaves a whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(self.runs[key]) for key in sorted(self.runs))
        head = json.dumps({"tuned": self.tuned, "environments": self.environments}, indent=1)
        beside = self.path.with_suffix(".part")
        beside.write_text(f'{head[:-2]},\n "runs": [\n{lines}\n]}}\n', encoding="utf-8")
        os.replace(beside, self.path)
        self.saved_at = time.monotonic()


def settings(base: dict, tuned: dict, *overrides: dict) -> dict:
    """The canonical settings of a run: base, then what was chosen by tuning, then the overrides in order."""
    from ablation_train import DEFAULTS, canonical

    given = {**base, "sigma": tuned["sigma"]}
    for override in overrides:
        given |= {key: value for key, value in override.items() if key != "name"}
    given.setdefault("lr", tuned["lr"][given.get("adapter", DEFAULTS["adapter"])])
    for key in TIMES:
        factor = given.pop(f"{key}_times", 1)
        if factor != 1:
            value = given[key] * factor
            given[key] = value if key in ("sigma", "lr") else round(value)
    return canonical(given)


def pairs(study: dict, base: dict, tuned: dict) -> "list[tuple[str, dict, dict]]":
    """``(name, settings, settings of the reference)`` of every row."""
    return [
        (
            row["name"],
            settings(base, tuned, study["all"], row),
            settings(base, tuned, study["all"], row, study["reference"]),
        )
        for row in study["rows"]
    ]


_task = None


def _start(name: str, device: str, cache: Path, quick: bool) -> None:
    global _task
    import tasks
    import torch

    torch.set_num_threads(1)
    _task = tasks.load(name, device, cache, quick)


def _run(config: dict, seed: int) -> dict:
    from ablation_train import run

    return run(_task, config, seed)


class Runner:
    """Runs what a store lacks, in processes that live as long as the runner."""

    def __init__(self, name: str, args, store: Store, progress):
        self.store, self.progress, self.name, self.failed = store, progress, name, []
        cache = args.cache
        _start(name, args.device, cache, args.quick)  # builds what the workers then find in the cache
        store.enter(environment(_task, args.device))
        given = (name, args.device, cache, args.quick)
        self.pool = None
        if args.workers > 1:
            self.pool = ProcessPoolExecutor(args.workers, get_context("spawn"), initializer=_start, initargs=given)

    def results(self, jobs: "list[tuple[dict, int]]"):
        """``(job, function that gives its metrics or raises)``, as they are done."""
        if self.pool is None:
            for job in jobs:
                yield job, lambda job=job: _run(*job)
            return
        futures = {self.pool.submit(_run, *job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result

    def __call__(self, jobs: "list[tuple[dict, int]]", what: str) -> None:
        missing = {Store.key(*job): job for job in jobs if self.store.get(*job) is None}
        bar = self.progress.add_task(f"{self.name}: {what}", total=len(missing))
        start = time.monotonic()
        try:
            for job, result in self.results(list(missing.values())):
                try:
                    self.store.add(*job, result())
                except Exception as error:  # the other runs are worth having
                    self.failed.append(f"{job}: {type(error).__name__}: {error}")
                self.progress.advance(bar)
        except BaseException:
            if self.pool is not None:
                self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            self.store.save()
        self.progress.console.print(
            f"{self.name}: {what}: {len(missing)} runs in {time.monotonic() - start:.0f} s, {len(jobs) - len(missing)} there"
        )


def tune(store: Store, base: dict, grid: dict, runner) -> None:
    """Choose the lr of each adapter (plain objective), then σ and, in each space, SAM's ρ (LoRA), by mean validation
    accuracy on tuning seeds. What was chosen from the same grid before stays."""
    from ablation_train import ADAPTERS, canonical

    def best(what: str, by_value: "dict[float, dict]") -> float:
        configs = {value: canonical(config) for value, config in by_value.items()}
        runner([(config, seed) for config in configs.values() for seed in grid["seeds"]], what)

        def score(value):
            found = [store.get(configs[value], seed) for seed in grid["seeds"]]
            return -math.inf if None in found else sum(metrics["validation_accuracy"] for metrics in found)

        return max(configs, key=score)

    done = store.tuned.get("grid", {})
    new = {key for key in grid if done.get(key) != grid[key]}
    tuned = {} if new & {"seeds", "lr"} else {key: value for key, value in store.tuned.items() if key not in new}
    if "lr" not in tuned:
        tuned["lr"] = {a: best(f"lr of {a}", {lr: {**base, "adapter": a, "lr": lr} for lr in grid["lr"]}) for a in ADAPTERS}
    lora = {**base, "lr": tuned["lr"]["lora"]}
    if "sigma" not in tuned:
        tuned["sigma"] = best("σ", {sigma: {**lora, "objective": "flat", "sigma": sigma} for sigma in grid["sigma"]})
    if "rho" not in tuned:
        sam = {**lora, "objective": "sam"}
        tuned["rho"] = {
            space: best(f"ρ on {space}", {rho: {**sam, "space": space, "rho": rho} for rho in grid["rho"]})
            for space in ("adapter", "full")
        }
    store.tuned = {**tuned, "grid": grid}
    store.save()


def main(arguments: "list[str] | None" = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", help="names of files in benchmarks/studies; default: all")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, help="paired seeds a row, 0 to SEEDS-1 (default: 10; 2 with --quick)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; at most 8 on a GPU, which they share)")
    parser.add_argument("--results", type=Path, help="folder of the JSON (default: benchmarks/results)")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="folder for source models")
    parser.add_argument("--quick", action="store_true", help="tiny source models, a few steps; for CI")
    parser.add_argument("--report", action="store_true", help="train nothing, write tables and pictures of what is there")
    args = parser.parse_args(arguments)
    args.seeds = args.seeds or (2 if args.quick else 10)
    args.results = args.results or (RESULTS / "quick" if args.quick else RESULTS)
    studies, base = read_studies(args.studies), read_base(args.quick)
    stores = {name: Store(args.results / f"ablation_{name}.json") for name in TASKS}
    failed = [] if args.report else measure(args, studies, base, {name: stores[name] for name in args.tasks})
    import ablation_report

    ablation_report.write(args.results, read_studies([]), base, stores, args.seeds)
    if args.results == RESULTS:
        ablation_report.fill(HERE.parent / "docs" / "results.md", args.results)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; run again to retry them:\n" + "\n".join(failed[:20]))


def measure(args, studies: dict, base: dict, stores: "dict[str, Store]") -> "list[str]":
    """Run what is missing; the runs that failed, with the reason."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.workers is None:
        args.workers = os.cpu_count() if args.device == "cpu" else min(8, os.cpu_count())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = []
    with Progress(*columns) as progress:
        for name, store in stores.items():
            runner = Runner(name, args, store, progress)
            tune(store, base[name], base["tuning"], runner)
            rows = [
                row for study in studies.values() if name in study["tasks"] for row in pairs(study, base[name], store.tuned)
            ]
            runner(
                [(config, seed) for _, *both in rows for config in both for seed in range(args.seeds)], ", ".join(studies)
            )
            if runner.pool is not None:
                runner.pool.shutdown()
            failed += runner.failed
    return failed


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    main()
