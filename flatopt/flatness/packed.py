"""The rise of the loss under training's noise where weights are packed (4-bit bases): made in the layers' own forward."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters.quantized import format_of
from ..optimizers.flat import FlatPerturbOptimizer
from ..optimizers.groups import read_groups
from ..perturbation.weights import perturbed_by_another
from .point import LossFn, in_eval_mode, listed

# moves no bit, but runs the same forward; in the layer's own, bitsandbytes would repack it for inference on some CPUs
NONE = 1e-30


def has_packed(model: nn.Module, targets: Any) -> bool:
    """Whether any of the targets' weights cannot be written to as numbers."""
    groups, _ = read_groups(model if targets is None else targets, {})
    return any(format_of(weight.owner, weight.name) is not None for group in groups for weight in group["targets"])


def rises_of_packed(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    sigmas: Sequence[float],
    draws: int,
    seed: int,
    targets: Any,
) -> "tuple[float, list[list[float]]]":
    """The loss at W + sBA, and for each σ its rise in each of ``2 * draws`` draws of ε, the same normals for every σ."""
    batches = listed(batches)
    targets = model if targets is None else targets
    groups, roots = read_groups(targets, {})
    other = perturbed_by_another(weight for group in groups for weight in group["targets"])
    if other is not None:
        raise ValueError(
            f"{other.path} is quantised and belongs to a FlatPerturbOptimizer: its noise is put into the same forward. Call "
            "detach() on that optimizer and make it anew afterwards, or measure before it is made"
        )
    nothing = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)

    @torch.no_grad()
    def loss(sigma: float, draw: int) -> float:
        for group in optimizer.perturb_groups:
            group["sigma"] = sigma
        optimizer.step_count = draw
        with optimizer.perturbed():
            return sum(float(loss_fn(model, batch)) for batch in batches) / len(batches)

    with (
        in_eval_mode(model, *roots),
        FlatPerturbOptimizer(
            nothing, targets, sigma=0.0, schedule="constant", restore="copy", seed=seed, shared=True
        ) as optimizer,
    ):
        clean = loss(NONE, 0)
        return clean, [[loss(sigma, draw) - clean for draw in range(2 * draws)] for sigma in sigmas]
