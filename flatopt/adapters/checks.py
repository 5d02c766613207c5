"""Whether a weight can be perturbed as it stands now."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.flat_shards import sharding_reason
from ..core.sharding import is_strided, local, splits_rows_only
from ..core.weight import FLOATS, OUTPUTS, AdaptedWeight
from .forwards import unsupported_reason
from .quantized import format_of

WAY_OUT = "Load the base model unquantised (bf16, fp16 or fp32), or leave the layer out with [{'modules': [...]}]"


def check(weight: AdaptedWeight, in_forward: bool = False) -> None:
    """Raise unless ``weight`` can be perturbed now; with ``in_forward``, in its layer's forward where it is quantised.

    Raises:
        ValueError: a weight that :func:`check_kind` refuses, that is trainable or merged; names it and the way out.
    """
    check_kind(weight, in_forward)
    if weight.parameter.requires_grad:
        raise ValueError(
            f"{weight.path} is trainable: flatopt perturbs frozen base weights. Freeze it with requires_grad_(False), or "
            "leave it out with [{'modules': [...]}]"
        )
    if weight.adapter.is_merged(weight.layer):
        raise ValueError(
            f"{weight.path} has its adapter merged into it. Call unmerge_adapter() on the model (or layer.unmerge()) before "
            "training"
        )


def check_kind(weight: AdaptedWeight, in_forward: bool = False) -> None:
    """Raise unless ``weight`` is here and of a kind that can be moved, be it trainable or merged.

    Raises:
        ValueError: a weight that is quantised, not loaded, of size 0, sharded flat or along its inputs, or offloaded; names
            it and the way out.
    """
    parameter, path = weight.parameter, weight.path
    tensor = local(parameter) if isinstance(parameter, Tensor) else parameter
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path} is {type(tensor).__name__}, not a tensor: it cannot be perturbed")
    if type(tensor).__name__ == "FakeTensor":
        raise ValueError(
            f"{path} is a FakeTensor, which has no values to perturb. For an estimate under FakeTensorMode run the model "
            "with the bare optimizer: flatopt adds 8 bytes a row of W"
        )
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{path} is not initialised yet: run a forward of its lazy module first")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{path} is sparse ({tensor.layout}): it cannot be perturbed. Give a dense tensor, or leave it out")
    if tensor.is_inference():
        raise ValueError(
            f"{path} was made under torch.inference_mode(): it can neither be written to nor trained through. Make or load "
            "the model outside of it, or replace the parameter by a clone"
        )
    reason = sharding_reason(parameter, weight.owner)
    if reason is not None:
        raise ValueError(f"{path} cannot be perturbed: {reason}")
    form = format_of(weight.owner, weight.name)
    if form is not None:
        reason = unsupported_reason(weight) if in_forward else f"noise would be rounded away or break its format. {WAY_OUT}"
        if reason is not None:
            kind = f"{form.name}: {type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}"
            where = ", and cannot get its noise in the forward either" if in_forward else ""
            raise ValueError(f"{path} is quantised ({kind}){where}: {reason}")
    # another subclass of Tensor may keep other bits than it shows
    elif type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in FLOATS:
        raise ValueError(
            f"{path} is a {type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}; flatopt perturbs plain "
            f"tensors of fp32, bf16, fp16 and fp64, and quantised weights that it knows. {WAY_OUT}"
        )
    if form is None and _overlaps_itself(tensor):
        raise ValueError(
            f"{path} has elements that share memory (an expanded or strided view), so that noise on one would be noise on "
            "others. Replace the parameter by a clone of it"
        )
    if tensor.device.type == "meta":
        raise ValueError(
            f"{path} is on the meta device: it was not loaded yet, or is offloaded. Load the model's weights (and turn "
            "CPU/disk offload off) before the training step"
        )
    if tensor.numel() == 0:
        raise ValueError(
            f"{path} has size 0 on this rank: DeepSpeed ZeRO-3 (or an uneven shard) holds it elsewhere. Use ZeRO-2 or "
            "FSDP2, where each rank keeps rows of the weight"
        )
    if is_strided(parameter):
        raise ValueError(
            f"{path} is sharded in strides (FSDP2 over tensor parallelism, or a fused weight under it): which rows "
            "a rank holds is not worked out. Use FSDP2 or tensor parallelism alone, unfuse the weight, or leave it out with "
            "[{'modules': [...]}]"
        )
    if not splits_rows_only(parameter, OUTPUTS[weight.layout]):
        raise ValueError(
            f"{path} is sharded along its inputs (tensor parallelism, or FSDP2 on transformers' Conv1D): its row norms "
            "are spread over the ranks. Shard it by its outputs, or leave it out with [{'modules': [...]}]"
        )
    if getattr(weight.owner.__dict__.get("_hf_hook"), "offload", False):
        raise ValueError(f"{path} is offloaded by accelerate; load the model onto one device to train it")


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_lasting(weight: AdaptedWeight) -> None:
    """Raise where each forward writes to the weight or makes it anew; asked once, when an optimizer is made.

    Raises:
        ValueError: an embedding with ``max_norm``, a parametrization, the older spectral and weight norm, pruning.
    """
    owner, name = weight.owner, weight.name
    if getattr(owner, "max_norm", None) is not None and isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        raise ValueError(
            f"{weight.path}: its embedding has max_norm, which scales the rows it reads in each forward, so no clean value "
            "would be left to come back to. Set max_norm=None, or leave it out with [{'modules': [...]}]"
        )
    if parametrize.is_parametrized(owner, name) or {f"{name}_orig", f"{name}_g"} & owner._parameters.keys():
        raise ValueError(
            f"{weight.path} is computed anew in each forward (a parametrization, spectral or weight norm, pruning), which "
            "would wipe the noise out. Fold it into a plain parameter (parametrize.remove_parametrizations, "
            "remove_spectral_norm, remove_weight_norm, prune.remove), or leave it out with [{'modules': [...]}]"
        )
