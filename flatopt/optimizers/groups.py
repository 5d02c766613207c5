"""How a target spec is read: a module, or dicts in the manner of torch's param groups."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..adapters.registry import find_weights, raw_weights
from ..core.weight import AdaptedWeight


def read_groups(targets: Any, defaults: "dict[str, Any]") -> "tuple[list[dict[str, Any]], list[nn.Module]]":
    """The groups, each with its list of ``targets`` and the ``defaults`` filled in; and the modules whose forward
    runs them.

    A weight belongs to the first group that names it.

    Raises:
        TypeError, ValueError: for a spec that does not fit, and for a group in which no target was found.
    """
    if isinstance(targets, nn.Module):
        targets = [{"modules": targets}]
    if not (isinstance(targets, (list, tuple)) and targets and all(isinstance(group, dict) for group in targets)):
        raise TypeError(
            "targets must be a module, or a non-empty list of dicts such as {'modules': model.blocks, 'sigma': 0.1}; got "
            f"{type(targets).__name__}"
        )
    groups: list[dict[str, Any]] = []
    roots: list[nn.Module] = []
    taken: set[int] = set()
    found: list[AdaptedWeight]
    modules: list[nn.Module] = []
    for given in targets:
        unknown = set(given) - {"modules", "params", *defaults}
        if unknown or ("modules" in given) == ("params" in given):
            optional = f", and optionally {', '.join(map(repr, defaults))}" if defaults else ""
            raise ValueError(f"a target group has either 'modules' or 'params'{optional}; got {sorted(given)}")
        if "modules" in given:
            modules = _as_list(given["modules"], nn.Module, "modules", "an nn.Module or an iterable of them")
            found = find_weights(modules)
            roots += [root for module in modules for root in _called(module)]
        else:
            found = raw_weights(
                _as_list(given["params"], torch.Tensor, "params", "a frozen parameter or an iterable of them")
            )
        found = [w for w in found if not (id(w.parameter) in taken or taken.add(id(w.parameter)))]  # type: ignore[func-returns-value]
        if not found:
            names = ", ".join(sorted({type(m).__name__ for m in modules})) if "modules" in given else "params"
            raise ValueError(
                f"no low-rank module with a frozen base weight was found in {names} (or an earlier group has them all). Add "
                "adapters first (peft.get_peft_model), make your own module known with flatopt.register_low_rank(), or "
                "pass frozen parameters as [{'params': [...]}]"
            )
        groups.append({"targets": found, **defaults, **{k: v for k, v in given.items() if k in defaults}})
    return groups, list(dict.fromkeys(roots))


def _called(module: nn.Module) -> "list[nn.Module]":
    """The modules that are called when ``module`` is trained: the parts with targets, where nobody calls the whole.

    ModuleList and ModuleDict have no forward; of a LightningModule it is ``training_step`` that is called.
    """
    lightning = any(cls.__name__ == "LightningModule" for cls in type(module).__mro__)
    if lightning or (type(module).forward is nn.Module.forward and "forward" not in module.__dict__):
        parts = [child for child in module.children() if find_weights([child])]
        return [root for part in parts for root in _called(part)] or [module]
    return [module]


def _as_list(value: Any, kind: type, key: str, wanted: str) -> "list[Any]":
    items = [value] if isinstance(value, kind) else list(value) if isinstance(value, Iterable) else [None]
    if not items or not all(isinstance(item, kind) for item in items):
        raise TypeError(f"{key!r} of a target group must be {wanted}, got {value!r:.100}")
    return items
