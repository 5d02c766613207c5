"""Weights rounded to few bits and back, as they will be served: for a measurement, or to train through."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.sharding import is_sharded
from ..core.weight import WeightView
from .constants import constant

Rounding = Callable[[Tensor], Tensor]

FORMAT = re.compile(r"(?:(u?int)([2-8])|(nf4))(?:/0*([1-9]\d*))?")  # how :func:`rounding` reads a name

KERNEL_GROUPS = [1 << bits for bits in range(11)]  # that the kernels know; of larger ones a part does not fit registers


class Format(NamedTuple):
    """What a name says; ``group``: weights of a row that share a scale, None for all of them."""

    kind: str  # "int", "uint" or "nf4"
    bits: int
    group: "int | None"


def format_named(name: str) -> Format:
    """ValueError where it is none."""
    match = FORMAT.fullmatch(name)
    if match is None:
        raise ValueError(
            f"format {name!r} is none of 'int2' to 'int8', 'uint2' to 'uint8' and 'nf4', with '/g' for groups of g inputs, "
            "as in 'int4/64'; for others give a dict from names to functions"
        )
    return Format(match[1] or match[3], int(match[2] or 4), int(match[4]) if match[4] else None)


# NormalFloat's sixteen levels (Dettmers et al., NeurIPS 2023), as bitsandbytes has them
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@torch.no_grad()
def to_rounded(view: WeightView, clean: Tensor, form: str) -> Tensor:
    """What takes a weight's ``clean`` rows to where the *merged* weight is the rounded one: Q(W + sBA) - (W + sBA), float32.

    A row with inf or NaN stays where it is.

    Raises:
        ValueError: as :func:`refuse_rescaled`.
    """
    refuse_rescaled(view, form)
    update, merged = view.update, clean.to(torch.float32, copy=True)
    for B, A, scaling in update.factors:
        merged += scaling * (B.detach().float() @ A.detach().float())
    if update.dense is not None:
        merged += update.dense.detach()
    offset = rounding(form)(merged).sub_(merged)
    return torch.where(merged.isfinite().all(1, keepdim=True), offset, 0.0)


def whole_weight_needed(view: WeightView, noise: str) -> str | None:
    """Why no backend rounds a weight to the format ``noise``, or None."""
    if not is_sharded(view.weight.parameter):
        return None
    return f"noise={noise!r} rounds whole weights, and it is sharded: use noise='filter', or train under DDP"


def refuse_rescaled(view: WeightView, form: str) -> None:
    """ValueError for an adapter that rescales W (DoRA), whose merged weight is not W and something added."""
    if view.update.row_norm is not None or view.update.alpha is not None:
        raise ValueError(
            f"noise={form!r} cannot round {view.weight.path}: its adapter rescales W + sBA (DoRA), so that the sum is not "
            "what is served. Train LoRA without use_dora, or with noise='filter'"
        )


def rounding(name: str) -> Rounding:
    r"""The function that rounds a weight ``(rows, fan_in)`` to the format ``name`` and back to float32.

    ``/g`` gives each group of g inputs in a row a scale of its own, the last group what is left; without it a row has one.
    Scales stay in float32. With w the weights of a group:

    - ``"int8"``, ``"int4/32"``, any ``int2`` to ``int8``: symmetric by absmax, :math:`s = \max|w| / (2^{b-1} - 1)` and
      :math:`s \cdot \operatorname{round}(w/s)`, halves to even. int4 has 15 levels; GGUF's Q4_0 (groups of 32) sets the
      largest element to level -8 of 16 and keeps s in float16.
    - ``"uint4/128"``: asymmetric, between the least and the largest of w and 0: :math:`s = (\max - \min) / (2^b - 1)`, zero
      point :math:`z = \operatorname{round}(-\min/s)`, :math:`s \cdot (\operatorname{clamp}(\operatorname{round}(w/s) + z, 0,
      2^b - 1) - z)`, as torchao's int4 weight-only and AWQ do.
    - ``"nf4/64"``: :math:`\max|w|` times the nearest of NormalFloat's levels, bitsandbytes' NF4 without double quantisation
      where g divides the fan-in (its blocks run on over the rows).

    Raises:
        ValueError: for another name.
    """
    kind, bits, group = format_named(name)
    if kind == "nf4":
        return lambda w: _by_group(w, group, _nf4)
    inner = _asymmetric if kind == "uint" else _symmetric
    return lambda w: _by_group(w, group, lambda groups: inner(groups, bits))


def _by_group(w: Tensor, group: "int | None", inner: Rounding) -> Tensor:
    """``inner`` on ``(..., g)``; a short last group is filled up with zeros, which no scale here depends on."""
    rows, fan_in = w.shape
    group = min(group or fan_in, fan_in)
    filled = torch.nn.functional.pad(w, (0, -fan_in % group))
    return inner(filled.view(rows, -1, group)).view(rows, -1)[:, :fan_in]


def _symmetric(w: Tensor, bits: int) -> Tensor:
    scale = w.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, (w / scale).round_() * scale, 0.0)


def _asymmetric(w: Tensor, bits: int) -> Tensor:
    low, high = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round_()
    levels = ((w / scale).round_() + zero).clamp_(0, 2**bits - 1)
    return torch.where(scale > 0, (levels - zero) * scale, 0.0)


@constant
def nf4_levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(NF4, dtype=dtype, device="cpu").to(device)


def _nf4(w: Tensor) -> Tensor:
    levels = nf4_levels(w.device, w.dtype)
    scale = w.abs().amax(-1, keepdim=True)
    between = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize((w / scale).nan_to_num_(0.0).contiguous(), between)]
    return nearest * scale
