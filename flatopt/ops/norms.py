r"""How large the noise is: Eq. 7 of Flat-LoRA and its relatives.

.. math:: \varepsilon_{ij} \sim \mathcal N\big(0,\ \tfrac{\sigma^2}{n}\,\lVert W'_{i,:}\rVert^2\big), \quad W' = W + sBA

The row norms of the merged :math:`W'` need no temporary of its size: row by row,
:math:`\lVert w + sBA\rVert^2 = \lVert w\rVert^2 + 2s\,w\cdot(BA)^\top + s^2\lVert BA\rVert^2`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.sharding import summed_over_shards
from ..core.weight import WeightUpdate, WeightView

NOISES = ("filter", "layer", "isotropic", "element")
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
    total = square_sums(rows) if of_weight is None else of_weight
    alpha: float | Tensor = 1.0 if update.alpha is None else update.alpha
    total = alpha * alpha * total
    if update.factors:
        B = torch.cat([(B.detach().float() * s) for B, _, s in update.factors], dim=1).to(rows.device)
        A = torch.cat([A.detach().float() for _, A, _ in update.factors]).to(rows.device)
        cross = torch.cat([rows[s].float() @ A.t() for s in _slabs(rows)])
        total = total + 2 * alpha * (B * cross).sum(1) + ((B @ (A @ A.t())) * B).sum(1)
    return total.clamp_min(0.0)


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
        return [(_finite_square_sums(view) / rows_of(view).shape[1]).sqrt_().mul_(sigma).unsqueeze(1) for view in views]
    whole = list(views if noise == "layer" else group)
    sizes = [view.weight.parameter.numel() for view in whole]
    totals = [summed_over_shards(_finite_square_sums(view).sum(), view.weight.parameter) for view in whole]
    if noise == "layer":
        return [(total / size).sqrt_().mul_(sigma).view(1, 1) for total, size in zip(totals, sizes)]
    every = sum((total.to(totals[0].device) for total in totals[1:]), totals[0])
    of_all = (every / sum(sizes)).sqrt().mul_(sigma).view(1, 1)
    return [of_all.to(rows_of(view).device) for view in views]
