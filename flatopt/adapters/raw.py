"""Frozen parameters without a low-rank module: nothing is added to them."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.weight import AdaptedWeight, WeightUpdate
from .base import Singleton


class Raw(Singleton):
    name = "raw"

    def matches(self, module: nn.Module) -> bool:
        return False  # these are given as parameters

    def weights(self, layer: nn.Module, path: str) -> Iterator[AdaptedWeight]:
        for name in layer._parameters:
            yield AdaptedWeight(layer, name, name, layer, self)

    def updates(self, weights: Sequence[AdaptedWeight]) -> list[WeightUpdate]:
        return [WeightUpdate()] * len(weights)

    def update_key(self, weights: Sequence[AdaptedWeight], places: list[Any]) -> list[Any]:
        return [None] * len(weights)

    def is_merged(self, layer: nn.Module) -> bool:
        return False

    def guarded_methods(self, layer: nn.Module) -> list[tuple[type, str]]:
        return []


RAW = Raw()


def raw_weights(parameters: list[Tensor]) -> list[AdaptedWeight]:
    """The weights of ``{"params": [...]}``, which errors call ``params[0]``, ``params[1]``, ..."""
    holder = nn.Module()  # gives them the (owner, name) that weights are held by
    holder._parameters.update({f"params[{i}]": p for i, p in enumerate(parameters)})  # type: ignore[misc]
    return list(RAW.weights(holder, ""))
