"""One frozen weight: what it is (described once), how it stands (looked at once a step), and what its adapter adds to it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .sharding import local

if TYPE_CHECKING:
    from ..adapters.base import Adapter

OUTPUTS = {"rows": (0,), "columns": (1,), "experts": (0,)}  # layout of a weight -> the dimensions it may be sharded along

Factors = tuple[Tensor, Tensor, "float | Tensor"]  # (B, A, scaling)


class WeightUpdate(NamedTuple):
    """What a low-rank module adds to one weight, with rows = outputs and columns = fan-in.

    ``factors``: low-rank terms ``(B, A, scaling)``, B ``(rows, r)`` and A ``(r, fan_in)``, summed.
    ``dense``: an update already multiplied out, ``(rows, fan_in)``.
    ``row_norm``: ``(rows,)``, the row norms of the weight the layer applies, where the adapter itself fixes them (DoRA).
    ``alpha``: factor on W itself, per row (several DoRA adapters at once).
    """

    factors: tuple[Factors, ...] = ()
    dense: Tensor | None = None
    row_norm: Tensor | None = None
    alpha: Tensor | None = None


@dataclass(eq=False)
class AdaptedWeight:
    """The frozen weight ``owner.name`` under the low-rank module ``layer``, looked up anew at each use: FSDP2 and others
    replace Parameters.

    ``path``: how errors name it. ``adapter``: what tells the layer's update. ``layout``: where the outputs are, see OUTPUTS.
    ``rebuilt``: a new parameter after each forward (PEFT on nn.MultiheadAttention), so only a copy can restore it.
    ``version_moves``: its version counter moves in every forward (PEFT's ParamWrapper), so it tells nothing of writes.
    ``by_layer``: the owner is part of the layer, whose forward reads it, or may, without calling the owner's, so the layer
    is listened to as well.
    """

    owner: nn.Module
    name: str
    path: str
    layer: nn.Module
    adapter: "Adapter"
    layout: str = "rows"
    rebuilt: bool = False
    version_moves: bool = False
    by_layer: bool = False

    def __repr__(self) -> str:
        return f"AdaptedWeight({self.path})"

    @property
    def parameter(self) -> Tensor:
        # nn.Module's own lookup costs as much as all else here together, several times a weight and step
        parameter = self.owner._parameters.get(self.name)
        return getattr(self.owner, self.name) if parameter is None else parameter

    @property
    def weight(self) -> Tensor:
        """This rank's part, without autograd, but with its version counter: what a graph saved is known to have changed."""
        return local(self.parameter).detach()

    def rows(self, weight: Tensor | None = None) -> Tensor:
        """The 2-D view, rows = outputs, columns = fan-in, of the weight, or of a tensor like it, strides and all."""
        if weight is None:
            weight = self.weight
        if weight.dim() < 2:
            return weight.reshape(1, -1)
        if self.layout == "columns":
            return weight.t()
        if self.layout == "experts":
            return weight.flatten(0, 1)
        if weight.dim() > 2:
            weight = weight.permute(memory_order(weight))
        return weight.view(weight.shape[0], -1)


@dataclass(eq=False, slots=True)
class WeightView:
    """How a weight stands in one step: its number (which names its noise), its 2-D view, and its update.

    ``tensor`` shares memory and version counter with the weight (its local part), so that a graph that saved it notices a
    write; ``rows`` is its 2-D view. Both are None between steps: nothing may keep a deleted model's memory.
    ``square_sums``: per row the sum of squares of W alone, float32, ``(rows,)``; filled by a backend and kept as long as
    nobody but flatopt changes W. ``first_row``: the number of its first row in the whole of a sharded weight.
    """

    weight: AdaptedWeight
    index: int
    first_row: int = 0
    parameter: Tensor | None = None
    tensor: Tensor | None = None
    rows: Tensor | None = None
    update: WeightUpdate = field(default_factory=WeightUpdate)
    square_sums: Tensor | None = None


def memory_order(weight: Tensor) -> tuple[int, ...]:
    """Dimensions as they lie in memory, rows first: flattened in this order, a channels_last kernel is still a view."""
    strides = weight.stride()
    return 0, *sorted(range(1, weight.dim()), key=lambda d: -strides[d])


def in_memory_order(update: WeightUpdate, weight: Tensor, layout: str) -> WeightUpdate:
    """An update in rows x fan-in, its columns ordered as those of ``AdaptedWeight.rows(weight)``."""
    if layout == "experts":
        return update if update.dense is None else update._replace(dense=update.dense.reshape(weight.flatten(0, 1).shape))
    if weight.dim() <= 2:
        return update
    order = memory_order(weight)
    if update.dense is not None:
        return update._replace(dense=update.dense.reshape(weight.shape).permute(order).flatten(1))
    if weight.is_contiguous():
        return update
    factors = tuple((B, A.view(-1, *weight.shape[1:]).permute(order).flatten(1), s) for B, A, s in update.factors)
    return update._replace(factors=factors)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
