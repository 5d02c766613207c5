"""What a fine-tuned model loses when its merged weights are rounded to few bits, as most adapters are served."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.rounding import Rounding, rounding
from .point import Point, at_weights

ScoreFn = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, Tensor | float]"]

FORMATS = (
    "int8", "int4", "int4/128", "int4/64", "int4/32", "int3", "int3/128", "int3/64", "int3/32", "nf4/64",
)  # fmt: skip


class Rounded(NamedTuple):
    """At one rounding of W'. ``loss`` and, where ``loss_fn`` gives one, ``accuracy``: means over the batches.

    ``error``: the relative rms of what rounding did to the weights, ‖Q(W') - W'‖ / ‖W'‖ over all of them together: the σ at
    which the noise of Eq. 7 is as large.
    """

    loss: float
    accuracy: "float | None"
    error: float


class QuantizationTest(NamedTuple):
    """``full``: at the merged weights in full precision; ``rounded``: format -> at the weights rounded to it."""

    full: Rounded
    rounded: "dict[str, Rounded]"


def quantization_test(
    model: nn.Module,
    loss_fn: ScoreFn,
    batches: Iterable[Any],
    *,
    formats: "Sequence[str] | Mapping[str, Rounding]" = FORMATS,
    targets: Any = None,
) -> QuantizationTest:
    r"""Loss and accuracy with the *merged* weights W' = W + sBA rounded to few bits and back, against full precision.

    The weights that have an adapter are rounded, in place and one format after the other; all others stay as they are, and
    afterwards every weight is what it was, bit for bit. Nothing is packed: this measures what a format costs the model, not
    what it saves.

    Args:
        model, batches, targets: see :mod:`flatopt.flatness`.
        loss_fn: ``loss_fn(model, batch)`` returns the batch's mean loss as a scalar tensor, or a pair of that and the
            batch's accuracy.
        formats: names as :func:`rounding` reads them; or a dict from names of your own to functions that take the weight as
            ``(rows, fan_in)`` in float32 and return it rounded, in the same shape: another library's quantiser and back.

    Raises:
        ValueError: for a format that does not exist, and for a function that returns another shape.

    Example::

        found = quantization_test(model, lambda m, b: cross_entropy(m(b[0]), b[1]), batches, formats=("int4/64", "nf4/64"))
        found.rounded["nf4/64"].loss - found.full.loss
    """
    if isinstance(formats, str):
        formats = (formats,)
    roundings = dict(formats) if isinstance(formats, Mapping) else {name: rounding(name) for name in formats}
    accuracies: list[float] = []

    def loss_alone(model: nn.Module, batch: Any) -> Tensor:
        result = loss_fn(model, batch)
        if not isinstance(result, tuple):
            return result
        loss, accuracy = result
        accuracies.append(float(accuracy))
        return loss

    with at_weights(model, loss_alone, batches, targets) as point:

        def measured(error: float) -> Rounded:
            accuracies.clear()
            loss = point.loss()
            return Rounded(loss, sum(accuracies) / len(accuracies) if accuracies else None, error)

        full, rounded = measured(0.0), {}
        for name, round_to in roundings.items():
            error = _move_to_rounded(point, name, round_to)
            rounded[name] = measured(error)
    return QuantizationTest(full, rounded)


@torch.no_grad()
def _move_to_rounded(point: Point, name: str, round_to: Rounding) -> float:
    """Set every weight of the point to its rounded value; the relative error."""
    gap, size = 0.0, 0.0

    def offset(index: int) -> Tensor:
        nonlocal gap, size
        value = point.values(index)
        change = value.clone()
        rows = point.rows(index, change)
        result = round_to(rows.float())
        if result.shape != rows.shape:
            raise ValueError(f"format {name!r} must return {tuple(rows.shape)} as it was given, got {tuple(result.shape)}")
        rows.copy_(result)  # a view of ``change``
        change -= value
        gap += change.square().sum().item()
        size += value.square().sum().item()
        return change

    point.move(offset)
    return math.sqrt(gap / size) if size else 0.0
