"""Ablations of the flat objective: what each choice buys, over paired seeds.

    python -m benchmarks.ablation                         # every study on both tasks; resumes where it stopped
    python -m benchmarks.ablation sigma rank --tasks digits
    python -m benchmarks.ablation --quick                 # seconds: two seeds, a few steps; for CI, its numbers mean nothing
    python -m benchmarks.ablation --report                # tables and pictures from what is there; trains nothing

A study is a small file in ``benchmarks/studies``: ``rows`` of settings, each compared with the run that has the same
settings and seed but for ``reference``. ``base.json`` has what the studies share. Learning rates (one an adapter, chosen for
the plain objective), σ and SAM's ρ are chosen first, on validation data and on seeds of their own.

A run is a task, settings and a seed. Its metrics go to ``benchmarks/results/ablation_<task>.json``, and a run that is there
is not run again, whichever study asks for it; runs on another device or with other versions do not count, so that no pair is
mixed. Runs are shared out to processes of one thread each, which share the GPU.
"""

import argparse
import os
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import report
from .runner import Runner, tune
from .settings import pairs, read_base, read_studies
from .store import Store

BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results"
TASKS = ("digits", "text")


def main(arguments: "list[str] | None" = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", help="names of files in benchmarks/studies; default: all")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, help="paired seeds a row, 0 to SEEDS-1 (default: 10; 2 with --quick)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; at most 8 on a GPU, which they share)")
    parser.add_argument("--results", type=Path, help="folder of the JSON (default: benchmarks/results)")
    parser.add_argument("--cache", type=Path, default=BENCHMARKS / ".cache", help="folder for source models")
    parser.add_argument("--quick", action="store_true", help="tiny source models, a few steps; for CI")
    parser.add_argument("--report", action="store_true", help="train nothing, write tables and pictures of what is there")
    args = parser.parse_args(arguments)
    args.seeds = args.seeds or (2 if args.quick else 10)
    args.results = args.results or (RESULTS / "quick" if args.quick else RESULTS)
    studies, base = read_studies(args.studies), read_base(args.quick)
    stores = {name: Store(args.results / f"ablation_{name}.json") for name in TASKS}
    failed = [] if args.report else measure(args, studies, base, {name: stores[name] for name in args.tasks})
    report.write(args.results, read_studies([]), base, stores, args.seeds)
    if args.results == RESULTS:
        report.fill(BENCHMARKS.parent / "docs" / "results.md", args.results)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; run again to retry them:\n" + "\n".join(failed[:20]))


def measure(args, studies: dict, base: dict, stores: "dict[str, Store]") -> "list[str]":
    """Run what is missing; the runs that failed, with the reason."""
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
    main()
