"""PEFT's tuner layers: which frozen weights lie under them and what their active adapters add. PEFT stays optional."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.sharding import is_sharded, local
from ..core.weight import AdaptedWeight, Factors, WeightUpdate
from .base import Singleton, joined
from .quantized import format_of, packed_name, shaped

# Families (folders of peft.tuners) that apply W plus an update they can tell, so that a move of W moves what the layer
# applies one to one. Each is held to that by tests/adapters/test_conformance.py; what is not in here is refused by name.
ADDITIVE = {
    *("lora", "adalora", "adamss", "c3a", "delora", "fourierft", "gralora", "loha", "lokr", "osf", "psoft", "pvera"),
    *("randlora", "shira", "supertuning", "tinylora", "unilora", "vblora", "vera", "waveft"),
}
BY_LAYER = {"shira", "supertuning"}  # their forward takes the base layer's weight and does not call it
# They add to no weight matrix: a plain layer under them is left alone, as any layer without an adapter.
NO_UPDATE = {"beft", "ia3", "ln_tuning", "road", "trainable_tokens"}
REASONS = {
    "hira": "applies W * (1 + BA), so that noise on W would reach the forward multiplied by 1 + BA",
    **dict.fromkeys(("oft", "boft", "hra"), "applies a rotation of its base weight"),
    **dict.fromkeys(
        ("deft", "peanut", "glora"), "applies an update made from the base weight, so that noise on W changes it"
    ),
    **dict.fromkeys(("miss", "bone", "lily", "poly", "xlora"), "cannot tell the update that it applies to its base weight"),
    "frod": "never reads its base weight in the forward",
}
# Ways of PEFT to apply LoRA (layer.lora_variant): in factors, or told by their own merge.
FACTORED_VARIANTS = ("Dora", "ALora")
MERGED_VARIANTS = ("BdLora", "Kasa", "MiCA", "QALora", "Velora")
# Those that tell the update as (out, in) also where the weight is (in, out).
UNTRANSPOSED = {"fourierft", "waveft"}

# The methods of PEFT's tuners that read or write W. add_adapter and load_adapter come to inject_adapter: PiSSA, OLoRA, DoRA
# and others read W to start from, and some write to it.
TUNER_METHODS = (
    *("inject_adapter", "delete_adapter", "add_weighted_adapter", "merge_adapter", "unmerge_adapter"),
    *("_unload_and_optionally_merge", "merge_and_unload", "unload"),
)

WAY_OUT = "Leave it out: pass the other layers as [{'modules': [...]}]"


def _tuners_utils() -> Any:
    return sys.modules.get("peft.tuners.tuners_utils")  # a PEFT module exists only once PEFT was imported


_tuner_layers: dict[type, bool] = {}  # of classes seen since PEFT was imported: asked of every module of a model


def is_tuner_layer(module: nn.Module) -> bool:
    known = _tuner_layers.get(type(module))
    if known is not None:
        return known
    tuners = _tuners_utils()
    if tuners is None:
        return False
    known = _tuner_layers[type(module)] = issubclass(type(module), tuners.BaseTunerLayer)
    return known


_families: dict[type, str] = {}


def _family(module_type: type) -> str:
    known = _families.get(module_type)
    if known is None:
        paths = [cls.__module__.split(".") for cls in module_type.__mro__ if cls.__module__.startswith("peft.tuners.")]
        known = _families[module_type] = paths[0][2] if paths else ""
    return known


def family(module: nn.Module) -> str:
    """``"lora"``, ``"adalora"``, ``"loha"``, ... from where PEFT defines the layer."""
    forward = module.__dict__.get("forward")  # X-LoRA puts one of its own into LoRA's layers
    return "xlora" if _family(type(getattr(forward, "__self__", None))) == "xlora" else _family(type(module))


class Peft(Singleton):
    name = "PEFT"

    def matches(self, module: nn.Module) -> bool:
        return is_tuner_layer(module)

    def weights(self, layer: Any, path: str) -> Iterator[AdaptedWeight]:
        chain = chain_of(layer)
        if family(layer) in NO_UPDATE and len(chain) == 1:
            return
        for link in chain:
            _check_family(link, path)
        if len(chain) > 1 and any(getattr(link, "lora_magnitude_vector", None) for link in chain):
            raise ValueError(f"{path} has a DoRA adapter and one of another method on one weight. {WAY_OUT}")
        base = layer.get_base_layer()
        name = getattr(layer, "parameter_name", None) or packed_name(base) or "weight"  # lora.ParamWrapper names its own
        attention = isinstance(base, nn.MultiheadAttention)
        if attention:
            name = "in_proj_weight"
        if not isinstance(getattr(base, name, None), Tensor):
            raise ValueError(
                f"{path} has no base weight {name!r}: its {type(base).__name__} is packed in a way that flatopt does not "
                f"know. Load the base model unquantised. {WAY_OUT}"
            )
        wrapper = hasattr(layer, "parameter_name")
        experts = wrapper and getattr(base, name).dim() == 3
        if experts and getattr(base, "is_transposed", False):
            raise ValueError(
                f"{path}.{name} holds experts as (expert, in, out), which flatopt does not support yet. {WAY_OUT}"
            )
        if getattr(base, "groups", 1) > 1 and getattr(layer, "lora_magnitude_vector", None):
            raise ValueError(
                f"{path} is a grouped convolution with DoRA, for which PEFT takes the norm of another matrix than it "
                "applies. Use LoRA there, or leave it out: pass the other layers as [{'modules': [...]}]"
            )
        _lora_linear[type(layer)] = family(layer) == "lora" and type(layer).__name__.startswith("Linear")
        layout = "experts" if experts else "columns" if transposed(layer) else "rows"
        # nn.MultiheadAttention gets its weights made anew in each forward, as W + sBA - sBA; ParamWrapper's forward has
        # torch.nn.utils.parametrize set the weight
        by_layer = attention or wrapper or family(layer) in BY_LAYER
        yield AdaptedWeight(base, name, joined(path, name), layer, self, layout, attention, wrapper, by_layer)
        if attention and is_tuner_layer(base.out_proj):
            for weight in self.weights(base.out_proj, joined(path, "base_layer.out_proj")):
                yield replace(weight, rebuilt=True, by_layer=True)

    @torch.no_grad()
    def updates(self, weights: Sequence[AdaptedWeight]) -> list[WeightUpdate]:
        updates = []
        for weight in weights:
            plain = _one_lora(weight) if _lora_linear.get(type(weight.layer), False) else None
            if plain is not None:
                A, B, scaling, magnitude = plain
                row_norm = None if magnitude is None else magnitude.flatten()
                updates.append(WeightUpdate(factors=((B, A, scaling),), row_norm=row_norm))
                continue
            try:
                updates.append(_update(weight.layer, _numbers(weight)))
            except ValueError as error:
                raise ValueError(f"{weight.path}: {error}") from error
        return updates

    def update_key(self, weights: Sequence[AdaptedWeight], places: list[Any]) -> list[Any]:
        keys = _keys_there(places)
        for number in (i for i, key in enumerate(keys) if key is None):
            weight, places[number] = weights[number], None
            plain = _one_lora(weight) if _lora_linear.get(type(weight.layer), False) else None
            if plain is None:
                keys[number] = object() if self.is_merged(weight.layer) else _key(weight)
                continue
            A, B, scaling, magnitude = plain
            if magnitude is None and type(A) is type(B) is nn.Parameter:
                places[number] = _place(weight)
                keys[number] = scaling, *_memory(A), *_memory(B)
            else:
                keys[number] = scaling, _memory(A), _memory(B), None if magnitude is None else _memory(magnitude)
        return keys

    def is_merged(self, layer: Any) -> bool:
        # asked each step of every layer
        if layer.merged_adapters:
            return True
        inner = layer._modules.get("base_layer")
        return inner is not None and is_tuner_layer(inner) and any(link.merged for link in chain_of(layer)[1:])

    def guarded_methods(self, layer: nn.Module) -> list[tuple[type, str]]:
        names = (
            "merge",
            "unmerge",
            "update_layer",
        )  # the last makes an adapter, from W where its initialisation asks for it
        methods = [(type(link), name) for link in chain_of(layer) for name in names if hasattr(link, name)]
        found = [_tuners_utils().BaseTuner]
        for cls in found:  # older PEFT defines these methods in each of them
            found += [sub for sub in cls.__subclasses__() if sub not in found]
        return methods + [(cls, name) for name in TUNER_METHODS for cls in found if name in cls.__dict__]


PEFT = Peft()


# --- what lies under a layer --------------------------------------------------------------------------------------------


def chain_of(layer: Any) -> list[Any]:
    """``layer`` and the tuner layers inside it that adapt the same weight (PeftMixedModel), the outermost first."""
    chain, inner = [layer], layer._modules.get("base_layer")
    while inner is not None and is_tuner_layer(inner):
        if getattr(inner, "parameter_name", None) == getattr(layer, "parameter_name", None):
            chain.append(inner)
        inner = inner._modules.get("base_layer")
    return chain


def _check_family(layer: Any, path: str) -> None:
    kind = family(layer)
    rebuilds = kind == "osf" and not hasattr(layer, "get_delta_weight")  # PEFT 0.18's makes W anew from its parts
    if kind not in ADDITIVE or rebuilds:
        reason = REASONS.get(kind, "is not among those of which flatopt knows that noise on W reaches the forward unchanged")
        raise ValueError(f"{path} is a PEFT {kind} layer, which {reason}. {WAY_OUT}")
    for variant in getattr(layer, "lora_variant", {}).values():
        if not type(variant).__name__.startswith(FACTORED_VARIANTS + MERGED_VARIANTS):
            raise ValueError(
                f"{path} is a PEFT lora layer of the variant {type(variant).__name__}, which is not among those of which "
                f"flatopt knows the merged weight. {WAY_OUT}"
            )


def transposed(layer: Any) -> bool:
    """Whether the weight is (in, out), as transformers' Conv1D. Embeddings get the flag too, where a model has both."""
    return bool(getattr(layer, "fan_in_fan_out", False)) and not isinstance(layer.get_base_layer(), nn.Embedding)


