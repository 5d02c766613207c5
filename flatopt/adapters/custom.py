"""Low-rank modules of a user's own: how to tell flatopt about them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..core.weight import AdaptedWeight, Factors, WeightUpdate
from .base import Base, Delta, LowRank, Singleton, joined
from .libraries import LIBRARIES
from .quantized import shaped

M = TypeVar("M", bound=nn.Module)


_registered: dict[type, LowRank] = {}


def register_low_rank(module_type: type[M], *, base: Callable[[M], Base], delta: Callable[[M], Delta]) -> None:
    r"""Tell flatopt where a low-rank module of your own keeps its frozen weight and its update.

    Args:
        module_type: the class; its subclasses are included.
        base: ``base(module)`` returns the frozen ``nn.Parameter`` W, of shape ``(out, in, ...)``: one of ``module`` or of a
            module inside it. Where W is held by a module outside, return that module and the parameter's name, as in
            ``(module.wrapped[0], "weight")``.
        delta: ``delta(module)`` returns the update: either a tensor shaped like W, or factors ``(B, A, scaling)`` with B
            ``(out, r)``, A ``(r, fan_in)`` and the update ``scaling * B @ A``, or a list of such factors, summed. Prefer
            factors: they cost no temporary of W's size.

    A class can offer the same itself, with methods ``low_rank_base(self)`` and ``low_rank_delta(self)``, and then needs
    no registration. The layers of loralib, torchtune and LyCORIS are known from the start.

    A module with an attribute ``merged`` that is True is taken to have its update inside W. Where a class merges itself in
    a ``train()`` of its own (as loralib's do), W is made clean first.

    Raises:
        TypeError: ``module_type`` is no ``nn.Module`` class, or ``base`` or ``delta`` cannot be called.

    Example::

        register_low_rank(MyLoRA, base=lambda m: m.linear.weight, delta=lambda m: (m.up, m.down, m.scale))
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_low_rank needs an nn.Module class, got {module_type!r}")
    if not (callable(base) and callable(delta)):
        raise TypeError("register_low_rank needs callables: base(module) -> Parameter, delta(module) -> Tensor or (B, A, s)")
    _registered[module_type] = LowRank(base, delta)


_of_libraries: dict[type, LowRank | None] = {}  # class -> how it is read: names are slow to compare, and models are large


def low_rank_of(module: nn.Module) -> LowRank | None:
    """How ``module`` is read, if its class, or one it derives from, was registered, tells itself or is a known library's."""
    module_type: Any = type(module)
    if _registered:
        for cls in module_type.__mro__:
            if cls in _registered:
                return _registered[cls]
    if hasattr(module_type, "low_rank_base") and hasattr(module_type, "low_rank_delta"):
        return LowRank(module_type.low_rank_base, module_type.low_rank_delta)
    if module_type not in _of_libraries:
        names = (f"{cls.__module__}.{cls.__qualname__}" for cls in module_type.__mro__)
        _of_libraries[module_type] = next((LIBRARIES[name] for name in names if name in LIBRARIES), None)
    return _of_libraries[module_type]


MERGING = ("merge", "unmerge", "merge_to", "onfly_merge", "onfly_restore")  # LyCORIS has the last three


class Custom(Singleton):
    name = "custom"

    def matches(self, module: nn.Module) -> bool:
        return low_rank_of(module) is not None

    def weights(self, layer: nn.Module, path: str) -> Iterator[AdaptedWeight]:
        low_rank = cast(LowRank, low_rank_of(layer))
        if not low_rank.adapted(layer):
            return
        try:
            base = low_rank.base(layer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        owner, name, inner = _owner(layer, base, path)
        inside = owner is not layer and any(module is owner for module in layer.modules())
        yield AdaptedWeight(owner, name, joined(path, inner), layer, self, low_rank.layout(layer), by_layer=inside)

    @torch.no_grad()
    def updates(self, weights: Sequence[AdaptedWeight]) -> list[WeightUpdate]:
        updates = []
        for weight in weights:
            try:
                delta = cast(LowRank, low_rank_of(weight.layer)).delta(weight.layer)
                updates.append(_as_update(delta, shaped(weight.owner, weight.name), weight.layout))
            except ValueError as error:
                raise ValueError(f"{weight.path}: {error}") from error
        return updates

    def update_key(self, weights: Sequence[AdaptedWeight], places: list[Any]) -> None:
        return None  # delta() may compute what it returns

    def is_merged(self, layer: nn.Module) -> bool:
        low_rank = low_rank_of(layer)
        return low_rank is not None and low_rank.merged(layer)

    def guarded_methods(self, layer: nn.Module) -> list[tuple[type, str]]:
        names = list(MERGING)
        if type(layer).train is not nn.Module.train:
            names.append("train")
        return [(type(layer), name) for name in names if callable(getattr(type(layer), name, None))]


CUSTOM = Custom()


def _owner(layer: nn.Module, base: Any, path: str) -> tuple[nn.Module, str, str]:
    """``(owner, name, how errors call it)`` of what ``base()`` of ``layer`` returned."""
    if isinstance(base, tuple) and len(base) == 2 and isinstance(base[0], nn.Module) and isinstance(base[1], str):
        owner, name = base
        if isinstance(getattr(owner, name, None), Tensor):
            inside = next((inner for inner, module in layer.named_modules() if module is owner), type(owner).__name__)
            return owner, name, joined(inside, name)
        raise ValueError(f"base() of {path} ({type(layer).__name__}): {type(owner).__name__} has no tensor {name!r}")
    if isinstance(base, Tensor):
        for inner, module in layer.named_modules():
            for name, candidate in module._parameters.items():
                if candidate is base:
                    return module, name, joined(inner, name)
    raise ValueError(
        f"base() of {path} ({type(layer).__name__}) must return an nn.Parameter of that module or of one inside it, or "
        f"(owner module, parameter name), got {type(base).__name__}. A weight that is computed anew in each forward (a "
        "parametrization, spectral or weight norm) cannot be perturbed: fold it into a plain parameter first"
    )


def _as_update(delta: Delta, weight: Tensor, layout: str) -> WeightUpdate:
    if isinstance(delta, WeightUpdate):
        return delta
    if isinstance(delta, Tensor):
        if delta.shape != weight.shape:
            raise ValueError(f"delta has shape {tuple(delta.shape)}, its base weight {tuple(weight.shape)}")
        if layout == "columns":
            delta = delta.t()
        return WeightUpdate(dense=delta.flatten(1) if delta.dim() > 1 else delta.unsqueeze(0))
    shape = (weight.shape[1], weight.shape[0]) if layout == "columns" else (weight.shape[0], weight[0].numel())
    several = isinstance(delta, (list, tuple)) and all(isinstance(term, (list, tuple)) for term in delta)
    factors = []
    for term in cast(Sequence[Factors], delta if several else [delta]):
        try:
            B, A, scaling = term
            A = A.flatten(1)
            fits = B.shape == (shape[0], A.shape[0]) and A.shape[1] == shape[1]
        except (TypeError, ValueError, AttributeError, IndexError):
            parts = term if isinstance(term, (list, tuple)) else [term]
            raise ValueError(
                "delta must be a tensor shaped like the base weight, or factors (B, A, scaling), got "
                f"({', '.join(type(part).__name__ for part in parts)}); of layers (nn.Linear) give the .weight"
            ) from None
        if not fits:
            raise ValueError(
                f"factors B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply to the base weight {tuple(weight.shape)}"
            )
        factors.append((B, A, scaling))
    return WeightUpdate(factors=tuple(factors))
