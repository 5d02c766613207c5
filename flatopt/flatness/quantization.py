"""What a fine-tuned model loses when its merged weights are rounded to few bits, as most adapters are served."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .point import Point, at_weights

Rounding = Callable[[Tensor], Tensor]
ScoreFn = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, Tensor | float]"]

FORMATS = (
    "int8", "int4", "int4/128", "int4/64", "int4/32", "int3", "int3/128", "int3/64", "int3/32", "nf4/64",
)  # fmt: skip

# NormalFloat's sixteen levels (Dettmers et al., NeurIPS 2023), as bitsandbytes has them
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
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


def rounding(name: str) -> Rounding:
    r"""The function that rounds a weight ``(rows, fan_in)`` to the format ``name`` and back to float32.

    ``/g`` gives each group of g inputs in a row a scale of its own, the last group what is left; without it a row has one.
    Scales stay in float32. With w the weights of a group:

    - ``"int8"``, ``"int4/32"``, any ``int2`` to ``int8``: symmetric by absmax, :math:`s = \max|w| / (2^{b-1} - 1)` and
      :math:`s \cdot \operatorname{round}(w/s)`, halves to even. int4 has 15 levels; GGUF's Q4_0 (groups of 32) sets the
      largest element to level -8 of 16 and keeps s in float16.
    - ``"uint4/128"``: asymmetric, between the least and the largest of w and 0: :math:`s = (\max - \min) / (2^b - 1)`, zero
      point :math:`z = \operatorname{round}(-\min/s)`, :math:`s \cdot (\operatorname{clamp}(\operatorname{round}(w/s) + z, 0,
      2^b - 1) - z)`, as torchao's int4 weight-only and AWQ do.
    - ``"nf4/64"``: :math:`\max|w|` times the nearest of NormalFloat's levels, bitsandbytes' NF4 without double quantisation
      where g divides the fan-in (its blocks run on over the rows).

    Raises:
        ValueError: for another name.
    """
    match = re.fullmatch(r"(?:(u?int)([2-8])|(nf4))(?:/(\d+))?", name)
    if match is None or match[4] == "0":
        raise ValueError(
            f"format {name!r} is none of 'int2' to 'int8', 'uint2' to 'uint8' and 'nf4', with '/g' for groups of g inputs, "
            "as in 'int4/64'; for others give a dict from names to functions"
        )
    group = int(match[4]) if match[4] else None
    if match[3]:
        return lambda w: _by_group(w, group, _nf4)
    bits = int(match[2])
    inner = _asymmetric if match[1] == "uint" else _symmetric
    return lambda w: _by_group(w, group, lambda groups: inner(groups, bits))


def _by_group(w: Tensor, group: "int | None", inner: Rounding) -> Tensor:
    """``inner`` on ``(..., g)``; a short last group is filled up with zeros, which no scale here depends on."""
    rows, fan_in = w.shape
    group = min(group or fan_in, fan_in)
    filled = torch.nn.functional.pad(w, (0, -fan_in % group))
    return inner(filled.view(rows, -1, group)).view(rows, -1)[:, :fan_in]


def _symmetric(w: Tensor, bits: int) -> Tensor:
    scale = w.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, (w / scale).round_() * scale, 0.0)


def _asymmetric(w: Tensor, bits: int) -> Tensor:
    low, high = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round_()
    levels = ((w / scale).round_() + zero).clamp_(0, 2**bits - 1)
    return torch.where(scale > 0, (levels - zero) * scale, 0.0)


def _nf4(w: Tensor) -> Tensor:
    levels = torch.tensor(NF4, device=w.device, dtype=w.dtype)
    scale = w.abs().amax(-1, keepdim=True)
    between = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize((w / scale).nan_to_num_(0.0), between)]
    return nearest * scale
