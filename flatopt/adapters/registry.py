"""The one place that asks "which adapter is this?"."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core.weight import AdaptedWeight
from .base import Adapter
from .custom import CUSTOM
from .peft import PEFT
from .raw import RAW, raw_weights

__all__ = ["adapter_of", "as_plain_data", "find_weights", "from_plain_data", "raw_weights"]

ADAPTERS: tuple[Adapter, ...] = (CUSTOM, PEFT)  # what a user registered comes first


def adapter_of(module: nn.Module) -> Adapter | None:
    """What knows ``module`` as a low-rank module; None for any other module."""
    for adapter in ADAPTERS:
        if adapter.matches(module):
            return adapter
    return None


def find_weights(modules: Iterable[nn.Module]) -> list[AdaptedWeight]:
    """The frozen weight under every low-rank module in ``modules``, each ``(module, name)`` once.

    Raises:
        ValueError: a low-rank module that cannot be perturbed; names it, the reason and the way out.
    """
    found: dict[tuple[nn.Module, str], AdaptedWeight] = {}
    for module in modules:
        for path, layer in module.named_modules():
            adapter = adapter_of(layer)
            for weight in adapter.weights(layer, path or type(layer).__name__) if adapter else ():
                found.setdefault((weight.owner, weight.name), weight)
    return list(found.values())


def as_plain_data(weights: Iterable[AdaptedWeight]) -> list[dict[str, Any]]:
    """For pickles, which then name none of the files in here: these may move."""
    return [{**vars(weight), "adapter": weight.adapter.name} for weight in weights]


def from_plain_data(weights: Iterable[dict[str, Any]]) -> list[AdaptedWeight]:
    adapters = {adapter.name: adapter for adapter in (*ADAPTERS, RAW)}
    return [AdaptedWeight(**{**each, "adapter": adapters[each["adapter"]]}) for each in weights]
