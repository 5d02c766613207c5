"""What may be set, of a group and for all groups."""

import re
from typing import Any

from ..core.arguments import is_number, is_whole
from ..ops import FORMAT, NOISES
from ..perturbation.weights import RESTORES
from .schedule import SCHEDULES

DRAWS = ("step", "micro-batch", "mixed", "mixed/n")
_MIXED = re.compile(r"mixed(?:/([2-9]|[1-9]\d+))?")


def check_draws(seed: Any, draws: Any) -> None:
    """Raise for what is one for all groups and does not fit."""
    if not is_whole(seed):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    if draws not in DRAWS[:2] and not (isinstance(draws, str) and _MIXED.fullmatch(draws)):
        raise ValueError(f"draws must be one of {', '.join(DRAWS)} (n ≥ 2), got {draws!r}")


def refuse_draws_under_sam(draws: str) -> None:
    """Raise unless SAM's two gradients of a step are taken at one noise."""
    if draws != "step":
        raise ValueError(
            f"draws={draws!r} and SAM in one step: SAM takes two gradients, which have to be at the same noise, and the "
            "second would be taken for the next micro-batch's. Use draws='step'"
        )


def perturbed_one_in(draws: str) -> int:
    """Of how many micro-batches one is perturbed, the first: 2 for ``"mixed"``, n for ``"mixed/n"``, 1 for the others."""
    mixed = _MIXED.fullmatch(draws)
    return int(mixed[1] or 2) if mixed else 1


def check_group(group: "dict[str, Any]", optimizer: Any = None) -> None:
    """Raise for settings of a group that do not fit; with ``optimizer``, also where its schedule has no length yet."""
    sigma, schedule = group["sigma"], group["schedule"]
    if not (is_number(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
    if not callable(schedule) and schedule not in list(SCHEDULES):
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a callable, got {schedule!r}")
    if optimizer is not None and schedule != "constant" and optimizer.total_steps is None:
        raise ValueError(
            f"schedule {schedule!r} needs total_steps, the number of optimizer steps of the whole training: pass "
            "total_steps=epochs * len(loader) // accumulation, set optimizer.total_steps before the first forward, or use "
            "schedule='constant'"
        )
    noise, restore = group["noise"], group["restore"]
    if restore not in list(RESTORES):
        raise ValueError(f"restore must be one of {', '.join(RESTORES)}, got {restore!r}")
    if noise in NOISES:
        return
    if not (isinstance(noise, str) and FORMAT.fullmatch(noise)):
        raise ValueError(
            f"noise must be one of {', '.join(NOISES)}, or a format to round to such as 'int4/32' or 'nf4/64', got {noise!r}"
        )
    if sigma > 1:
        raise ValueError(
            f"sigma={sigma:g}, but noise={noise!r} goes sigma of the way to the rounded weights: give at most 1"
        )
    if restore != "copy":
        raise ValueError(
            f"noise={noise!r} rounds the weights, from which they cannot be had back: pass restore='copy', which keeps a "
            "clean copy of each"
        )
