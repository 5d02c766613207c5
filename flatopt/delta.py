"""What a low-rank module adds to its frozen base weight, and how to tell flatopt about a module of your own."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

Factors = tuple[Tensor, Tensor, float | Tensor]  # (B, A, scaling)


class Delta(NamedTuple):
    """The update of one weight, with rows = outputs and columns = fan-in.

    ``factors``: low-rank terms ``(B, A, scaling)``, B ``(rows, r)`` and A ``(r, fan_in)``, summed.
    ``dense``: an update already multiplied out, ``(rows, fan_in)``.
    ``row_norm``: the row norms of the weight the layer applies, where the adapter itself fixes them (DoRA).
    ``alpha``: factor on W itself, per row (several DoRA adapters at once).
    """

    factors: tuple[Factors, ...] = ()
    dense: Tensor | None = None
    row_norm: Tensor | None = None
    alpha: Tensor | None = None


class Registered(NamedTuple):
    base: Callable[[nn.Module], nn.Parameter]
    delta: Callable[[nn.Module], Tensor | Factors]


_REGISTRY: "dict[type, Registered]" = {}


def register_low_rank(
    module_type: "type[nn.Module]",
    *,
    base: Callable[[nn.Module], nn.Parameter],
    delta: Callable[[nn.Module], Tensor | Factors],
) -> None:
    r"""Tell flatopt where a low-rank module of your own keeps its frozen weight and its update.

    Args:
        module_type: the class; its subclasses are included.
        base: ``base(module)`` returns the frozen ``nn.Parameter`` W, of shape ``(out, in, ...)``.
        delta: ``delta(module)`` returns the update: either a tensor shaped like W, or factors ``(B, A, scaling)`` with B
            ``(out, r)``, A ``(r, fan_in)`` and the update ``scaling * B @ A``. Prefer factors: they cost no temporary of
            W's size.

    A class can offer the same itself, with methods ``low_rank_base(self)`` and ``low_rank_delta(self)``, and then needs
    no registration.

    Raises:
        TypeError: ``module_type`` is no ``nn.Module`` class, or ``base`` or ``delta`` cannot be called.

    Example::

        register_low_rank(MyLoRA, base=lambda m: m.linear.weight, delta=lambda m: (m.up, m.down, m.scale))
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_low_rank needs an nn.Module class, got {module_type!r}")
    if not (callable(base) and callable(delta)):
        raise TypeError("register_low_rank needs callables: base(module) -> Parameter, delta(module) -> Tensor or (B, A, s)")
    _REGISTRY[module_type] = Registered(base, delta)


def registered(module: nn.Module) -> Registered | None:
    for cls in type(module).__mro__:
        if cls in _REGISTRY:
            return _REGISTRY[cls]
    if hasattr(module, "low_rank_base") and hasattr(module, "low_rank_delta"):
        return Registered(type(module).low_rank_base, type(module).low_rank_delta)
    return None


def custom_delta(module: nn.Module, weight: Tensor) -> Delta:
    update = registered(module).delta(module)
    if isinstance(update, Tensor):
        if update.shape != weight.shape:
            raise ValueError(f"delta has shape {tuple(update.shape)}, its base weight {tuple(weight.shape)}")
        return Delta(dense=update.flatten(1) if update.dim() > 1 else update.unsqueeze(0))
    try:
        B, A, scaling = update
        A = A.flatten(1)
        fits = B.shape == (weight.shape[0], A.shape[0]) and A.shape[1] == weight[0].numel()
    except (TypeError, ValueError, AttributeError, IndexError):
        raise ValueError("delta must be a tensor shaped like the base weight, or factors (B, A, scaling)") from None
    if not fits:
        raise ValueError(
            f"factors B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply to the base weight {tuple(weight.shape)}"
        )
    return Delta(factors=((B, A, scaling),))


def no_delta(module: nn.Module, weight: Tensor) -> Delta:
    """A raw frozen parameter: the merged weight is the weight."""
    return Delta()
