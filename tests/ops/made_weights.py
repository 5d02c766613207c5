"""Weights as a backend sees them, made by hand."""

import torch
from torch import nn

from flatopt import ops
from flatopt.core.weight import AdaptedWeight, WeightUpdate, WeightView


class Holder(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.weight = nn.Parameter(tensor, requires_grad=False)


def weight_view(tensor, update=None, index=1, layout="rows", rebuilt=False, first_row=0):
    """A view of a frozen parameter that holds ``tensor``."""
    holder = Holder(tensor)
    weight = AdaptedWeight(holder, "weight", f"layer{index}.weight", holder, None, layout, rebuilt)
    view = WeightView(weight, index, first_row, update=update or WeightUpdate())
    return looked_at(view)


def looked_at(view):
    view.parameter = view.weight.parameter
    view.tensor = view.parameter.detach()
    view.rows = view.weight.rows(view.tensor)
    return view


def gaussian(*shape, dtype=torch.float32, scale=0.02, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(device)


def factors(rows, fan_in, r=3, seed=1, scaling=2.0, device="cpu"):
    B, A = (
        gaussian(rows, r, scale=0.1, seed=seed, device=device),
        gaussian(r, fan_in, scale=0.1, seed=seed + 1, device=device),
    )
    return WeightUpdate(((B, A, scaling),))


class Plans:
    """The plans of a group, as one."""

    def __init__(self, views, noise="filter", restore="reversible"):
        self.views, self.plans = views, ops.plan(views, noise, restore)

    def fill_std(self, sigma):
        with ops.writing():
            for plan in self.plans:
                plan.fill_std(sigma)

    def perturb(self, key):
        with ops.writing():
            for plan in self.plans:
                plan.perturb(key)

    def restore(self):
        with ops.writing():
            for plan in self.plans:
                plan.restore()

    def written(self):
        return [view for plan in self.plans for view in plan.written(wait=True)]

    def release(self):
        for plan in self.plans:
            plan.release()


def clones(views):
    return [view.tensor.clone(memory_format=torch.preserve_format) for view in views]


__all__ = ["Holder", "Plans", "clones", "factors", "gaussian", "looked_at", "weight_view"]
