"""Which frozen weights are perturbed."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from . import peft_layers
from .delta import Delta, custom_delta, no_delta, registered
from .reversible import GRID_BITS
from .sharding import local, local_delta, splits_rows_only

OUTPUTS = {"rows": (0,), "columns": (1,), "experts": (0, 1)}  # layout of a weight -> its dimensions of outputs


class Target:
    """One frozen weight: ``module.name``, looked up anew at each use, since FSDP2 and others replace Parameters.

    ``layout``: where the outputs are, see OUTPUTS.
    """

    def __init__(self, module: nn.Module, name: str, path: str, layer: nn.Module, delta_of: Callable, layout: str = "rows"):
        self.module, self.name, self.path = module, name, path
        self.layer, self._delta_of, self._layout = layer, delta_of, layout
        self.version_moves = hasattr(layer, "parameter_name")  # PEFT's ParamWrapper: parametrize calls set_ in each forward
        self.remade = False  # a new parameter after each forward: only a copy can restore it

    def __repr__(self) -> str:
        return f"Target({self.path})"

    @property
    def parameter(self) -> Tensor:
        # nn.Module's own lookup costs as much as all else here together, several times a weight and step
        parameter = self.module._parameters.get(self.name)
        return getattr(self.module, self.name) if parameter is None else parameter

    @property
    def weight(self) -> Tensor:
        """The weight without autograd, but with its version counter: what a graph saved is known to have changed."""
        return local(self.parameter.detach())

    def rows(self) -> Tensor:
        """The weight as a 2-D view, rows = outputs, columns = fan-in."""
        return self.rows_of(self.weight)

    def rows_of(self, weight: Tensor) -> Tensor:
        """The same view of a tensor like the weight, strides and all."""
        if weight.dim() < 2:
            return weight.reshape(1, -1)
        if self._layout == "columns":
            return weight.t()
        if self._layout == "experts":
            return weight.flatten(0, 1)
        if weight.dim() > 2:
            weight = weight.permute(_memory_order(weight))
        return weight.view(weight.shape[0], -1)

    def delta(self) -> Delta:
        """What the low-rank module adds to the weight."""
        with torch.no_grad():
            whole = self.parameter.detach()
            weight = local(whole)
            try:
                delta = local_delta(self._delta_of(self.layer, whole), whole)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from error
            if self._layout == "experts":
                return delta if delta.dense is None else delta._replace(dense=delta.dense.reshape(self.rows().shape))
            if delta.dense is not None and weight.dim() > 2:
                dense = delta.dense.reshape(weight.shape).permute(_memory_order(weight))
                delta = delta._replace(dense=dense.flatten(1))
            elif weight.dim() > 2 and not weight.is_contiguous():
                order = _memory_order(weight)
                factors = tuple((B, A.view(-1, *weight.shape[1:]).permute(order).flatten(1), s) for B, A, s in delta.factors)
                delta = delta._replace(factors=factors)
            return delta

    def delta_state(self) -> "tuple | None":
        """All that :meth:`delta` follows from, to be compared with ``==``; None where that cannot be told."""
        if self._delta_of is no_delta:
            return ()
        return peft_layers.lora_state(self.layer) if self._delta_of is peft_layers.peft_delta else None

    def check(self) -> None:
        """Raise unless this weight can be perturbed now."""
        parameter, path = self.parameter, self.path
        weight = local(parameter) if isinstance(parameter, Tensor) else parameter
        if not isinstance(weight, Tensor):
            raise ValueError(f"{path} is {type(weight).__name__}, not a tensor: it cannot be perturbed")
        # a subclass of Tensor keeps other bits than it shows: bitsandbytes' Params4bit, torchao's
        if hasattr(parameter, "quant_state") or type(weight) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"{path} is quantised ({type(weight).__name__}): noise would be rounded away or break its format. Load "
                "the base model in bf16, fp16 or fp32, or leave the layer out with [{'modules': [...]}]"
            )
        if weight.dtype not in GRID_BITS:
            raise ValueError(
                f"{path} is {str(weight.dtype).removeprefix('torch.')}, a quantised or integer weight; flatopt perturbs "
                "fp32, bf16, fp16 and fp64. Load the base model unquantised, or leave the layer out with "
                "[{'modules': [...]}]"
            )
        if weight.device.type == "meta":
            raise ValueError(
                f"{path} is on the meta device: it was not loaded yet, or is offloaded. Load the model's weights (and turn "
                "CPU/disk offload off) before the training step"
            )
        if weight.numel() == 0:
            raise ValueError(
                f"{path} has size 0 on this rank: DeepSpeed ZeRO-3 (or an uneven shard) holds it elsewhere. Use ZeRO-2 or "
                "FSDP2, where each rank keeps rows of the weight"
            )
        if not splits_rows_only(parameter, OUTPUTS[self._layout]):
            raise ValueError(
                f"{path} is sharded along its inputs (tensor parallelism, or FSDP2 on transformers' Conv1D): its row norms "
                "are spread over the ranks. Shard it by its outputs, or leave it out with [{'modules': [...]}]"
            )
        if parameter.requires_grad:
            raise ValueError(
                f"{path} is trainable: flatopt perturbs frozen base weights. Freeze it with requires_grad_(False), or "
                "leave it out with [{'modules': [...]}]"
            )
        if getattr(self.layer, "merged", False) is True:
            raise ValueError(
                f"{path} has its adapter merged into it. Call unmerge_adapter() on the model (or layer.unmerge()) before "
                "training"
            )
        hook = self.module.__dict__.get("_hf_hook")
        if getattr(hook, "offload", False):
            raise ValueError(f"{path} is offloaded by accelerate; load the model onto one device to train it")


def _memory_order(weight: Tensor) -> "tuple[int, ...]":
    """Dimensions as they lie in memory, rows first: flattened in this order, a channels_last kernel is still a view."""
    return 0, *sorted(range(1, weight.dim()), key=lambda d: -weight.stride(d))


def _owner(root: nn.Module, parameter: Tensor) -> "tuple[nn.Module, str, str] | None":
    for path, module in root.named_modules():
        for name, candidate in module._parameters.items():
            if candidate is parameter:
                return module, name, f"{path}.{name}" if path else name
    return None


def _in_layer(layer: nn.Module, path: str) -> Iterator[Target]:
    def join(*parts):
        return ".".join(part for part in parts if part)

    if peft_layers.is_tuner_layer(layer):
        for base, name, layout in peft_layers.base_weights(layer, path or type(layer).__name__):
            yield Target(base, name, join(path or type(layer).__name__, name), layer, peft_layers.peft_delta, layout)
    elif registered(layer) is not None:
        base = registered(layer).base(layer)
        owner = _owner(layer, base) if isinstance(base, Tensor) else None
        if owner is None:
            raise ValueError(
                f"base() of {path or type(layer).__name__} ({type(layer).__name__}) must return an nn.Parameter of that "
                f"module or of one inside it, got {type(base).__name__}"
            )
        module, name, inner = owner
        yield Target(module, name, join(path or type(layer).__name__, inner), layer, custom_delta)


def find(modules: Iterable[nn.Module]) -> "list[Target]":
    """The base weight under every low-rank module in ``modules``."""
    targets, remade = [], set()
    for module in modules:
        for path, layer in module.named_modules():
            remade.update(peft_layers.remade(layer))
            for target in _in_layer(layer, path):
                target.remade = layer in remade
                targets.append(target)
    return targets


class _Raw(nn.Module):
    """Gives raw parameters the (module, name) that targets are held by."""

    def __init__(self, parameters: "list[Tensor]"):
        super().__init__()
        self._parameters.update({f"params[{i}]": p for i, p in enumerate(parameters)})


def raw(parameters: "list[Tensor]") -> "list[Target]":
    holder = _Raw(parameters)
    return [Target(holder, name, name, holder, no_delta) for name in holder._parameters]
