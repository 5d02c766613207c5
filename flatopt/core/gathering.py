"""The A's of sharded layers, whole on each rank: one collective for all layers of a step."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from .sharding import is_sharded, is_strided, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from .weight import WeightUpdate


def is_split_as(update: "WeightUpdate", weight: Tensor, layout: str) -> bool:
    """Whether B's rows lie on the ranks as those of ``weight`` do, and each A is whole or in rows: FSDP2's way.

    Follows from what is the same on all ranks, as it decides which collectives are called.
    """
    if not is_sharded(weight) or layout != "rows" or not _splits_first_dimension(weight):
        return False
    scaled = any(isinstance(scaling, Tensor) for _, _, scaling in update.factors)
    if scaled or update.dense is not None or update.alpha is not None or (weight.dim() > 2 and not weight.is_contiguous()):
        return False
    of_rows = [B for B, _, _ in update.factors] + ([] if update.row_norm is None else [update.row_norm])
    sharded = [A for _, A, _ in update.factors if is_sharded(A)]
    return all(_lie_alike(tensor, weight) for tensor in of_rows) and all(
        A.numel() > 0 and A.is_contiguous() and _splits_first_dimension(A) for A in sharded
    )


def _splits_first_dimension(tensor: "DTensor") -> bool:
    """Along one dimension of its mesh at most."""
    plain = all(p.is_replicate() or p.is_shard(0) for p in tensor.placements) and not is_strided(tensor)
    return plain and sum(p.is_shard() for p in tensor.placements) <= 1


def _lie_alike(tensor: Tensor, weight: "DTensor") -> bool:
    return (
        is_sharded(tensor)
        and tensor.shape[0] == weight.shape[0]
        and tensor.placements == weight.placements
        and not is_strided(tensor)
        and tensor.device_mesh == weight.device_mesh
    )


class Gathering:
    """Whole A's, in memory that is kept from step to step, so that who reads them by address need not look again.

    Args:
        factors: those of all layers, in the same order on all ranks, each split by :func:`is_split_as`'s rule.
    """

    def __init__(self, factors: "Iterable[Tensor]"):
        self._sharded = {id(A): A for A in factors if is_sharded(A)}  # kept: an id is its own only as long as it lives
        self._whole: dict[int, Tensor] = {}
        buckets: dict[tuple[str, torch.device, torch.dtype], tuple[ProcessGroup, list[DTensor]]] = {}
        for A in self._sharded.values():
            along = next((dim for dim, placement in enumerate(A.placements) if placement.is_shard()), None)
            group = None if along is None else A.device_mesh.get_group(along)
            if group is None or group.size() == 1:
                self._whole[id(A)] = local(A)
            else:
                buckets.setdefault((group.group_name, A.device, A.dtype), (group, []))[1].append(A)
        self._buckets = [_Bucket(group, some) for group, some in buckets.values()]
        for bucket in self._buckets:
            self._whole.update(zip(map(id, bucket.sharded), bucket.whole))

    def of(self, update: "WeightUpdate") -> "WeightUpdate":
        """This rank's rows of an update that :func:`is_split_as` said yes to, with the whole A's."""
        factors = tuple((local(B), self._whole.get(id(A), A), scaling) for B, A, scaling in update.factors)
        row_norm = None if update.row_norm is None else local(update.row_norm)
        return update._replace(factors=factors, row_norm=row_norm)

    def gather(self) -> None:
        """Fill the whole A's with what the ranks hold now. Every rank must come here."""
        for bucket in self._buckets:
            bucket.gather()


class _Bucket:
    """Those of one process group, device and dtype. Each rank sends as much of an A as the one with the most of it has."""

    def __init__(self, group: "ProcessGroup", sharded: "list[DTensor]"):
        self.sharded, self._group = sharded, group
        heights = [-(-A.shape[0] // group.size()) for A in sharded]  # rows of a rank, as torch.chunk splits them
        self._holders = max(-(-A.shape[0] // height) for A, height in zip(sharded, heights))  # ranks after them have none
        self._shares = [height * A.shape[1:].numel() for A, height in zip(sharded, heights)]
        sizes = [self._holders * share for share in self._shares]
        parts = local(sharded[0]).new_empty(sum(sizes)).split(sizes)
        self._parts = [part.view(self._holders, -1) for part in parts]
        self.whole = [part[: A.numel()].view(A.shape) for A, part in zip(sharded, parts)]
        flat = [local(A).detach().view(-1) for A in sharded]
        padded = ((part, part.new_zeros(share - part.numel())) for part, share in zip(flat, self._shares))
        self._sent = [part for pair in padded for part in pair if part.numel()]

    def gather(self) -> None:
        # given back after the copy: the forward can have it
        gathered = self._parts[0].new_empty(self._group.size(), sum(self._shares))
        mine = gathered[self._group.rank()]
        torch.cat(self._sent, out=mine)
        # all_gather_into_tensor is its name in older torch
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered.view(-1), mine, self._group)
        torch.split_with_sizes_copy(gathered[: self._holders], self._shares, dim=1, out=self._parts)
