"""The low-rank layers of loralib, torchtune and LyCORIS, known by the name of their class: none has to be installed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.weight import Factors, WeightUpdate
from .base import LowRank


def _layout(module: Any) -> str:
    return "columns" if module.fan_in_fan_out else "rows"  # loralib keeps W as (in, out) then


def _has_rank(module: Any) -> bool:
    return hasattr(module, "lora_A")  # loralib's layers of rank 0 are plain ones


def _loralib_merged_linear(module: Any) -> Factors:
    """Each of the enabled outputs (of a fused query, key, value) has factors of its own."""
    B = torch.block_diag(*module.lora_B.chunk(sum(module.enable_lora)))
    return module.zero_pad(B), module.lora_A, module.scaling


def _torchtune_lora(module: Any) -> WeightUpdate:
    if module.disabled:
        return WeightUpdate()
    return WeightUpdate(factors=((module.lora_b.weight, module.lora_a.weight, module.alpha / module.rank),))


def _torchtune_dora(module: Any) -> WeightUpdate:
    """Row i is m_i (W + sBA)_i / |(W + sBA)_i|, so that its norm is the magnitude m_i."""
    if module.disabled:
        return WeightUpdate()
    factors = ((module.lora_b.weight, module.lora_a.weight, module.scaling),)
    return WeightUpdate(factors=factors, row_norm=module.magnitude)


def _torchtune_qat(module: Any) -> Any:
    raise ValueError(
        "torchtune's QATLoRALinear quantises its base weight in the forward, which rounds the noise. Train with LoRALinear, "
        "or leave the layer out: pass the other layers as [{'modules': [...]}]"
    )


def _lycoris_base(module: Any) -> Any:
    (owner,) = module.org_module
    if "forward" in module.__dict__:
        problem = "is used as a parametrization"
    elif len(getattr(owner, "_lycoris_wrappers", ())) > 1:
        problem = "is one of several LyCORIS modules on the same layer"
    elif module.rank_dropout:
        problem = "draws its update at random (rank_dropout)"
    else:
        return owner, "weight"
    raise ValueError(
        f"{type(module).__name__} {problem}, which flatopt does not support. Change that, or leave the layer out: pass the "
        "other layers as [{'modules': [...]}]"
    )


def _lycoris_locon(module: Any) -> Tensor:
    return _lycoris_delta(module, module.make_weight(module.org_module[0].weight.device) * module.scale)


def _lycoris_product(module: Any) -> Tensor:
    # its get_diff_weight has the scale twice, unlike the forward
    return _lycoris_delta(module, module.get_weight(module.org_module[0].weight.shape) * module.scalar)


def _lycoris_delta(module: Any, update: Tensor) -> Tensor:
    weight: Tensor = module.org_module[0].weight.detach()
    update = update.reshape(weight.shape)
    if not module.wd:
        return update * float(module.multiplier)
    applied: Tensor = module.apply_weight_decompose(weight + update, module.multiplier)  # DoRA
    return applied - weight


def _lycoris(delta: Callable[[Any], Tensor]) -> LowRank:
    return LowRank(_lycoris_base, delta, merged=lambda module: hasattr(module, "cached_org_weight"))


_linear = LowRank(lambda m: m.weight, lambda m: (m.lora_B, m.lora_A, m.scaling), _layout, adapted=_has_rank)
_embedding = LowRank(lambda m: m.weight, lambda m: (m.lora_A.t(), m.lora_B.t(), m.scaling), adapted=_has_rank)
_conv = LowRank(
    lambda m: m.conv.weight,
    lambda m: (m.lora_B @ m.lora_A).view(m.conv.weight.shape) * m.scaling,
    adapted=_has_rank,
)

LIBRARIES = {
    "loralib.layers.Linear": _linear,
    "loralib.layers.Embedding": _embedding,
    "loralib.layers.MergedLinear": LowRank(lambda m: m.weight, _loralib_merged_linear, _layout, adapted=_has_rank),
    "loralib.layers.ConvLoRA": _conv,
    "torchtune.modules.peft.lora.LoRALinear": LowRank(lambda m: m.weight, _torchtune_lora),
    "torchtune.modules.peft.lora.QATLoRALinear": LowRank(_torchtune_qat, _torchtune_lora),
    "torchtune.modules.peft.dora.DoRALinear": LowRank(lambda m: m.weight, _torchtune_dora),
    "lycoris.modules.locon.LoConModule": _lycoris(_lycoris_locon),
    "lycoris.modules.loha.LohaModule": _lycoris(_lycoris_product),
    "lycoris.modules.lokr.LokrModule": _lycoris(_lycoris_product),
}
