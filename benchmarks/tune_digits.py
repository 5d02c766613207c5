"""How the settings of ``benchmarks.corruption`` were chosen: validation accuracy on seeds that it never reports.

    python -m benchmarks.tune_digits

First plain LoRA alone, over learning rate and number of steps; then sigma, at what was best for plain LoRA. Neither sees a
test image. Takes about half an hour on one core; prints mean accuracy and loss over the seeds, best setting first.
"""

import statistics

import rich.progress
import torch

from .corruption import SETTINGS, SOURCE_STEPS, adapted
from .tasks import digits

SEEDS = (100, 101, 102, 103)
LEARNING_RATES = (5e-3, 1e-2, 2e-2)
STEPS = (100, 200, 400, 800)
SIGMAS = (0.15, 0.3, 0.45, 0.6, 0.8)


def compare(choices: "list[tuple[float, int, float]]", sources: list) -> "tuple[float, int, float]":
    """Print every ``(lr, steps, sigma)`` and return the one of highest mean validation accuracy."""
    results = {}
    for choice in rich.progress.track(choices, description="tuning"):
        settings = {**SETTINGS, **dict(zip(("lr", "steps", "sigma"), choice))}
        models = [(adapted(source, data, settings, seed)[0], data) for seed, source, data in sources]
        scores = [digits.evaluate(model, *data.validation) for model, data in models]
        results[choice] = [statistics.fmean(column) for column in zip(*scores)]
    ranked = sorted(results, key=lambda choice: -results[choice][0])
    for lr, steps, sigma in ranked:
        accuracy, loss = results[lr, steps, sigma]
        print(f"lr {lr:g}, {steps} steps, sigma {sigma:g}: accuracy {100 * accuracy:.1f} %, loss {loss:.3f}")
    return ranked[0]


def main() -> None:
    torch.set_num_threads(1)
    sources = []
    for seed in rich.progress.track(SEEDS, description="source models"):
        data = digits.load(seed, SETTINGS["labels"])
        sources.append((seed, digits.source_model(data.source, seed, SOURCE_STEPS), data))
    lr, steps, _ = compare([(lr, steps, 0.0) for lr in LEARNING_RATES for steps in STEPS], sources)
    compare([(lr, steps, sigma) for sigma in SIGMAS], sources)


if __name__ == "__main__":
    main()
