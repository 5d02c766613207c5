"""Curvature at the merged weights: the Hessian of the loss in the full space, by products with vectors alone."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from ..core.arguments import demand_whole
from .point import LossFn, at_weights
from .sharpness import Estimate, check_draws, estimate


class TopEigenvalue(NamedTuple):
    """``value``; ``residual``: an eigenvalue lies within this of it; ``iterations``: Hessian products; ``converged``."""

    value: float
    residual: float
    iterations: int
    converged: bool


def hessian_trace(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], *, draws: int = 32, seed: int = 0, targets: Any = None
) -> Estimate:
    r"""The trace of the Hessian at W', :math:`\mathbb E\,v^\top H v` over random signs v (Hutchinson, 1990).

    Args:
        model, loss_fn, batches, targets: see :mod:`flatopt.flatness`. Use float32 weights: second derivatives in half
            precision are mostly rounding.
        draws: how many v, one Hessian product over all batches each; at least 2.
        seed: names the v, the same for models of one architecture.
    """
    check_draws(draws)
    with at_weights(model, loss_fn, batches, targets) as point:
        samples = []
        for draw in range(draws):
            v = [point.random(i, seed, draw, signs=True) for i in range(len(point.weights))]
            samples.append(_dot(v, point.hessian_times(v)))
    return estimate(samples)


def hessian_top_eigenvalue(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
    targets: Any = None,
) -> TopEigenvalue:
    r"""The largest eigenvalue of the Hessian at W', by the Lanczos iteration from a random vector.

    Three vectors of the size of W' are kept, whatever the number of iterations: no vector is made orthogonal anew, which
    leaves the extreme Ritz values right and only repeats them (Paige, 1980).

    Args:
        model, loss_fn, batches, targets: see :mod:`flatopt.flatness`. Use float32 weights.
        tolerance: stop when the residual is at most this fraction of the value.
        max_iterations: Hessian products to stop at, converged or not.
        seed: names the first vector.
    """
    demand_whole("max_iterations", max_iterations, 1)
    with at_weights(model, loss_fn, batches, targets) as point:
        last: list[torch.Tensor] | None = None
        v = [point.random(i, seed, 0) for i in range(len(point.weights))]
        _scale_(v, 1 / math.sqrt(_dot(v, v)))
        diagonal: list[float] = []
        beside: list[float] = []
        while True:
            w = point.hessian_times(v)
            diagonal.append(_dot(w, v))
            _add_(w, v, -diagonal[-1])
            if last is not None:
                _add_(w, last, -beside[-1])
            length = math.sqrt(_dot(w, w))
            if not math.isfinite(length):
                raise ValueError("the Hessian product is not finite: is the loss finite, and are the weights float32?")
            values, vectors = numpy.linalg.eigh(numpy.diag(diagonal) + numpy.diag(beside, 1) + numpy.diag(beside, -1))
            value, residual = float(values[-1]), float(length * abs(vectors[-1, -1]))
            converged = residual <= tolerance * abs(value)
            if converged or length == 0 or len(diagonal) >= max_iterations:
                return TopEigenvalue(value, residual, len(diagonal), converged)
            beside.append(length)
            _scale_(w, 1 / length)
            last, v = v, w


def _dot(a: "list[torch.Tensor]", b: "list[torch.Tensor]") -> float:
    return sum(torch.sum(x * y, dtype=torch.float64).item() for x, y in zip(a, b))


def _add_(a: "list[torch.Tensor]", b: "list[torch.Tensor]", factor: float) -> None:
    for x, y in zip(a, b):
        x.add_(y, alpha=factor)


def _scale_(a: "list[torch.Tensor]", factor: float) -> None:
    for x in a:
        x.mul_(factor)
