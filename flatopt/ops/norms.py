r"""How large the noise is: Eq. 7 of Flat-LoRA and its relatives.

.. math:: \varepsilon_{ij} \sim \mathcal N\big(0,\ \tfrac{\sigma^2}{n}\,\lVert W'_{i,:}\rVert^2\big), \quad W' = W + sBA

The row norms of the merged :math:`W'` need no temporary of its size: row by row,
:math:`\lVert w + sBA\rVert^2 = \lVert w\rVert^2 + 2s\,w\cdot(BA)^\top + s^2\lVert BA\rVert^2`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.sharding import summed_over_shards
from ..core.weight import WeightUpdate, WeightView

CHUNK = 1 << 20  # elements of W in float32 at a time


def _slabs(rows: Tensor) -> Iterator[slice]:
    tall = max(1, CHUNK // max(rows.shape[1], 1))
    for top in range(0, rows.shape[0], tall):
        yield slice(top, top + tall)


def square_sums(rows: Tensor) -> Tensor:
    """Per row of a 2-D weight alone the sum of squares: float32, ``(rows,)``."""
    return torch.cat([rows[s].float().square().sum(1) for s in _slabs(rows)])


def row_square_sums(rows: Tensor, update: WeightUpdate, of_weight: Tensor | None = None) -> Tensor:
    r"""Per row of :math:`\alpha W + \sum_j s_j B_j A_j +` dense the sum of squares, or what DoRA fixes; float32.

    ``of_weight``: :func:`square_sums` of W, where they are known.
    """
    if update.row_norm is not None:
        return update.row_norm.detach().to(rows.device).float().square()
    if update.dense is not None:
        dense = update.dense.detach()
        return torch.cat([(rows[s].float() + dense[s].float()).square_().sum(1) for s in _slabs(rows)])
    own = square_sums(rows) if of_weight is None else of_weight
    return updated_square_sums(own, update, lambda A: torch.cat([rows[s].float() @ A.t() for s in _slabs(rows)]))


def updated_square_sums(own: Tensor, update: WeightUpdate, times: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Per row of :math:`\alpha W + \sum_j s_j B_j A_j` the sum of squares, float32, from ``own``, that of W alone.

    ``times``: from A, ``(r, fan_in)``, float32, to :math:`W A^\top`, ``(rows, r)``: all that is asked of W.
    """
    if not update.factors:
        return (own if update.alpha is None else update.alpha * update.alpha * own).clamp_min(0.0)
    B = torch.cat([B.detach().float() * s for B, _, s in update.factors], dim=1).to(own.device)
    A = torch.cat([A.detach().float() for _, A, _ in update.factors]).to(own.device)
    return merged_square_sums(own, times(A), B, A, update.alpha)


def merged_square_sums(own: Tensor, cross: Tensor, B: Tensor, A: Tensor, alpha: "Tensor | None" = None) -> Tensor:
    r"""Per row :math:`\lVert\alpha w + BA\rVert^2` from :math:`\lVert w\rVert^2` and :math:`w A^\top` (``cross``); B has the
    scaling in it. Of many weights at once where all have one more dimension.
    """
    mixed = (B * cross).sum(-1)
    if alpha is not None:
        own, mixed = alpha * alpha * own, alpha * mixed
    return own.add(mixed, alpha=2).add_(((B @ (A @ A.mT)) * B).sum(-1)).clamp_min_(0.0)


def rows_of(view: WeightView) -> Tensor:
    """The 2-D view of a weight that is looked at now; made where ``view`` has but the tensor."""
    if view.rows is None:
        if view.tensor is None:
            raise RuntimeError(f"{view.weight.path} was not looked at in this step: its WeightView has no tensor")
        view.rows = view.weight.rows(view.tensor)
    return view.rows


def _finite_square_sums(view: WeightView) -> Tensor:
    rows, update = rows_of(view), view.update
    if view.square_sums is None and update.row_norm is None and update.dense is None:
        view.square_sums = square_sums(rows)
    # a row with inf or NaN gets no noise
    return row_square_sums(rows, update, view.square_sums).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def standard_deviations(views: Sequence[WeightView], noise: str, sigma: float, group: Sequence[WeightView]) -> list[Tensor]:
    """The noise's standard deviation on each of ``views``, float32: ``(rows, 1)``, or ``(1, 1)`` for one of all its rows.

    ``group``: all weights that share one scale where ``noise`` is ``"isotropic"``. Not for ``"element"``, whose standard
    deviation is sigma |w|. Sums over the shards of a weight, so every rank must come here.
    """
    if noise == "filter":
        sums = [_finite_square_sums(view) for view in views]
        return stds_of(sums, [rows_of(view).shape[1] for view in views], noise, sigma)
    whole = list(views if noise == "layer" else group)
    totals = [summed_over_shards(_finite_square_sums(v).sum(0, keepdim=True), v.weight.parameter) for v in whole]
    stds = stds_of(totals, [view.weight.parameter.numel() for view in whole], noise, sigma)
    return stds if noise == "layer" else [stds[0].to(rows_of(view).device) for view in views]


def stds_of(sums: "Sequence[Tensor]", sizes: "Sequence[int]", noise: str, sigma: float) -> "list[Tensor]":
    """Eq. 7: sigma times the root mean square of what shares a scale; of each weight a column.

    ``sums``: 1-D, of squares over so many elements as ``sizes`` says: of each row, or for ``"layer"`` and ``"isotropic"`` of
    the whole weight. Apart from the adding up of ``"isotropic"``, no more operations for many weights than for few: on a GPU
    each is a launch.
    """
    if noise == "isotropic":
        total = sum((each.to(sums[0].device) for each in sums[1:]), sums[0])
        (std,) = stds_of([total], [sum(sizes)], "layer", sigma)
        return [std.to(each.device) for each in sums]
    alike: dict[Any, list[int]] = {}
    for number, (each, size) in enumerate(zip(sums, sizes)):
        alike.setdefault((size, each.device, each.dtype), []).append(number)
    stds: dict[int, Tensor] = {}
    for (size, _, _), numbers in alike.items():
        some = [sums[number] for number in numbers]
        mean = torch.cat(some) / size
        # MKL's square root is off by a last bit on some CPUs, and the same key is to give the same noise on all
        root = mean.double().sqrt_().to(mean.dtype) if mean.device.type == "cpu" else mean.sqrt_()
        column = root.mul_(sigma).unsqueeze(1)
        stds.update(zip(numbers, column.split([len(each) for each in some])))
    return [stds[number] for number in range(len(sums))]
