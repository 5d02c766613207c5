"""How strong the noise is at each point of training."""

import math
from collections.abc import Callable

Schedule = str | Callable[[float], float]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "linear": lambda progress: progress,
    "constant": lambda progress: 1.0,
}


def factor(schedule: Schedule, step: int, total_steps: "int | None") -> float:
    r"""The factor on :math:`\sigma` at optimizer step ``step`` (counted from 0).

    ``"cosine"`` is the paper's :math:`\tfrac12(1-\cos(\pi t/T))`, rising from 0 to 1; past ``total_steps`` the factor
    stays where the schedule ended.
    """
    if schedule == "constant":
        return 1.0
    assert total_steps is not None  # checked where the optimizer is made
    progress = min(step / total_steps, 1.0)
    value = float((SCHEDULES[schedule] if isinstance(schedule, str) else schedule)(progress))
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"schedule returned {value} at progress {progress}; it must return a finite factor >= 0")
    return value
