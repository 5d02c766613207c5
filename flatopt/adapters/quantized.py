"""Quantised base weights: which format a layer keeps its weight in, and how to read it as numbers.

None of the libraries is imported before a weight of theirs is there to be read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PACKED = ("W_q", "qweight")  # what HQQ's layers call their weight; GPTQ's, AWQ's and others'
ROUNDS_INPUTS = ("act_quant_kwargs", "activation_quantization", "activation_qtype")  # set by torchao, torchao and quanto
FLOAT8 = {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}


class Format(NamedTuple):
    """How a layer keeps its weight W.

    ``name``: as errors name it. ``parameter``: the attribute that holds W. ``dequantize(layer, weight)``: W as an
    ``(out, in)`` matrix of new memory; None where flatopt knows no way. ``quantizes_inputs``: the layer rounds its inputs
    too, so that its output is not x Wᵀ. ``has_linear``: torch's own linear layer works with this kind of tensor.
    """

    name: str
    parameter: str
    dequantize: Callable[[Any, Any], Tensor] | None
    quantizes_inputs: bool = False
    has_linear: bool = False


def packed_name(layer: nn.Module) -> "str | None":
    """The attribute that holds a layer's weight: ``"weight"``, or what packed formats call it; None if there is none.

    The latter first: transformers 5.17 gives HQQ's layers an empty ``weight`` as well, for code that asks for its type.
    """
    return next((name for name in (*PACKED, "weight") if isinstance(getattr(layer, name, None), Tensor)), None)


def format_of(layer: nn.Module, name: str) -> "Format | None":
    """The quantised format of ``layer.name``; None for a plain floating-point weight."""
    weight: Any = getattr(layer, name)
    kind: Any = type(weight)
    if not isinstance(weight, Tensor):
        return None
    if kind.__name__ == "Params4bit":
        return Format(f"bitsandbytes {getattr(weight, 'quant_type', kind.__name__)}", name, _bitsandbytes_4bit)
    if kind.__name__ == "Int8Params" and not getattr(weight, "has_fp16_weights", False):
        return Format("bitsandbytes int8", name, _bitsandbytes_int8, quantizes_inputs=True)
    if name == "W_q":
        return Format("HQQ", name, _hqq)
    for library, shown in (("torchao.", "torchao"), ("optimum.quanto.", "quanto")):
        if kind.__module__.startswith(library):
            rounds = any(getattr(holder, n, None) is not None for holder in (weight, layer) for n in ROUNDS_INPUTS)
            dequantize = _by_its_own if hasattr(kind, "dequantize") else None
            return Format(f"{shown} {kind.__name__}", name, dequantize, quantizes_inputs=rounds, has_linear=True)
    if weight.dtype in FLOAT8 and isinstance(getattr(layer, "weight_scale_inv", None), Tensor):
        return Format("fp8", name, _scaled_blocks, quantizes_inputs=True)
    if name in PACKED or weight.dtype in FLOAT8 or not (weight.dtype.is_floating_point or weight.dtype.is_complex):
        return Format(f"{type(layer).__name__} {str(weight.dtype).removeprefix('torch.')}", name, None)
    return None


def shape_of(layer: Any, name: str) -> "tuple[int, int] | None":
    """(out, in) of a quantised weight, whatever shape it is packed in; None where the layer does not tell."""
    if name == "W_q":
        return tuple(layer.meta["shape"])
    m, n = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return None if m is None or n is None else (m, n)


def shaped(layer: nn.Module, name: str) -> Tensor:
    """``layer.name`` itself, or where it is quantised a tensor of its shape as numbers, without memory."""
    weight: Tensor = getattr(layer, name)
    shape = None if format_of(layer, name) is None else shape_of(layer, name)
    return weight if shape is None else torch.empty(shape, device="meta")


def _hqq(layer: Any, weight: Any) -> Tensor:
    numbers: Tensor = layer.dequantize()
    return numbers


def _by_its_own(layer: Any, weight: Any) -> Tensor:
    numbers: Tensor = weight.dequantize()
    return numbers


def _bitsandbytes_4bit(layer: Any, weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if state is None:
        raise ValueError("bitsandbytes quantises when the layer is moved to its device: call model.to(device) first")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked it for inference on this CPU, in a forward in eval mode, and can train it no more. "
            "Reload the model, and set support_avx512bf16_for_cpu = False on its Linear4bit layers before the first forward"
        )
    numbers: Tensor = dequantize_4bit(weight.data.view(-1, 1), state)
    return numbers


def _bitsandbytes_int8(layer: Any, weight: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    scale = weight.SCB if weight.SCB is not None else layer.state.SCB  # the first forward moves it
    if scale is None:
        raise ValueError("bitsandbytes quantises when the layer is moved to its device: call model.to(device) first")
    numbers: Tensor = int8_vectorwise_dequant(weight.data, scale)
    return numbers


def _scaled_blocks(layer: Any, weight: Tensor) -> Tensor:
    scale = layer.weight_scale_inv.detach().float()
    if scale.dim() == 2:
        (m, n), (down, right) = weight.shape, layer.block_size
        scale = scale.repeat_interleave(down, 0)[:m].repeat_interleave(right, 1)[:, :n]
    numbers: Tensor = weight.detach().float() * scale
    return numbers


class Blocks(NamedTuple):
    """W, (m, n), as small integers: (element - zero point) × scale, one of each for every equally long block of a row.

    ``elements``: contiguous int8, one each; or with ``halves`` uint8 of two: the upper four bits are W's first half, the
    lower ones its second half. ``zeros``: None where they all are 0.
    """

    shape: tuple[int, int]
    elements: Tensor
    scales: Tensor
    zeros: Tensor | None
    halves: bool


def blocks_of(layer: Any, weight: Any) -> "Blocks | None":
    """How torchao's, quanto's and HQQ's weights are kept, where that is in :class:`Blocks` of even length."""
    found = _hqq_blocks(layer, weight) if hasattr(layer, "W_q") else _byte_blocks(weight)
    if found is None:
        return None
    (m, n), count = found.shape, found.scales.numel()
    length = m * n // count
    fits = count * length == m * n and n % length == 0 and length % 2 == 0 and found.elements.is_contiguous()
    one_each = found.zeros is None or found.zeros.numel() == count
    return found if fits and one_each and found.scales.is_contiguous() else None


