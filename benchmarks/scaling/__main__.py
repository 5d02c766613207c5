"""Weak scaling: what a flat step costs on one GPU and on two, each with the same work, side by side in one run.

    python -m benchmarks.scaling                           # on two GPUs: Llama-2-7B shape, DDP and FSDP2, some 4 minutes
    python -m benchmarks.scaling --quick --out /tmp/quick  # a small model on the same GPUs: does it run, a minute
    python -m benchmarks.scaling --device cpu              # the small model with gloo: does it run, not how fast

Plain LoRA and FlatPerturbOptimizer (under DDP each rank draws its own noise) under DDP and under FSDP2 (each decoder block
and the root): random weights in bf16, LoRA r 8 in fp32 on all linear layers, 2 x 1024 tokens a rank. Each cell has processes
of its own, where plain and flat take turns of a few steps, and

    ratio of a turn = median step, flat / median step, plain, of the turns before and after it
    weak scaling    = median step on the fewest ranks / median step on N ranks

A cell is the median over steps or turns, its spread half the range between the quartiles. Perturb and restore are timed amid
real steps: with the host ahead, by the device's events (waiting for other ranks included), and else the host's time to queue
them. Collectives are counted as torch dispatches them, in perturb, in restore and in a whole step; of the whole tensor of a
call a rank receives (N - 1) / N, of an all-reduce twice that. W is told by a checksum of each rank's part: before all, while
perturbed, and after all.

Results: ``scaling_<device>.json`` (of each rank) and ``.png`` in ``benchmarks/results``. The tables have times and calls of
rank 0 and the memory of the rank with the most. Exits with 1 if a cell failed, a weight had no noise, or W is not back.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console

from ..cost.__main__ import RESULTS, device_name, versions
from .ranks import on_ranks
from .show import SHARDINGS, is_right, picture, tables


def arguments(argv: "list[str] | None") -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shardings", nargs="+", choices=SHARDINGS, default=list(SHARDINGS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="a small model, few steps; always so on a CPU")
    parser.add_argument("--turns", type=int, help="of flat, each between two of plain (default: 5; quick: 3)")
    parser.add_argument("--steps", type=int, default=4, help="timed in a turn, after one that is not")
    parser.add_argument("--toggles", type=int, help="times to time perturb and restore (default: 6; quick: 2)")
    parser.add_argument("--limit", type=int, default=150, help="seconds after which a cell is given up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.quick |= args.device == "cpu"
    args.turns, args.toggles = args.turns or (3 if args.quick else 5), args.toggles or (2 if args.quick else 6)
    if args.device == "cuda" and torch.cuda.device_count() < max(args.ranks):
        parser.error(f"this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu or --ranks 1")
    return args


def main(argv: "list[str] | None" = None) -> int:
    args = arguments(argv)
    device = device_name(args.device)
    command = shlex.join(["python", "-m", "benchmarks.scaling", *(sys.argv[1:] if argv is None else argv)])
    result = {"command": command, "versions": versions(), "device": device, "seed": args.seed, "cells": [], "failed": {}}
    file = args.out / f"scaling_{device.lower().replace(' ', '-')}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    for sharding in args.shardings:
        for world in args.ranks:
            try:
                each = on_ranks(world, sharding, args)
            except Exception as error:  # the other cells are worth having
                result["failed"][f"{sharding}, {world} ranks"] = str(error)
                print(error, file=sys.stderr, flush=True)
                continue
            result["what"] = each[0]["what"]
            result["cells"].append({"sharding": sharding, "ranks": world, "each": each})
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["cells"]:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        picture(result, file.with_suffix(".png"))
        Console(width=160).print(*tables(result), sep="\n")
        print(f"written: {file}, {file.with_suffix('.png')}")
    right = all(is_right(rank) for cell in result["cells"] for rank in cell["each"])
    return 0 if right and not result["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
