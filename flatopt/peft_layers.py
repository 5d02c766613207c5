"""PEFT's tuner layers: which frozen weights lie under them and what their active adapters add. PEFT stays optional."""

import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .delta import Delta

# A rotation of W (OFT, BOFT, HRA), an update that PEFT cannot tell (MiSS, Bone, Lily), or a layer that never reads W (FRoD).
NOT_ADDITIVE = {"oft", "boft", "hra", "miss", "bone", "lily", "frod"}


def is_tuner_layer(module: nn.Module) -> bool:
    layers = sys.modules.get("peft.tuners.tuners_utils")  # a PEFT module exists only once PEFT was imported
    return layers is not None and isinstance(module, layers.BaseTunerLayer)


def family(module: nn.Module) -> str:
    """``"lora"``, ``"adalora"``, ``"loha"``, ... from where PEFT defines the layer."""
    return _family(type(module))


@functools.cache
def _family(module_type: type) -> str:
    for cls in module_type.__mro__:
        if cls.__module__.startswith("peft.tuners."):
            return cls.__module__.split(".")[2]
    return ""


def base_weights(layer: nn.Module, path: str) -> "Iterator[tuple[nn.Module, str, str]]":
    """``(module, parameter name, layout)`` of each base weight the layer adapts; for ``layout`` see ``targets.Target``."""
    if not hasattr(layer, "get_delta_weight") or not layer.adapter_layer_names:
        return  # IA3, prompt and norm tuning: nothing is added to a weight
    kind = family(layer)
    if kind in NOT_ADDITIVE:
        raise ValueError(
            f"{path} is a PEFT {kind} layer, which does not apply its base weight plus an update that it can tell, so "
            "flatopt does not know the merged weight. Leave it out: pass the other layers as [{'modules': [...]}]"
        )
    base = layer.get_base_layer()
    name = getattr(layer, "parameter_name", "weight")  # lora.ParamWrapper names its own
    if isinstance(base, nn.MultiheadAttention):
        name = "in_proj_weight"
    if not isinstance(getattr(base, name, None), Tensor):
        raise ValueError(
            f"{path} has no base weight {name!r} that can be perturbed (GPTQ, AWQ and HQQ layers keep it packed). Load the "
            "base model unquantised, or leave the layer out: pass the other layers as [{'modules': [...]}]"
        )
    experts = hasattr(layer, "parameter_name") and getattr(base, name).dim() == 3
    if experts and getattr(base, "is_transposed", False):
        raise ValueError(
            f"{path}.{name} holds experts as (expert, in, out), which flatopt does not support yet. Leave it out: pass the "
            "other layers as [{'modules': [...]}]"
        )
    if getattr(base, "groups", 1) > 1 and getattr(layer, "lora_magnitude_vector", None):
        raise ValueError(
            f"{path} is a grouped convolution with DoRA, for which PEFT takes the norm of another matrix than it applies. "
            "Use LoRA there, or leave it out: pass the other layers as [{'modules': [...]}]"
        )
    yield base, name, "experts" if experts else "columns" if transposed(layer) else "rows"


def transposed(layer: nn.Module) -> bool:
    """Whether the weight is (in, out), as transformers' Conv1D. Embeddings get the flag too, where a model has both."""
    return getattr(layer, "fan_in_fan_out", False) and not isinstance(layer.get_base_layer(), nn.Embedding)


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
    if kind == "lora" and "parameter_name" not in layer.__dict__:
        factors = [_lora(layer, name, weight) for name in adapters]
        if None not in factors:
            return _with_dora(layer, adapters, factors, weight)
    dense = [_dense(layer, name, weight) for name in adapters]
    if not dense:
        return Delta()
    total = sum(dense[1:], dense[0]).reshape(weight.shape)
    if transposed(layer):
        total = total.t()
    return Delta(dense=total.flatten(1))


def lora_state(layer: nn.Module) -> "tuple | None":
    """All that a LoRA or DoRA layer's delta follows from, if that is but parameters, to be compared with ``==``; else None.

    Parameters by identity and memory: who compares must keep them alive, so that no others take their place.
    """
    if family(layer) != "lora" or "parameter_name" in layer.__dict__:
        return None
    state = [layer.disable_adapters]
    holders = [
        layer._modules[name]._modules for name in ("lora_A", "lora_B", "lora_magnitude_vector") if name in layer._modules
    ]
    for name in layer.active_adapters:
        state.append(name)
        if name in holders[0]:
            state.append(layer.scaling[name])
            for holder in holders:
                if name in holder:
                    parameter = holder[name]._parameters.get("weight")
                    if type(parameter) is not nn.Parameter:
                        return None
                    state += (id(parameter), parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride())
        elif _has(layer, name):
            return None
    return tuple(state)