def _byte_blocks(weight: Any) -> "Blocks | None":
    for elements, scales in (("qdata", "scale"), ("_data", "_scale")):
        q, s = getattr(weight, elements, None), getattr(weight, scales, None)
        if isinstance(q, Tensor) and isinstance(s, Tensor) and q.dtype == torch.int8 and q.shape == weight.shape:
            zeros = getattr(weight, "zero_point", None)
            return Blocks((q.shape[0], q.shape[1]), q, s, zeros, False) if q.dim() == 2 else None
    return None


def _hqq_blocks(layer: Any, weight: Tensor) -> "Blocks | None":
    meta = layer.meta
    scales, zeros = meta.get("scale"), meta.get("zero")
    if meta.get("packing") != "4bit_u8" or meta.get("axis") != 1 or meta.get("view_as_float"):
        return None
    if not isinstance(scales, Tensor) or not isinstance(zeros, Tensor) or meta["quant_zero"] or meta["quant_scale"]:
        return None
    m, n = meta["shape"]
    return Blocks((m, n), weight.data, scales, zeros, True) if 2 * weight.numel() == m * n else None


def data_ptr(weight: Tensor) -> int:
    """Where a weight's memory begins. torchao's and quanto's tensors, which wrap others, say 0 themselves."""
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return data_ptr(getattr(weight, names[0]))
    return weight.data_ptr()
