"""The one place that asks "which adapter is this?"."""

from collections.abc import Iterable

from torch import nn

from ..core.weight import AdaptedWeight
from .base import Adapter
from .custom import CUSTOM
from .peft import PEFT
from .raw import raw_weights

__all__ = ["adapter_of", "find_weights", "raw_weights"]

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
