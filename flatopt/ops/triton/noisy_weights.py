r"""Triton kernels that make W + ε of a layer in one pass: from a plain weight, or from 4 or 8 bits an element.

What they write is what the layer's matrix product reads. W is rounded to the output's type before the noise is added, as by
dequantising first; the noise is :mod:`flatopt.ops.triton.kernels`'s, whose functions make it.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import APPROX, _add, _normals, _round, _sub_key

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# how W is kept; TWICE: the scales are quantised themselves; HALVES: the two halves of W share bytes
PLAIN, FOUR_BITS, FOUR_BITS_TWICE, BYTES, HALVES = 0, 1, 2, 3, 4
OUTER_BLOCK = tl.constexpr(256)  # scales that share a scale of their own; bitsandbytes has no other
ROWS, PAIRS, WARPS = 16, 128, 4


@triton.jit(do_not_specialize=["std_stride"])
def make_noisy(
    out, source, scales, values, outer_scales, outer_values, offset, zeros, middle, stds, std_stride, key, m, half,
    KEPT: tl.constexpr, BLOCK: tl.constexpr, ZEROS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """``out`` (m rows of ``half`` pairs) = W + ε.

    PLAIN: ``source`` is W, in pairs; ``out`` may be the same memory. FOUR_BITS: a byte a pair, the even element in its upper
    half, each an index into ``values``, times the scale of its BLOCK elements. FOUR_BITS_TWICE: those scales are bytes,
    indices into ``outer_values``, times ``outer_scales``, plus ``offset``. BYTES: int8 in pairs, less the zero point of
    their BLOCK elements (with ZEROS), times the scale of these. HALVES: four bits; W's first ``middle`` pairs are the upper
    halves of the bytes, the others the lower ones; zero points and scales as with BYTES.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)[None, :]
    inside = row < m
    here = inside[:, None] & (pair < half)
    at = row[:, None] * half + pair
    first, second = _sub_key(tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32), row)
    radius, cosine, sine = _normals(pair, first[:, None], second[:, None], APPROX)
    std = tl.load(stds + row * std_stride, mask=inside, other=0.0)[:, None]

    if KEPT == 0:
        word = tl.load(source + at, mask=here, other=0)
    else:
        word_at = at
        if KEPT == 4:
            word_at = tl.where(at < middle, at, at - middle)
        packed = tl.load(source + word_at, mask=here, other=0).to(tl.int32)
        block = at // (BLOCK // 2)
        scale = tl.load(scales + block, mask=here, other=0)
        if KEPT == 2:
            outer = tl.load(outer_scales + block // OUTER_BLOCK, mask=here, other=0.0)
            scale = tl.load(outer_values + scale.to(tl.int32)) * outer + tl.load(offset)
        scale = scale.to(tl.float32)
        if KEPT == 3:
            even, odd = ((packed << 24) >> 24).to(tl.float32), (packed >> 8).to(tl.float32)
        elif KEPT == 4:
            shift = tl.where(at < middle, 4, 0)
            even, odd = ((packed >> shift) & 15).to(tl.float32), ((packed >> (shift + 8)) & 15).to(tl.float32)
        else:
            even, odd = tl.load(values + (packed >> 4)), tl.load(values + (packed & 15))
        if ZEROS:  # the difference is rounded, as by the library's own operations
            zero = tl.load(zeros + block, mask=here, other=0).to(tl.float32)
            even, odd = (even - zero).to(DTYPE).to(tl.float32), (odd - zero).to(DTYPE).to(tl.float32)
        word = _round(even * scale, odd * scale, DTYPE, APPROX)
    tl.store(out + at, _add(word, radius, cosine, sine, std, 1, DTYPE, APPROX), mask=here)


def _words(tensor: Tensor) -> Tensor:
    """The same memory, two elements a word."""
    return tensor.view(torch.int64 if tensor.element_size() == 4 else torch.int32)


def _launch(out: Tensor, source: Tensor, std: Tensor, key: Tensor, kept: int, block: int = 2, **more: Any) -> Tensor:
    (m, n), words = out.shape, _words(out)
    names = "scales", "values", "outer_scales", "outer_values", "offset", "zeros"
    parts = [more.get(name, words) for name in names]
    grid = triton.cdiv(m, ROWS), triton.cdiv(n // 2, PAIRS)
    with torch.cuda.device(out.device) if out.device.type == "cuda" else contextlib.nullcontext():
        make_noisy[grid](
            words, source, *parts, source.numel(), std, int(len(std) > 1), key, m, n // 2,
            kept, block, "zeros" in more, DTYPES[out.dtype], ROWS, PAIRS, APPROX, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def supports(shape: "tuple[int, ...] | torch.Size", dtype: torch.dtype) -> bool:
    """Whether W + ε of this shape and type can be made here: pairs of columns must not straddle rows."""
    return len(shape) == 2 and shape[1] % 2 == 0 and shape[0] > 0 and dtype in DTYPES


def add_noise_(rows: Tensor, std: Tensor, key: Tensor) -> Tensor:
    """``rows``, a contiguous matrix, += std × normals, as :func:`flatopt.perturbation.noisy_layers.add_noise_`."""
    return _launch(rows, _words(rows), std, key, PLAIN)


def noisy_4bit(weight: Any, std: Tensor, key: Tensor) -> Tensor:
    """W + ε of a bitsandbytes ``Params4bit``, in the type it was quantised from."""
    state = weight.quant_state
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    packed = weight.data.view(torch.uint8)
    if not state.nested:
        return _launch(out, packed, std, key, FOUR_BITS, state.blocksize, scales=state.absmax, values=state.code)
    outer = {"outer_scales": state.state2.absmax, "outer_values": state.state2.code, "offset": state.offset}
    scales = {"scales": state.absmax, "values": state.code}
    return _launch(out, packed, std, key, FOUR_BITS_TWICE, state.blocksize, **scales, **outer)


def noisy_blocks(
    shape: tuple[int, int], elements: Tensor, scales: Tensor, zeros: "Tensor | None", halves: bool,
    std: Tensor, key: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W + ε, in type ``dtype``, of W as :class:`flatopt.adapters.quantized.Blocks` tells it."""
    out = torch.empty(shape, dtype=dtype, device=elements.device)
    how, block = HALVES if halves else BYTES, out.numel() // scales.numel()
    more = {"scales": scales} if zeros is None else {"scales": scales, "zeros": zeros}
    return _launch(out, elements.view(-1).view(torch.int16), std, key, how, block, **more)
