"""Which of a step's micro-batches run at which noise."""

import re
from typing import Any

from ..core.arguments import is_whole

DRAWS = ("step", "micro-batch", "mixed", "mixed/n")
_MIXED = re.compile(r"mixed(?:/([2-9]|[1-9]\d+))?")


def check_draws(seed: Any, draws: Any) -> None:
    """Raise for what is one for all groups and does not fit."""
    if not is_whole(seed):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    if draws not in DRAWS[:2] and not (isinstance(draws, str) and _MIXED.fullmatch(draws)):
        raise ValueError(f"draws must be one of {', '.join(DRAWS)} (n ≥ 2), got {draws!r}")


def perturbed_one_in(draws: str) -> int:
    """Of how many micro-batches one is perturbed, the first: 2 for ``"mixed"``, n for ``"mixed/n"``, 1 for the others."""
    mixed = _MIXED.fullmatch(draws)
    return int(mixed[1] or 2) if mixed else 1
