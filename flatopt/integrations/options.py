"""What both callbacks check: their options at once, for later is when model and data are loaded; and a late beginning."""

from typing import Any

from ..core.warn import warn_user
from ..optimizers.settings import check_draws, check_group


def checked(**options: Any) -> "dict[str, Any]":
    """``options`` of a ``FlatPerturbOptimizer``, as plain numbers, which a checkpoint can keep.

    Raises:
        ValueError: for a value that does not fit.
    """
    check_group(options)
    check_draws(options["seed"], options["draws"])
    return {**options, "sigma": float(options["sigma"]), "seed": int(options["seed"])}


def warn_late(step: int) -> None:
    """The run was resumed at ``step`` from a checkpoint that knows of no callback."""
    warn_user(
        f"FlatPerturbCallback begins at step {step}: the checkpoint was written without it. Unless the optimizer was "
        "wrapped then, the steps before had no noise."
    )