def _has(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


# --- what its adapters add ----------------------------------------------------------------------------------------------


def _update(layer: Any, weight: Tensor) -> WeightUpdate:
    links = [_of_one(link, weight) for link in chain_of(layer)]
    if len(links) == 1:
        return links[0]
    factors = tuple(term for link in links for term in link.factors)
    dense = [link.dense for link in links if link.dense is not None]
    if not dense:
        return WeightUpdate(factors=factors)
    return WeightUpdate(dense=sum((s * (B @ A) for B, A, s in factors), sum(dense[1:], dense[0])))


def _numbers(weight: AdaptedWeight) -> Tensor:
    """The weight as numbers; of a quantised one the shape alone, without memory, where the update follows from no more."""
    form = format_of(weight.owner, weight.name)
    if form is None:
        return weight.parameter.detach()
    layer: Any = weight.layer
    names = [name for name in layer.active_adapters if _has(layer, name)]
    several = len(names) > 1 and any(name in getattr(layer, "lora_magnitude_vector", {}) for name in names)
    reads = several or not all(_in_factors(getattr(layer, "lora_variant", {}).get(name)) for name in names)
    if reads and form.dequantize is not None:
        return form.dequantize(weight.owner, weight.parameter)
    if reads:
        raise ValueError(f"its update needs W, which a {form.name} layer does not tell")
    return shaped(weight.owner, weight.name)


def _of_one(layer: Any, weight: Tensor) -> WeightUpdate:
    """The update of all active adapters of one layer, in factors wherever it has them."""
    if layer.disable_adapters:
        return WeightUpdate()
    adapters = [name for name in layer.active_adapters if _has(layer, name)]
    kind = family(layer)
    if kind == "adalora":
        return WeightUpdate(factors=tuple(_adalora(layer, name) for name in adapters))
    # lora.ParamWrapper has lora_A too, but for stacked experts: it tells its update itself
    if kind == "lora" and "parameter_name" not in layer.__dict__:
        factors = [_lora(layer, name, weight) for name in adapters]
        told = [term for term in factors if term is not None]
        if len(told) == len(factors):
            return _with_dora(layer, adapters, told, weight)
    dense = [_dense(layer, name, weight) for name in adapters]
    if not dense:
        return WeightUpdate()
    total = sum(dense[1:], dense[0]).reshape(weight.shape)
    return WeightUpdate(dense=(total.t() if transposed(layer) else total).flatten(1))


def _dense(layer: Any, name: str, weight: Tensor) -> Tensor:
    """What PEFT's merge of one adapter adds, shaped like the weight."""
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None:  # their get_delta_weight is plain LoRA's
        merged: Tensor = variant.merge_safe(layer, name, weight.clone())
        return merged - weight
    delta: Tensor = layer.get_delta_weight(name)
    delta = delta.to_dense() if delta.is_sparse else delta
    return delta.t() if family(layer) in UNTRANSPOSED and transposed(layer) else delta


def _adalora(layer: Any, name: str) -> Factors:
    scaling = layer.scaling[name] / (layer.ranknum[name] + 1e-5)
    return layer.lora_B[name], layer.lora_A[name] * layer.lora_E[name], scaling


def _lora(layer: Any, name: str, weight: Tensor) -> Factors | None:
    """``(B, A, scaling)`` in rows x fan-in, or None where the factors alone do not make the update."""
    scaling = layer.scaling[name]
    if name in layer.lora_embedding_A:  # the update is (B A)^T: a row is one token's vector
        return layer.lora_embedding_A[name].t(), layer.lora_embedding_B[name].t(), scaling
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    groups = layer.get_base_layer().__dict__.get("groups", 1)  # a miss in nn.Module's own lookup raises: slow, each step
    if groups > 1:  # PEFT's A reads every input, W its own group's: what lies outside W is another layer's
        ranks = A.chunk(groups) if B.shape[1] < A.shape[0] else [A] * groups  # PEFT 0.15's B reads all ranks
        A = torch.cat([some.chunk(groups, dim=1)[group] for group, some in enumerate(ranks)])
        B = torch.block_diag(*B.flatten(1).chunk(groups))
    A, B = A.flatten(1), B.flatten(1)
    rows, fan_in = weight.shape[0], weight.numel() // weight.shape[0]
    if transposed(layer):
        rows, fan_in = fan_in, rows
    fits = B.shape[0] == rows and A.shape[1] == fan_in and B.shape[1] == A.shape[0]
    if not fits or not _in_factors(getattr(layer, "lora_variant", {}).get(name)):
        return None  # QALoRA, KaSA, ...: PEFT multiplies them out
    return B, A, scaling


def _with_dora(layer: Any, adapters: list[str], factors: list[Factors], weight: Tensor) -> WeightUpdate:
    """DoRA applies m_i (W + sBA)_i / |(W + sBA)_i| to row i, so its row norm is the magnitude m_i."""
    magnitude = getattr(layer, "lora_magnitude_vector", {})
    dora = [name in magnitude for name in adapters]
    if not any(dora):
        return WeightUpdate(factors=tuple(factors))
    if adapters[0] in layer.lora_embedding_A:
        return _dora_embedding(layer, adapters, weight)
    if len(adapters) == 1:
        return WeightUpdate(factors=tuple(factors), row_norm=magnitude[adapters[0]].weight.flatten())
    rows = (weight.t() if transposed(layer) else weight.flatten(1)).float()
    alpha = torch.ones(rows.shape[0], device=weight.device)
    terms: list[Factors] = []
    for name, is_dora, (B, A, s) in zip(adapters, dora, factors):
        if is_dora:
            c = magnitude[name].weight.flatten().float() / (rows + s * (B.float() @ A.float())).norm(dim=1)
            if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
                alpha = alpha + c - 1  # PEFT adds (c - 1) W + c sBA
            else:  # PEFT multiplies what the adapters before made of W
                alpha, terms = c * alpha, [(c.unsqueeze(1) * B, A, s) for B, A, s in terms]
            B = c.unsqueeze(1) * B
        terms.append((B, A, s))
    return WeightUpdate(factors=tuple(terms), alpha=alpha)


def _dora_embedding(layer: Any, adapters: list[str], weight: Tensor) -> WeightUpdate:
    """PEFT scales an embedding by column, so the rows' norms follow from the weight multiplied out."""
    applied = weight.float()
    for name in adapters:
        delta = layer.get_delta_weight(name)
        applied = applied + delta
        if name in layer.lora_magnitude_vector:
            applied = applied * layer.lora_magnitude_vector[name].weight / torch.linalg.norm(weight + delta, dim=0)
    return WeightUpdate(dense=applied - weight)


# --- whether it is the same as before -----------------------------------------------------------------------------------


_lora_linear: dict[type, bool] = {}  # whether a class is LoRA on linear layers; filled as weights are found


def _one_lora(weight: AdaptedWeight) -> tuple[nn.Parameter, nn.Parameter, float, nn.Parameter | None] | None:
    """``(A, B, scaling, magnitude)`` of LoRA or DoRA on a linear layer with one active adapter; None of anything else.

    Each step for every layer: PEFT's properties and nn.Module's own lookups would cost as much as all else here.
    """
    layer = weight.layer.__dict__
    modules, name = layer["_modules"], layer["_active_adapter"]
    if type(name) is not str:
        name = name[0] if len(name) == 1 else None
    if layer["_disable_adapters"] or layer["merged_adapters"] or modules["base_layer"] is not weight.owner:
        return None
    lora_A, variants = modules["lora_A"]._modules.get(name), layer.get("lora_variant")
    if lora_A is None or (variants and not _in_factors(variants.get(name))):
        return None
    A, B = lora_A._parameters.get("weight"), modules["lora_B"]._modules[name]._parameters.get("weight")
    # a layer that knows of variants has DoRA's magnitude only beside one; a PEFT before them tells by the magnitude alone
    holder = modules["lora_magnitude_vector"]._modules.get(name) if variants or variants is None else None
    if holder is None and type(A) is type(B) is nn.Parameter:
        return A, B, layer["scaling"][name], None
    magnitude = None if holder is None else holder._parameters.get("weight")
    for parameter in (A, B) if holder is None else (A, B, magnitude):
        if type(parameter) is not nn.Parameter and (parameter is None or not is_sharded(parameter)):
            return None
    return A, B, layer["scaling"][name], magnitude


def _place(weight: AdaptedWeight) -> tuple[Any, ...]:
    """Where a layer that :func:`_one_lora` found without a magnitude has its A and B: what has to stand in which dict.

    The way there by attributes leads over more objects, each of which is out of the CPU's cache after a forward and a
    backward.
    """
    layer = weight.layer.__dict__
    modules, name = layer["_modules"], layer["_active_adapter"]
    name = name if type(name) is str else name[0]
    place: list[Any] = [layer, modules, name, weight.owner]
    for each in (modules["lora_A"], modules["lora_B"]):
        place += (each, each.__dict__, each._modules[name], each._modules[name]._parameters)
    return tuple(place)


def _keys_there(places: list[Any]) -> list[Any]:
    """What the update of each layer follows from, where all is in its place; else None. One loop, as calls cost as much."""
    keys: list[Any] = [None] * len(places)
    plain = nn.Parameter
    for number, place in enumerate(places):
        if place is None:
            continue
        layer, modules, name, owner, lora_A, in_A, linear_A, of_A, lora_B, in_B, linear_B, of_B = place
        active = layer["_active_adapter"]
        try:
            A, B = of_A["weight"], of_B["weight"]
            if (
                (active == name or active == [name])
                and not (layer["_disable_adapters"] or layer["merged_adapters"] or layer["lora_variant"])
                and modules["base_layer"] is owner
                and modules["lora_A"] is lora_A
                and modules["lora_B"] is lora_B
                and in_A["_modules"][name] is linear_A
                and in_B["_modules"][name] is linear_B
                and type(A) is type(B) is plain
            ):
                scaling = layer["scaling"][name]
                # in_features and out_features are the layer's, so that the number of elements tells the shape
                keys[number] = scaling, id(A), A.data_ptr(), A.dtype, A.numel(), id(B), B.data_ptr(), B.dtype, B.numel()
        except KeyError:  # something was taken out
            continue
    return keys


def _in_factors(variant: Any) -> bool:
    """Whether a way to apply LoRA adds its two factors' product."""
    return variant is None or type(variant).__name__.startswith(FACTORED_VARIANTS)


def _memory(parameter: Tensor | None) -> Any:
    if type(parameter) is nn.Parameter:
        mine: Tensor = parameter
    elif parameter is not None and is_sharded(parameter) and parameter.dim() <= 2:  # making a matrix of more may take others
        mine = local(parameter)
    else:
        return object()
    if mine.dim() > 2 and not mine.is_contiguous():
        return object()  # as a matrix it is a copy, of this step
    return id(parameter), mine.data_ptr(), mine.dtype, mine.numel()


def _key(weight: AdaptedWeight) -> Any:
    """The key of any layer: what its update follows from, or, where the update is computed, equal to nothing."""
    layer: Any = weight.layer
    computed = object()
    if layer.disable_adapters:
        return "disabled" if layer._modules["base_layer"] is weight.owner else computed
    names = [name for name in layer.active_adapters if _has(layer, name)]
    if not names:
        return "no adapter" if layer._modules["base_layer"] is weight.owner else computed
    magnitude, embedding = getattr(layer, "lora_magnitude_vector", {}), getattr(layer, "lora_embedding_A", {})
    dora = any(name in magnitude for name in names)
    if (
        _family(type(layer)) != "lora"
        or layer._modules["base_layer"] is not weight.owner
        or "parameter_name" in layer.__dict__
        or weight.owner.__dict__.get("groups", 1) > 1
        or (dora and (len(names) > 1 or names[0] in embedding))
        or any(_lora(layer, name, weight.parameter) is None for name in names)
    ):
        return computed
    key: list[Any] = []
    for name in names:
        if name in embedding:
            parameters = [embedding[name], layer.lora_embedding_B[name]]
        else:
            parameters = [layer.lora_A[name].weight, layer.lora_B[name].weight]
        if name in magnitude:
            parameters.append(magnitude[name].weight)
        key += (name, layer.scaling[name], *map(_memory, parameters))
    return tuple(key)
