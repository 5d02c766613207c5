"""How much the loss rises near the weights: on average, and at worst."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from ..core.arguments import demand_positive, demand_whole, is_number
from ..ops.norms import square_sums, stds_of
from .packed import has_packed, rises_of_packed
from .point import LossFn, Point, at_weights


class Estimate(NamedTuple):
    """A mean over random draws. ``stderr``: its standard error; ``samples``: one a draw, to pair with another model's."""

    value: float
    stderr: float
    samples: "tuple[float, ...]"


class WorstCase(NamedTuple):
    """``value``: the largest rise of the loss found; ``path``: the rise at each step of the ascent."""

    value: float
    path: "tuple[float, ...]"


def estimate(samples: "list[float]") -> Estimate:
    with numpy.errstate(invalid="ignore"):  # a loss that overflows
        mean, std = float(numpy.mean(samples)), float(numpy.std(samples, ddof=1))
    return Estimate(mean, std / math.sqrt(len(samples)), tuple(samples))


def check_draws(draws: int) -> None:
    demand_whole("draws", draws, 2, ", for a standard error")


def noise_scales(point: Point) -> "list[torch.Tensor]":
    """Per weight the noise std for σ = 1, shaped like it."""
    rows = (point.rows(i, point.values(i)) for i in range(len(point.weights)))
    sums, sizes = zip(*((square_sums(each), each.shape[1]) for each in rows))
    return [point.spread(i, std) for i, std in enumerate(stds_of(sums, sizes, "filter", 1.0))]


def mean_rise(point: Point, clean: float, sigma: float, draws: int, seed: int, scales: "list[torch.Tensor]") -> Estimate:
    """Of the loss under the noise of Eq. 7. Each ε comes with -ε, so that the gradient's part of the rise cancels."""

    def noise(draw: int, signed: float, index: int) -> torch.Tensor:
        return point.random(index, seed, draw).mul_(scales[index]).mul_(signed)

    samples = []
    for draw in range(draws):
        losses = []
        for signed in (sigma, -sigma):
            point.move(partial(noise, draw, signed))
            losses.append(point.loss())
        samples.append(sum(losses) / 2 - clean)
    return estimate(samples)


def rises(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    sigmas: Sequence[float],
    draws: int,
    seed: int,
    targets: Any,
) -> "tuple[float, list[Estimate]]":
    """The loss, and its mean rise at each σ."""
    if isinstance(targets, (list, tuple)) and all(isinstance(group, dict) for group in targets):  # read twice
        targets = [{k: list(v) if isinstance(v, Iterator) else v for k, v in group.items()} for group in targets]
    if has_packed(model, targets):
        clean, samples = rises_of_packed(model, loss_fn, batches, sigmas, draws, seed, targets)
        return clean, [estimate(each) for each in samples]
    with at_weights(model, loss_fn, batches, targets) as point:
        clean, scales = point.loss(), noise_scales(point)
        return clean, [mean_rise(point, clean, sigma, draws, seed, scales) for sigma in sigmas]


def expected_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    sigma: float = 0.05,
    draws: int = 8,
    seed: int = 0,
    targets: Any = None,
) -> Estimate:
    r"""The mean rise of the loss under the noise that Flat-LoRA trains with.

    .. math:: \mathbb E_\varepsilon\,L(W' + \varepsilon) - L(W'), \qquad
              \varepsilon_{ij} \sim \mathcal N\big(0,\ \tfrac{\sigma^2}{n}\,\lVert W'_{i,:}\rVert^2\big)

    Args:
        model, loss_fn, batches, targets: see :mod:`flatopt.flatness`.
        sigma: σ of Eq. 7 of arXiv 2409.14396. 0.05 is the paper's; take the one you trained with.
        draws: how many ε; at least 2. A sample is the mean over W' + ε and W' - ε, whose
            expectation is the same and whose variance has no first-order part. Where a base weight is quantised, each sample
            is one forward with the noise in it, as in training, and there are twice as many.
        seed: names the ε. The k-th sample of two models of one architecture has the same standard normals, so the difference
            between the models has a smaller error when it is taken sample by sample.
    """
    if not (is_number(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
    check_draws(draws)
    return rises(model, loss_fn, batches, (sigma,), draws, seed, targets)[1][0]


def worst_case_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    space: str = "full",
    adaptive: bool = False,
    steps: int = 20,
    targets: Any = None,
) -> WorstCase:
    r"""The largest rise of the loss within a ball, found by gradient ascent: a lower bound on the true maximum.

    .. math:: \max_{\lVert T^{-1}\varepsilon\rVert_2 \le \rho} L(w + \varepsilon) - L(w), \qquad
              T = I \text{ or, adaptive, } \operatorname{diag}|w|

    Projected ascent on :math:`\delta = T^{-1}\varepsilon` along :math:`Tg/\lVert Tg\rVert`, with steps that fall linearly
    from ρ; the first one is SAM's perturbation (Foret et al., ICLR 2021; adaptive: Kwon et al., ICML 2021).

    Args:
        model, loss_fn, batches, targets: see :mod:`flatopt.flatness`.
        rho: radius ρ of the ball over all weights together.
        space: ``"full"``, w = W'; ``"adapter"``, w = the trainable parameters of the low-rank modules, which
            must not be merged.
        adaptive: measure ε relative to the weights.
        steps: gradient evaluations. More find a larger rise; compare models at the same number.
    """
    demand_positive("rho", rho)
    demand_whole("steps", steps, 1)
    with at_weights(model, loss_fn, batches, targets, space) as point:
        count = range(len(point.weights))
        T = [point.values(i).abs_() if adaptive else torch.ones((), device=point.weights[i].device) for i in count]
        clean, g = point.gradient()
        delta = [torch.zeros_like(each) for each in g]
        path = []
        for step in range(steps):
            uphill = [g[i].mul_(T[i]) for i in count]
            length = _norm(uphill)
            if not (math.isfinite(length) and length > 0):
                break
            for d, u in zip(delta, uphill):
                d.add_(u, alpha=rho * (1 - step / steps) / length)
            size = _norm(delta)
            for d in delta:
                d.mul_(min(1.0, rho / size))
            point.move(lambda i: delta[i] * T[i])
            if step + 1 < steps:
                loss, g = point.gradient()
            else:
                loss = point.loss()
            path.append(loss - clean)
    return WorstCase(max([0.0, *(rise for rise in path if not math.isnan(rise))]), tuple(path))


def _norm(tensors: "list[torch.Tensor]") -> float:
    return math.sqrt(sum(torch.linalg.vector_norm(t).item() ** 2 for t in tensors))
