"""How the settings of ``finetune_vit.py`` on digits were chosen: validation accuracy on seeds the example never reports.

    python examples/tune_digits.py

First plain LoRA alone, over learning rate and number of steps; then sigma, at what was best for plain LoRA. Neither sees a
test image. Takes about half an hour on one core; prints mean accuracy and loss over the seeds, best setting first.
"""

import copy
import statistics

import rich.progress
import torch
from digits import adapt, evaluate, load, source_model
from finetune_vit import DIGITS, add_adapter

from flatopt import FlatPerturbOptimizer

SEEDS = (100, 101, 102, 103)
LEARNING_RATES = (5e-3, 1e-2, 2e-2)
STEPS = (100, 200, 400, 800)
SIGMAS = (0.15, 0.3, 0.45, 0.6, 0.8)


def score(model, data, seed: int, lr: float, steps: int, sigma: float) -> "tuple[float, float]":
    """Validation accuracy and loss after adapting a copy of the source ``model``."""
    torch.manual_seed(seed)
    model = add_adapter(copy.deepcopy(model), "lora", DIGITS["rank"])

    def make(parameters):
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=DIGITS["weight_decay"])
        if sigma > 0:
            optimizer = FlatPerturbOptimizer(optimizer, model, sigma=sigma, total_steps=steps, seed=seed)
        return optimizer

    adapt(model, data.train, make, steps, DIGITS["batch"], seed)
    return evaluate(model, *data.validation)


def compare(settings: "list[tuple[float, int, float]]", sources: list) -> "tuple[float, int, float]":
    """Print every ``(lr, steps, sigma)`` and return the one of highest mean validation accuracy."""
    results = {}
    for setting in rich.progress.track(settings, description="tuning"):
        scores = [score(model, data, seed, *setting) for seed, model, data in sources]
        results[setting] = [statistics.fmean(column) for column in zip(*scores)]
    ranked = sorted(results, key=lambda setting: -results[setting][0])
    for lr, steps, sigma in ranked:
        accuracy, loss = results[lr, steps, sigma]
        print(f"lr {lr:g}, {steps} steps, sigma {sigma:g}: accuracy {100 * accuracy:.1f} %, loss {loss:.3f}")
    return ranked[0]


def main() -> None:
    torch.set_num_threads(1)
    sources = []
    for seed in rich.progress.track(SEEDS, description="source models"):
        data = load(seed, DIGITS["labels"])
        sources.append((seed, source_model(data.source, seed, DIGITS["source_steps"]), data))
    lr, steps, _ = compare([(lr, steps, 0.0) for lr in LEARNING_RATES for steps in STEPS], sources)
    compare([(lr, steps, sigma) for sigma in SIGMAS], sources)


if __name__ == "__main__":
    main()
