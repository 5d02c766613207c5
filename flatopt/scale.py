r"""How large the noise is: Eq. 7 of Flat-LoRA and its relatives.

.. math:: \varepsilon_{ij} \sim \mathcal N\big(0,\ \tfrac{\sigma^2}{n}\,\lVert W'_{i,:}\rVert^2\big), \quad W' = W + sBA

The row norms of the merged :math:`W'` need no temporary of its size: row by row,
:math:`\lVert w + sBA\rVert^2 = \lVert w\rVert^2 + 2s\,w\cdot(BA)^\top + s^2\lVert BA\rVert^2`.
"""

import torch
from torch import Tensor

from .delta import Delta
from .sharding import summed_over_shards

NOISES = ("filter", "layer", "isotropic", "element")
CHUNK = 1 << 20  # elements of W in float32 at a time


def _slabs(rows: Tensor):
    tall = max(1, CHUNK // max(rows.shape[1], 1))
    for top in range(0, rows.shape[0], tall):
        yield slice(top, top + tall)


def weight_square_sums(rows: Tensor) -> Tensor:
    """Per row of a 2-D weight the sum of squares, in float32."""
    return torch.cat([rows[s].float().square().sum(1) for s in _slabs(rows)])


def row_square_sums(rows: Tensor, delta: Delta, of_weight=weight_square_sums) -> Tensor:
    """Per row of ``alpha W + sum_j s_j B_j A_j + dense`` the sum of squares, float32; ``of_weight(rows)`` gives W's own."""
    if delta.row_norm is not None:
        return delta.row_norm.detach().to(rows.device).float().square()
    if delta.dense is not None:
        dense = delta.dense.detach()
        return torch.cat([(rows[s].float() + dense[s].float()).square_().sum(1) for s in _slabs(rows)])
    total = of_weight(rows)
    alpha = 1.0 if delta.alpha is None else delta.alpha
    total = alpha * alpha * total
    if delta.factors:
        B = torch.cat([(B.detach().float() * s) for B, _, s in delta.factors], dim=1).to(rows.device)
        A = torch.cat([A.detach().float() for _, A, _ in delta.factors]).to(rows.device)
        cross = torch.cat([rows[s].float() @ A.t() for s in _slabs(rows)])
        total = total + 2 * alpha * (B * cross).sum(1) + ((B @ (A @ A.t())) * B).sum(1)
    return total.clamp_min(0.0)


def _finite_square_sums(draw, delta: Delta) -> Tensor:
    # a row with inf or NaN gets no noise
    return row_square_sums(draw.rows, delta, draw.square_sums).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def filter_std(draw, delta: Delta) -> Tensor:
    """Of every row sigma ||w'|| / sqrt(n), ``(rows, 1)``, float32."""
    return (_finite_square_sums(draw, delta) / draw.rows.shape[1]).sqrt_().mul_(draw.sigma).unsqueeze(1)


def fill_std(draws: list) -> None:
    """Set ``draw.std`` of all draws of one group: a float32 tensor broadcastable to ``draw.rows``."""
    if draws[0].std is not None:
        return
    noise, sigma = draws[0].noise, draws[0].sigma
    if noise == "element":
        return  # the standard deviation is sigma |w|, element by element
    if noise == "filter":
        for draw in draws:
            draw.std = filter_std(draw, draw.target.delta())
        return
    sums = [_finite_square_sums(draw, draw.target.delta()) for draw in draws]
    if noise == "layer":
        for draw, total in zip(draws, sums):
            total = summed_over_shards(total.sum(), draw.target.parameter)
            draw.std = (total / draw.target.parameter.numel()).sqrt_().mul_(sigma).view(1, 1)
    else:
        size = sum(d.target.parameter.numel() for d in draws)
        totals = [summed_over_shards(total.sum(), d.target.parameter) for d, total in zip(draws, sums)]
        every = sum(total.to(totals[0].device) for total in totals)
        for draw in draws:
            draw.std = (every / size).sqrt().mul_(sigma).view(1, 1).to(draw.rows.device)
