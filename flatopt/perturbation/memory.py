"""Which weights lie in the same memory."""

import bisect
import itertools
from collections.abc import Iterable, Sequence

import torch

from ..core.weight import AdaptedWeight


def extent_of(weight: AdaptedWeight) -> "tuple[int, int] | None":
    try:
        tensor = weight.weight
        start = tensor.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
        return (start, start + reach * tensor.element_size()) if start and tensor.numel() else None
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None  # a tensor that is elsewhere (meta, fake, packed): it shares memory with nothing here


def extents(weights: "Iterable[AdaptedWeight]") -> "list[tuple[int, int, AdaptedWeight]]":
    """(start, end) of what each weight occupies, and the weight."""
    return [(*extent, weight) for weight in weights if (extent := extent_of(weight)) is not None]


def overlap(
    mine: "list[tuple[int, int, AdaptedWeight]]", others: "list[tuple[int, int, AdaptedWeight]]"
) -> "AdaptedWeight | None":
    """A weight of ``mine`` that shares memory with one of ``others``."""
    others = sorted(others, key=lambda extent: extent[0])
    starts = [start for start, _, _ in others]
    reach = list(itertools.accumulate((end for _, end, _ in others), max))
    for start, end, weight in mine:
        before = bisect.bisect_left(starts, end)
        if before and reach[before - 1] > start:
            return weight
    return None


def refuse_overlapping(weights: "Sequence[AdaptedWeight]") -> None:
    """Raise where two targets are views that share some memory: noise taken off one would be taken off the other."""
    found = ((*extent, i) for i, weight in enumerate(weights) if (extent := extent_of(weight)))
    extents = sorted(found, key=lambda extent: extent[:2])
    for (start, end, i), (start2, end2, j) in itertools.pairwise(extents):
        if start2 < end and (start, end) != (start2, end2) and _shares_elements(weights[i], weights[j]):
            raise ValueError(
                f"{weights[i].path} and {weights[j].path} are views of the same memory that overlap in part. Give one of "
                "them, or the tensor they are views of"
            )


def _shares_elements(one: AdaptedWeight, other: AdaptedWeight) -> bool:
    a, b = one.weight, other.weight
    size = a.element_size()
    if b.element_size() != size or (a.data_ptr() - b.data_ptr()) % size:
        return True
    base = min(a.data_ptr(), b.data_ptr())
    offsets = [(t.data_ptr() - base) // size for t in (a, b)]
    span = max(o + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1 for o, t in zip(offsets, (a, b)))
    touched = torch.zeros(span, dtype=torch.uint8)
    touched.as_strided(a.shape, a.stride(), offsets[0]).fill_(1)
    return bool(touched.as_strided(b.shape, b.stride(), offsets[1]).any())
