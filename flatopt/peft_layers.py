"""PEFT's tuner layers: which frozen weights lie under them and what their active adapters add. PEFT stays optional."""

import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .delta import Delta

# Their get_delta_weight is a rotation or wants the weight as an argument: not an update that is added to W.
NOT_ADDITIVE = {"oft", "boft", "hra", "miss", "bone"}


def is_tuner_layer(module: nn.Module) -> bool:
    layers = sys.modules.get("peft.tuners.tuners_utils")  # a PEFT module exists only once PEFT was imported
    return layers is not None and isinstance(module, layers.BaseTunerLayer)


def family(module: nn.Module) -> str:
    """``"lora"``, ``"adalora"``, ``"loha"``, ... from where PEFT defines the layer."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("peft.tuners."):
            return cls.__module__.split(".")[2]
    return ""


def base_weights(layer: nn.Module, path: str) -> "Iterator[tuple[nn.Module, str, int]]":
    """``(module, parameter name, dimension of the output rows)`` of each base weight the layer adapts."""
    if not hasattr(layer, "get_delta_weight") or not layer.adapter_layer_names:
        return  # IA3, prompt and norm tuning: nothing is added to a weight
    kind = family(layer)
    if kind in NOT_ADDITIVE:
        raise ValueError(
            f"{path} is a PEFT {kind} layer, whose update is not added to its base weight, so flatopt cannot tell the "
            "merged weight. Leave it out: pass the other layers as [{'modules': [...]}]"
        )
    base = layer.get_base_layer()
    name = getattr(layer, "parameter_name", "weight")  # lora.ParamWrapper names its own
    if isinstance(base, nn.MultiheadAttention):
        name = "in_proj_weight"
    if not isinstance(getattr(base, name, None), Tensor):
        raise ValueError(f"{path} has no base weight {name!r} that flatopt can perturb; pass the other layers as groups")
    if getattr(base, "is_transposed", False) and getattr(base, name).dim() > 2:
        raise ValueError(f"{path}.{name} holds experts as (expert, in, out), which flatopt does not support yet")
    yield base, name, 1 if getattr(layer, "fan_in_fan_out", False) else 0


def remade(layer: nn.Module) -> "list[nn.Module]":
    """The layers whose base weight PEFT remakes at each forward, as W + sBA - sBA: lora.MultiheadAttention's."""
    if is_tuner_layer(layer) and isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return [layer, layer.get_base_layer().out_proj]
    return []


def peft_delta(layer: nn.Module, weight: Tensor) -> Delta:
    """The update of all active adapters, in factors wherever the layer has them."""
    if getattr(layer, "disable_adapters", False):
        return Delta()
    adapters = [name for name in layer.active_adapters if _has(layer, name)]
    kind = family(layer)
    # lora.ParamWrapper and friends have lora_A too, but for stacked experts: they tell their delta themselves
    if kind == "adalora":
        return Delta(factors=tuple(_adalora(layer, name) for name in adapters))
    if kind == "lora" and not hasattr(layer, "parameter_name"):
        factors = [_lora(layer, name, weight) for name in adapters]
        if None not in factors:
            return _with_dora(layer, adapters, factors, weight)
    dense = [layer.get_delta_weight(name) for name in adapters]
    if not dense:
        return Delta()
    total = sum(dense[1:], dense[0]).reshape(weight.shape)
    if getattr(layer, "fan_in_fan_out", False):
        total = total.t()
    return Delta(dense=total.reshape(-1, total.shape[-1]) if hasattr(layer, "parameter_name") else total.flatten(1))


def _has(layer: nn.Module, adapter: str) -> bool:
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def _adalora(layer: nn.Module, name: str):
    scaling = layer.scaling[name] / (layer.ranknum[name] + 1e-5)
    return layer.lora_B[name], layer.lora_A[name] * layer.lora_E[name], scaling


def _lora(layer: nn.Module, name: str, weight: Tensor):
    """``(B, A, scaling)`` in rows x fan-in, or None where the factors alone do not make the delta."""
    scaling = layer.scaling[name]
    if name in layer.lora_embedding_A:  # delta = (B A)^T: a row is one token's vector
        return layer.lora_embedding_A[name].t(), layer.lora_embedding_B[name].t(), scaling
    A, B = layer.lora_A[name].weight.flatten(1), layer.lora_B[name].weight.flatten(1)
    rows, fan_in = weight.shape[0], weight[0].numel()
    if getattr(layer, "fan_in_fan_out", False):
        rows, fan_in = fan_in, rows
    fits = B.shape[0] == rows and A.shape[1] == fan_in and B.shape[1] == A.shape[0]
    variant = getattr(layer, "lora_variant", {}).get(name)
    if not fits or not (variant is None or type(variant).__name__.startswith(("Dora", "ALora"))):
        return None  # grouped convolutions, QALoRA, KaSA, ...: PEFT multiplies them out
    return B, A, scaling


def _with_dora(layer: nn.Module, adapters: "list[str]", factors: list, weight: Tensor) -> Delta:
    """DoRA applies m_i (W + sBA)_i / |(W + sBA)_i| to row i, so its row norm is the magnitude m_i."""
    magnitude = getattr(layer, "lora_magnitude_vector", {})
    dora = [name in magnitude for name in adapters]
    if not any(dora):
        return Delta(factors=tuple(factors))
    if getattr(layer, "lora_embedding_A", None) and adapters[0] in layer.lora_embedding_A:
        return _dora_embedding(layer, adapters, weight)
    if len(adapters) == 1:
        return Delta(factors=tuple(factors), row_norm=magnitude[adapters[0]].weight.flatten())
    from .scale import row_square_sums  # each adapter adds (c - 1) W + c sBA, with c = m / |W + sBA|

    rows = weight.flatten(1) if not getattr(layer, "fan_in_fan_out", False) else weight.t()
    alpha = torch.ones(rows.shape[0], device=weight.device)
    terms = []
    for name, is_dora, (B, A, s) in zip(adapters, dora, factors):
        if is_dora:
            norm = row_square_sums(rows, Delta(factors=((B, A, s),))).sqrt()
            c = magnitude[name].weight.flatten().float() / norm
            alpha, B = alpha + c - 1, c.unsqueeze(1) * B
        terms.append((B, A, s))
    return Delta(factors=tuple(terms), alpha=alpha)


def _dora_embedding(layer: nn.Module, adapters: "list[str]", weight: Tensor) -> Delta:
    """PEFT scales an embedding by column, so the rows' norms follow from the weight multiplied out."""
    applied = weight.float()
    for name in adapters:
        merged = weight + layer.get_delta_weight(name)
        if name in layer.lora_magnitude_vector:
            m = layer.lora_magnitude_vector[name].weight
            applied = applied + m / torch.linalg.norm(merged, dim=0) * merged - weight
        else:
            applied = applied + layer.get_delta_weight(name)
    return Delta(dense=applied - weight)


def restore_before_merging(layer: nn.Module, restore) -> None:
    """Have PEFT's merge and unload, which read W directly, put clean weights back first."""
    tuners = sys.modules["peft.tuners.tuners_utils"]
    for cls, name in ((type(layer), "merge"), (tuners.BaseTuner, "unload"), (tuners.BaseTuner, "merge_and_unload")):
        method = getattr(cls, name, None)
        if method is None or hasattr(method, "_restores_first"):
            continue

        @functools.wraps(method)
        def clean(self, *args, _method=method, **kwargs):
            restore(self)
            return _method(self, *args, **kwargs)

        clean._restores_first = True
        setattr(cls, name, clean)
