"""Choosing σ: how much noise the trained model bears."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..core.arguments import is_number
from ..core.warn import warn_user
from .point import LossFn
from .sharpness import Estimate, check_draws, rises

SIGMAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


class RangeTest(NamedTuple):
    """``rise[i]``: the expected rise of the loss at ``sigmas[i]``, from ``clean``, the loss at W'; ``suggested``: a σ."""

    sigmas: "tuple[float, ...]"
    rise: "tuple[Estimate, ...]"
    clean: float
    threshold: float
    suggested: float


def sigma_range_test(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    sigmas: Sequence[float] = SIGMAS,
    threshold: float = 0.1,
    draws: int = 4,
    seed: int = 0,
    targets: Any = None,
) -> RangeTest:
    r"""The expected loss over a grid of σ, and a σ to train with.

    Train the adapter once without noise, or take one you have, and give a few batches of its *training* data. The rule:

    .. math:: \text{suggested} = \sigma \text{ at which } \mathbb E_\varepsilon\,L(W'+\varepsilon) - L(W')
              \text{ first reaches the threshold}

    with the rise read off linearly in σ² between grid points (it starts in proportion to σ²). It is where to begin, not
    the best σ: sweep from half to twice of it, on validation data.

    Args:
        model, loss_fn, batches, targets: see :mod:`flatopt.flatness`. An untrained head has nothing to lose: the rise is
            then small or negative, and says nothing.
        sigmas: the grid, rising.
        threshold: rise of the loss, in its units. 0.1 nats is for cross-entropy, and a rule of thumb: it gave .23, .32, .36
            and .40 on four seeds of the digits ViT in ``examples/``, whose validation chose .45 of {.15, .3, .45, .6, .8},
            and .83 to .86 on five of the ablations' text task, on which no σ helped: it tells what a model bears.
        draws: pairs ±ε per σ, from the same standard normals for every σ; at least 2. Where a base weight is quantised,
            twice as many ε, in the layers' forward as in training.
        seed: names the ε.

    Warns:
        if the rise stays below the threshold: ``suggested`` is then the largest σ of the grid; if the smallest one is far
        above it: ``suggested`` is then below the grid.
    """
    check_draws(draws)
    sigmas = tuple(sigmas)
    if not sigmas or not all(map(is_number, sigmas)) or sorted(set(sigmas)) != list(sigmas) or sigmas[0] <= 0:
        raise ValueError(f"sigmas must be positive and rising, got {sigmas!r}")
    clean, rise = rises(model, loss_fn, batches, sigmas, draws, seed, targets)
    suggested = _first_reaches(threshold, sigmas, [each.value for each in rise])
    return RangeTest(sigmas, tuple(rise), clean, threshold, suggested)


def _first_reaches(threshold: float, sigmas: "tuple[float, ...]", rise: "list[float]") -> float:
    low_sigma, low = 0.0, 0.0
    if rise[0] > 2 * threshold:
        warn_user(
            f"the loss rises by {rise[0]:.3g} already at sigma {sigmas[0]:g}, more than the threshold {threshold:g}, so "
            "that the sigma suggested lies below the grid: give smaller ones. A model this sharp may be fitted too far, or "
            "have BatchNorm statistics of another weight",
        )
    for sigma, value in zip(sigmas, rise):
        if not value < threshold:  # a loss that is no longer a number has reached it too
            part = (threshold - low) / (value - low) if value < float("inf") else 0.5
            return math.sqrt(low_sigma**2 + part * (sigma**2 - low_sigma**2))
        low_sigma, low = sigma, value
    warn_user(
        f"the loss rises by at most {max(rise):.3g}, less than the threshold {threshold:g}, up to sigma {sigmas[-1]:g}: "
        "give larger ones; or train the adapter first, as an untrained one has nothing to lose",
    )
    return sigmas[-1]
