"""Runs shared out to processes, and the settings that are chosen before the studies run."""

import math
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from .. import tasks
from . import train
from .store import Store, environment

_task = None


def _start(name: str, device: str, cache: Path, quick: bool) -> None:
    global _task
    torch.set_num_threads(1)
    _task = tasks.load(name, device, cache, quick)


def _run(config: dict, seed: int) -> dict:
    return train.run(_task, config, seed)


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

    def best(what: str, by_value: "dict[float, dict]") -> float:
        configs = {value: train.canonical(config) for value, config in by_value.items()}
        runner([(config, seed) for config in configs.values() for seed in grid["seeds"]], what)

        def score(value):
            found = [store.get(configs[value], seed) for seed in grid["seeds"]]
            return -math.inf if None in found else sum(metrics["validation_accuracy"] for metrics in found)

        return max(configs, key=score)

    done = store.tuned.get("grid", {})
    new = {key for key in grid if done.get(key) != grid[key]}
    tuned = {} if new & {"seeds", "lr"} else {key: value for key, value in store.tuned.items() if key not in new}
    if "lr" not in tuned:
        tuned["lr"] = {
            a: best(f"lr of {a}", {lr: {**base, "adapter": a, "lr": lr} for lr in grid["lr"]}) for a in train.ADAPTERS
        }
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
