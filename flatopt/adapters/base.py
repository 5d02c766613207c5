"""What every kind of low-rank module has to tell."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..core.weight import AdaptedWeight, Factors, WeightUpdate


class Adapter(Protocol):
    """One kind of low-rank module. Instances are stateless, and one a class: modules keep all state.

    ``name``: how errors call it.
    """

    name: str

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is one of this kind."""

    def weights(self, layer: nn.Module, path: str) -> Iterator[AdaptedWeight]:
        """The frozen weights under ``layer``, which errors call ``path``.

        Raises:
            ValueError: a layer whose noise could not be told: names ``path``, the reason and the way out.
        """

    def updates(self, weights: Sequence[AdaptedWeight]) -> list[WeightUpdate]:
        """What is added to each weight now: whole tensors (of all ranks), ``(rows, fan_in)``, without autograd.

        Of stacked experts a dense update is ``(experts, rows of one * fan_in)``.

        Raises:
            ValueError: an update that does not fit its weight; names the weight.
        """

    def update_key(self, weights: Sequence[AdaptedWeight], places: list[Any]) -> list[Any] | None:
        """All that :meth:`updates` follows from, one item a weight, to be compared with ``==``: where an item is equal to
        what it was, and the tensors of that update are still alive, the update consists of the same tensors in the same
        memory, and is not merged if it was not. An item that is equal to none but itself: the update has to be asked for
        anew. None: all of them have to.

        ``places``: one item a weight, None at the first call, for the adapter to keep where it found what it looks at.
        """

    def is_merged(self, layer: nn.Module) -> bool:
        """Whether the update is already inside the weight."""

    def guarded_methods(self, layer: nn.Module) -> list[tuple[type, str]]:
        """The methods, ``(class, name)``, that read or write a base weight directly and need it clean; see ``guards``."""


Base = Tensor | tuple[nn.Module, str]  # a parameter inside the module, or (its owner, its name) wherever that is
Delta = Tensor | Factors | Sequence[Factors] | WeightUpdate


class LowRank(NamedTuple):
    """How one class of low-rank modules is read, each field a function of the module.

    ``base`` and ``delta``: see ``register_low_rank``. ``layout``: as of ``AdaptedWeight``. ``merged``: whether the update is
    inside the weight now. ``adapted``: whether there is an update at all.
    """

    base: Callable[[Any], Base]
    delta: Callable[[Any], Delta]
    layout: Callable[[Any], str] = lambda module: "rows"
    merged: Callable[[Any], bool] = lambda module: getattr(module, "merged", False) is True
    adapted: Callable[[Any], bool] = lambda module: True


class Singleton:
    """Pickled and copied by the name, in its module, of the one instance: the class's own name in capitals."""

    def __reduce__(self) -> str:
        return type(self).__name__.upper()

    def __repr__(self) -> str:
        return f"{type(self).__module__}.{self.__reduce__()}"


def joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
