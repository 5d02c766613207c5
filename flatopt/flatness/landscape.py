"""The loss along filter-normalised random directions through the merged weights (Li et al., NeurIPS 2018)."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from ..core.arguments import demand_positive, demand_whole
from .point import LossFn, Point, at_weights


class Curve(NamedTuple):
    """``loss[i]`` at W' + ``position[i]`` d."""

    position: numpy.ndarray
    loss: numpy.ndarray


class Surface(NamedTuple):
    """``loss[j, i]`` at W' + ``position[i]`` d₁ + ``position[j]`` d₂."""

    position: numpy.ndarray
    loss: numpy.ndarray


def _direction(point: Point, seed: int, number: int) -> "list[torch.Tensor]":
    direction = []
    for i in range(len(point.weights)):
        z = point.random(i, seed, number)
        direction.append(z.div_(point.row_norms(i, z)).mul_(point.row_norms(i, point.values(i))))
    return direction


def loss_curve(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
    targets: Any = None,
) -> Curve:
    r"""The loss on a line through W': L(W' + x d), x from -``span`` to ``span``.

    .. math:: d_{i,:} = \frac{z_{i,:}}{\lVert z_{i,:}\rVert}\,\lVert W'_{i,:}\rVert, \qquad z \sim \mathcal N(0, I)

    so that at x = 1 every output row ("filter") has moved by its own norm; x is the σ of Eq. 7 in length.

    Args:
        model, loss_fn, batches, targets: see :mod:`flatopt.flatness`.
        span: how far to go each way, in row norms; 1 is Li et al.'s.
        points: how many x, evenly spaced; odd, to pass through W' itself.
        seed: names z, the same for models of one architecture; d then differs only by the models' row norms.
    """
    position = _positions(span, points)
    with at_weights(model, loss_fn, batches, targets) as point:
        d, loss = _direction(point, seed, 0), []
        for x in position.tolist():
            point.move(partial(_along, d, x))
            loss.append(point.loss())
    return Curve(position, numpy.array(loss))


def loss_surface(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    span: float = 1.0,
    points: int = 15,
    seed: int = 0,
    targets: Any = None,
) -> Surface:
    """The loss on a plane through W', spanned by two directions as in :func:`loss_curve`; the first is the curve's own.

    ``points`` x ``points`` evaluations of all batches. Other arguments as in :func:`loss_curve`.
    """
    position = _positions(span, points)
    with at_weights(model, loss_fn, batches, targets) as point:
        d, e = _direction(point, seed, 0), _direction(point, seed, 1)
        loss = numpy.empty((points, points))
        for j, y in enumerate(position.tolist()):
            for i, x in enumerate(position.tolist()):
                point.move(partial(_in_plane, d, x, e, y))
                loss[j, i] = point.loss()
    return Surface(position, loss)


def _along(d: "list[torch.Tensor]", x: float, index: int) -> torch.Tensor:
    return d[index] * x


def _in_plane(d: "list[torch.Tensor]", x: float, e: "list[torch.Tensor]", y: float, index: int) -> torch.Tensor:
    return d[index] * x + e[index] * y


def _positions(span: float, points: int) -> numpy.ndarray:
    demand_positive("span", span)
    demand_whole("points", points, 3, " and odd")
    if points % 2 == 0:
        raise ValueError(f"points must be odd, to pass through W' itself, got {points!r}")
    return numpy.linspace(-span, span, points)
