"""The torch optimizer inside what trainers wrap around it."""

from typing import Any

from ..optimizers.flat import FlatPerturbOptimizer


def bare_optimizer(optimizer: Any) -> Any:
    """The innermost ``.optimizer`` of accelerate's, DeepSpeed's or Lightning's wrappers: the one whose step counts.

    Raises:
        ValueError: if there is a ``FlatPerturbOptimizer`` among them already: two would perturb the same weights.
    """
    while True:
        if isinstance(optimizer, FlatPerturbOptimizer):
            raise ValueError(
                "the trainer was given a FlatPerturbOptimizer and a FlatPerturbCallback; one is enough. Give the trainer "
                "the bare optimizer (optimizer.optimizer), or leave out the callback"
            )
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            return optimizer
        optimizer = inner
