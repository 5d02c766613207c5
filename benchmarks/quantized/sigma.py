"""What σ ``sigma_range_test`` suggests for a task's plainly trained adapter, to be held against the σ the study found best.

python -m benchmarks.quantized.sigma                                    # three tuning seeds each, plain LoRA's chosen lr
python -m benchmarks.quantized.sigma --tasks efficientnet --lr 0.003    # at another one
"""

import argparse
import json
from pathlib import Path

import torch

from flatopt.flatness import sigma_range_test

from .methods import Trainer
from .study import HERE, TASKS, TUNING_SEEDS, Store, load, make_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(TUNING_SEEDS))
    parser.add_argument("--lr", type=float)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = args.results / "quantized_sigma.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in args.tasks:
        task = load(name, device, args.cache, quick=False)
        lr = args.lr or Store(args.results / f"quantized_{name}.json").chosen["lr"]["plain"]
        trainer = Trainer(task)
        for seed in args.seeds:
            trainer.run(make_config(task, "plain", 0.0, lr), seed)
            data = task.train(seed)
            batches = list(zip(*(t[: 4 * task.batch].split(task.batch) for t in data)))
            test = sigma_range_test(trainer.model, lambda m, b, task=task: task.loss_and_accuracy(m, b)[0], batches)
            found.setdefault(f"{name}, lr {lr:g}", {})[str(seed)] = round(test.suggested, 4)
            print(name, lr, seed, round(test.suggested, 4), flush=True)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