def _has(layer: nn.Module, adapter: str) -> bool:
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def _dense(layer: nn.Module, name: str, weight: Tensor) -> Tensor:
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None:  # their get_delta_weight is plain LoRA's
        return variant.merge_safe(layer, name, weight.clone()) - weight
    delta = layer.get_delta_weight(name)
    delta = delta.to_dense() if delta.is_sparse else delta
    return weight * delta if family(layer) == "hira" else delta  # HiRA: W + W * BA, element by element


def _adalora(layer: nn.Module, name: str):
    scaling = layer.scaling[name] / (layer.ranknum[name] + 1e-5)
    return layer.lora_B[name], layer.lora_A[name] * layer.lora_E[name], scaling


def _lora(layer: nn.Module, name: str, weight: Tensor):
    """``(B, A, scaling)`` in rows x fan-in, or None where the factors alone do not make the delta."""
    scaling = layer.scaling[name]
    if name in layer.lora_embedding_A:  # delta = (B A)^T: a row is one token's vector
        return layer.lora_embedding_A[name].t(), layer.lora_embedding_B[name].t(), scaling
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    groups = layer.get_base_layer().__dict__.get("groups", 1)  # a miss in nn.Module's own lookup raises: slow, each step
    if groups > 1:  # PEFT's A reads every input, W its own group's: what lies outside W is another layer's
        A = torch.cat([ranks.chunk(groups, dim=1)[group] for group, ranks in enumerate(A.chunk(groups))])
        B = torch.block_diag(*B.flatten(1).chunk(groups))
    A, B = A.flatten(1), B.flatten(1)
    rows, fan_in = weight.shape[0], weight.numel() // weight.shape[0]
    if transposed(layer):
        rows, fan_in = fan_in, rows
    fits = B.shape[0] == rows and A.shape[1] == fan_in and B.shape[1] == A.shape[0]
    variant = getattr(layer, "lora_variant", {}).get(name)
    if not fits or not (variant is None or type(variant).__name__.startswith(("Dora", "ALora"))):
        return None  # QALoRA, KaSA, ...: PEFT multiplies them out
    return B, A, scaling


def _with_dora(layer: nn.Module, adapters: "list[str]", factors: list, weight: Tensor) -> Delta:
    """DoRA applies m_i (W + sBA)_i / |(W + sBA)_i| to row i, so its row norm is the magnitude m_i."""
    magnitude = getattr(layer, "lora_magnitude_vector", {})
    dora = [name in magnitude for name in adapters]
    if not any(dora):
        return Delta(factors=tuple(factors))
    if adapters[0] in layer.lora_embedding_A:
        return _dora_embedding(layer, adapters, weight)
    if len(adapters) == 1:
        return Delta(factors=tuple(factors), row_norm=magnitude[adapters[0]].weight.flatten())
    from .scale import row_square_sums

    rows = weight.flatten(1) if not transposed(layer) else weight.t()
    alpha = torch.ones(rows.shape[0], device=weight.device)
    terms = []
    for name, is_dora, (B, A, s) in zip(adapters, dora, factors):
        if is_dora:
            norm = row_square_sums(rows, Delta(factors=((B, A, s),))).sqrt()
            c = magnitude[name].weight.flatten().float() / norm
            if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
                alpha = alpha + c - 1  # PEFT adds (c - 1) W + c sBA
            else:  # PEFT multiplies what the adapters before made of W
                alpha, terms = c * alpha, [(c.unsqueeze(1) * B, A, s) for B, A, s in terms]
            B = c.unsqueeze(1) * B
        terms.append((B, A, s))
    return Delta(factors=tuple(terms), alpha=alpha)


def _dora_embedding(layer: nn.Module, adapters: "list[str]", weight: Tensor) -> Delta:
    """PEFT scales an embedding by column, so the rows' norms follow from the weight multiplied out."""
    applied = weight.float()
    for name in adapters:
        delta = layer.get_delta_weight(name)
        applied = applied + delta
        if name in layer.lora_magnitude_vector:
            applied = applied * layer.lora_magnitude_vector[name].weight / torch.linalg.norm(weight + delta, dim=0)
    return Delta(dense=applied - weight)


def restore_before_merging(layer: nn.Module, restore) -> None:
    """Have PEFT's merge and unload, which read W directly, put clean weights back first."""
    tuner = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    tuners = {tuner, *tuner.__subclasses__()}  # older PEFT defines these methods in each of them
    for cls, name in [(type(layer), "merge"), *((cls, name) for cls in tuners for name in ("unload", "merge_and_unload"))]:
        method = getattr(cls, name, None) if cls is type(layer) else cls.__dict__.get(name)
        if method is None or hasattr(method, "_restores_first"):
            continue

        @functools.wraps(method)
        def clean(self, *args, _method=method, **kwargs):
            restore(self)
            result = _method(self, *args, **kwargs)
            if is_tuner_layer(self):  # it wrote through .data, which moves no version counter
                for parameter in self.get_base_layer().parameters(recurse=False):
                    torch.autograd.graph.increment_version(parameter)
            return result

        clean._restores_first = True
        setattr(cls, name, clean)
