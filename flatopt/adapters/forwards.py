"""What a layer's forward computes with its weight: whether noise can be put into it there instead of into the weight."""

from typing import Any

from torch import Tensor, nn

from ..core.arguments import NOISES
from ..core.sharding import is_sharded
from ..core.weight import AdaptedWeight
from .quantized import Format, format_of, shape_of

PLAIN = {
    nn.Linear.forward: "linear",
    nn.Conv1d.forward: "conv",
    nn.Conv2d.forward: "conv",
    nn.Conv3d.forward: "conv",
    nn.Embedding.forward: "embedding",
}


def computes(owner: nn.Module, form: "Format | None") -> "str | None":
    """``"linear"``, ``"conv"`` or ``"embedding"``, with W as numbers; ``"linear, inside"``, to which x εᵀ can be added, if
    W stays inside the layer or the layer rounds its inputs; None where it is not known.

    ``form``: the quantised format of W, None for a plain one.
    """
    plain = PLAIN.get(type(owner).forward)
    if form is None:
        if plain == "embedding" and getattr(owner, "max_norm", None) is not None:
            return None  # its forward writes to W
        return "linear" if type(owner).__name__ == "Conv1D" else plain
    if shape_of(owner, form.parameter) is None or (plain is not None and not (plain == "linear" and form.has_linear)):
        return None
    return "linear, inside" if form.dequantize is None or form.quantizes_inputs else "linear"


def unsupported_reason(weight: AdaptedWeight, noise: str = "filter") -> "str | None":
    """Why noise in the layer's forward would not be the same as noise on this weight, and what to do; None if it would."""
    layer: Any = weight.layer
    owner = weight.owner
    form = format_of(owner, weight.name)
    instead = "Load the base model unquantised, or leave the layer out with [{'modules': [...]}]"
    if form is None:
        instead = "Use restore='reversible' there"
    if isinstance(weight.parameter, Tensor) and is_sharded(weight.parameter):
        return f"it is sharded, and noise in the forward needs the whole weight. {instead}"
    if weight.by_layer and weight.adapter.name == "PEFT":  # of a user's own it is not known
        return f"its adapter's layer reads it without calling {type(owner).__name__}.forward. {instead}"
    computed = computes(owner, form)
    if computed is None:
        return f"flatopt does not know what {type(owner).__name__}.forward does with it. {instead}"
    if noise not in NOISES:
        return f"noise={noise!r} moves the weight itself, between forwards. {instead}"
    if noise == "element" and computed == "linear, inside":
        return "noise='element' follows |W|, which this layer keeps to itself. Use noise='filter'"
    magnitudes: Any = getattr(layer, "lora_magnitude_vector", {})
    if any(name in magnitudes and not isinstance(layer.lora_dropout[name], nn.Identity) for name in _active(layer)):
        return f"DoRA with lora_dropout > 0 reads it a second time, without the noise. Set lora_dropout=0. Or: {instead}"
    return None


def refuse_unrounded(weight: AdaptedWeight, form: str) -> None:
    """Raise where the served weight is not W and what the adapter adds, rounded to ``form``."""
    reason = _why_not_rounded(weight)
    if reason is not None:
        raise ValueError(f"noise={form!r} cannot round {weight.path}: {reason}, or use noise='filter'")


def _why_not_rounded(weight: AdaptedWeight) -> "str | None":
    layer: Any = weight.layer
    if any(name in getattr(layer, "lora_magnitude_vector", {}) for name in _active(layer)):
        return "its adapter rescales W + sBA (DoRA), so that the sum is not what is served. Train LoRA without use_dora"
    variants = getattr(layer, "lora_variant", {})
    if any(type(variants.get(name)).__name__.startswith("ALora") for name in _active(layer)):
        return "its adapter works on some of the tokens (aLoRA) and is not merged. Train plain LoRA"
    if weight.adapter.name == "PEFT" and getattr(weight.owner, "groups", 1) > 1 and hasattr(layer, "lora_A"):
        return "PEFT cannot merge LoRA on a grouped convolution. Leave that layer out"
    if isinstance(weight.parameter, Tensor) and is_sharded(weight.parameter):
        return "it is sharded (FSDP2, tensor parallelism), and rounding takes the whole weight. Train under DDP"
    if weight.rebuilt:
        return "PEFT's LoRA on nn.MultiheadAttention applies and merges other weights than it tells. Leave that layer out"
    return None


def _active(layer: Any) -> "list[str]":
    return list(getattr(layer, "active_adapters", ()))
