"""What a callback is given for the optimizer that it makes later, checked at once: by then model and data are loaded."""

from typing import Any

from ..optimizers.flat import check_draws, check_group


def checked(**options: Any) -> "dict[str, Any]":
    """``options`` of a ``FlatPerturbOptimizer``, as plain numbers, which a checkpoint can keep.

    Raises:
        ValueError: for a value that does not fit.
    """
    check_group(options)
    check_draws(options["seed"], options["draws"])
    return {**options, "sigma": float(options["sigma"]), "seed": int(options["seed"])}
