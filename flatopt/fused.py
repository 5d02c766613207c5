"""The kernels from Python: which weights they take, and the table of layers they read, kept while nothing in it changes."""

import array
import contextlib
import functools
import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import kernels, noise
from .delta import Delta
from .draw import Draw
from .kernels import APPROX, SCRATCH, SPAN, STDS
from .reversible import _delta_table, grid_bits
from .scale import filter_std

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# What an H200 likes best (benchmarks/LOG.md). Whatever stands here, the noise is the same, up to the last bits of the stds.
ROWS, PAIRS, WARPS = 16, 64, 4
PREPARE_DEPTH, PREPARE_STAGES = 256, 1
NORM_ROWS, NORM_DEPTH, NORM_WARPS, NORM_STAGES = 64, 64, 4, 4
MAX_RANK = 64  # beyond it the small matrices of kernels.norms no longer fit shared memory everywhere
COUNTS_LISTS = torch.__version__ >= (2, 6)


def takes(draw: Draw) -> bool:
    """Whether the kernel can move this weight; the rest goes the reference's way."""
    dtype = draw.weight.dtype
    return dtype in DTYPES and draw.noise != "element" and (dtype != torch.bfloat16 or _has_bf16(draw.weight.device))


@functools.cache
def _has_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or not APPROX or torch.cuda.get_device_capability(device) >= (8, 0)


def fuse(draws: "list[Draw]") -> Callable[[int], None]:
    """What moves the weights of ``draws``, all :func:`taken <takes>`, given 0: the reversible map, or 1, -1: +- the noise.

    Sets ``draw.std`` where it is not set. One launch (and at first two small ones, for the stds) for all layers alike in
    device, dtypes and alignment; their table goes to the GPU when something in it changes, and nothing waits for the GPU.
    """
    layers = [_layer(draw) for draw in draws]
    known, launches = draws[0].launches or (None, None)
    if known != layers:
        by_kind = {}
        for number, layer in enumerate(layers):
            by_kind.setdefault(layer.kind, []).append(number)
        # by number: a launch that held draws would be a cycle, and keep a deleted model's memory until it is collected
        launches = [(Launch(*kind, [layers[i] for i in some]), some) for kind, some in by_kind.items()]
        draws[0].launches = layers, launches
    parts = [(launch, [draws[i] for i in some]) for launch, some in launches]
    for launch, some in parts:
        launch.fill(some)

    def move(how: int) -> None:
        for launch, some in parts:
            launch.move(some, how)

    return move


def _layer(draw: Draw) -> "Layer":
    known, find = draw.layer, draw.std is None
    if known and not find:
        return known
    state = draw.target.delta_state() if find else None
    if known and state is not None and known.state == state:
        return known
    factors = None
    if find:
        delta = draw.target.delta()
        factors = _factors(draw, delta)
        if factors is None:
            draw.std = filter_std(draw, delta)
    layer = Layer(draw, state, factors)
    if not known or (layer.kind, layer.fields, layer.state) != (known.kind, known.fields, known.state):
        draw.layer = layer
    return draw.layer


class Factors(NamedTuple):
    """What the row norms of W' follow from: W's square sums and at most one pair of factors, or the norms themselves."""

    sums: Tensor | None = None
    B: Tensor | None = None
    A: Tensor | None = None
    scaling: float = 0.0
    norms: Tensor | None = None


def _factors(draw: Draw, delta: Delta) -> "Factors | None":
    """None if it takes more than the kernels know."""
    device = draw.weight.device
    if delta.row_norm is not None:
        norms = delta.row_norm.detach()
        return Factors(norms=norms.contiguous()) if norms.dtype in DTYPES and norms.device == device else None
    if delta.dense is not None or delta.alpha is not None or len(delta.factors) > 1:
        return None
    if not delta.factors:
        return Factors(draw.square_sums(draw.rows))
    B, A, scaling = delta.factors[0]
    if isinstance(scaling, Tensor) or A.shape[0] > MAX_RANK or A.dtype not in DTYPES or B.dtype not in DTYPES:
        return None
    return Factors(draw.square_sums(draw.rows), B, A, scaling) if A.device == B.device == device else None


class Layer:
    """A weight and its factors, as the table has them, while both stay where they are.

    ``state``: all that the factors follow from, as :meth:`Target.delta_state` tells it; None: they must be asked for again.
    """

    def __init__(self, draw: Draw, state: "tuple | None", factors: "Factors | None"):
        rows, self.factors = draw.rows, factors  # the latter kept, so that nothing else takes their memory
        sums, B, A, scaling, norms = factors or Factors()
        (m, n), (down, right), r = rows.shape, rows.stride(), 0 if A is None else A.shape[0]
        pointers = [tensor.data_ptr() for tensor in (A, B, norms) if tensor is not None]
        self.state = state if factors and state is not None and all(p in state for p in pointers) else None
        packed = right == 1 and (n | down) % 8 == 0 and rows.data_ptr() % 16 == 0
        a_dtype, b_dtype = (torch.float32 if tensor is None else tensor.dtype for tensor in (A, norms if B is None else B))
        self.kind = rows.device, rows.dtype, packed, a_dtype, b_dtype, max(16, 1 << (r - 1).bit_length() if r else 0)
        self.shape, self.scratch = (m, n), (r * n + 7) // 8 * 8
        self.fields = [rows.data_ptr(), m, n, down, right, 0, 0 if sums is None else sums.data_ptr(), r]
        self.fields += (A.data_ptr(), *A.stride(), B.data_ptr(), *B.stride()) if r else (0, 0, 0, 0, 0, 0)
        self.fields += (0, *struct.unpack("i", struct.pack("f", scaling)), draw.index, draw.part)
        self.fields.append(0 if norms is None else norms.data_ptr())


class Launch:
    """Layers alike in device, dtypes and alignment, and their table on the device."""

    def __init__(self, device, dtype, packed: bool, a_dtype, b_dtype, rank: int, members: "list[Layer]"):
        self.device, self.dtype, self.rank, self.a_dtype = device, dtype, rank, DTYPES[a_dtype]
        self.packed, self.b_dtype = packed, DTYPES[b_dtype]
        table, shapes, offset, self.scratch = array.array("q"), [], 0, 0
        for layer in members:
            fields = layer.fields.copy()
            fields[STDS.value], fields[SCRATCH.value] = offset, self.scratch
            table.extend(fields)
            shapes.append(layer.shape)
            offset, self.scratch = offset + layer.shape[0], self.scratch + layer.scratch
        self.layers = _upload(table, device)
        self.tiles = _tiles(tuple(shapes), ROWS, SPAN.value, device)
        self.norm_tiles = _tiles(tuple(shapes), NORM_ROWS, None, device)
        self.stds = torch.empty(offset, dtype=torch.float32, device=device)
        self.std_of = self.stds.unsqueeze(1).split([m for m, _ in shapes])

    def fill(self, draws: "list[Draw]") -> None:
        """The stds: those given, or else found here."""
        find = False
        for draw, std in zip(draws, self.std_of):
            if draw.std is None:
                find, draw.std = True, std
            elif draw.std is not std:
                std.copy_(draw.std)
        if not find:
            return
        device, dtype, rank = self.device, DTYPES[self.dtype], self.rank
        prepare_depth, depth = PREPARE_DEPTH * 16 // rank, max(32, NORM_DEPTH * 16 // rank)
        scratch = torch.empty(max(self.scratch, 1), dtype=self.dtype, device=device)
        grams = torch.empty(len(draws), rank, rank, device=device)
        kinds = self.packed, dtype, self.b_dtype, rank, NORM_ROWS, depth, APPROX
        with _on(device):
            kernels.prepare[(len(draws),)](
                self.layers, scratch, grams, dtype, self.a_dtype, rank, prepare_depth, APPROX, num_stages=PREPARE_STAGES
            )
            kernels.norms[(len(self.norm_tiles),)](
                self.layers, self.norm_tiles, self.stds, scratch, grams, draws[0].sigma, *kinds,
                num_warps=NORM_WARPS, num_stages=NORM_STAGES,
            )  # fmt: skip

    def move(self, draws: "list[Draw]", how: int) -> None:
        sigma, key = draws[0].sigma, draws[0].step_key
        below = math.frexp(sigma)[1] - 1 + grid_bits(sigma, self.dtype)
        with _on(self.device):
            kernels.move[(len(self.tiles),)](
                self.layers, self.tiles, self.stds, _delta_table(self.device), below, *map(noise.signed, key),
                how, self.packed, DTYPES[self.dtype], ROWS, PAIRS, APPROX,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        _count_write([draw.weight for draw in draws])


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _upload(table: "array.array[int]", device: torch.device) -> Tensor:
    host = torch.frombuffer(table, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host  # a plain copy would wait


@functools.lru_cache(maxsize=64)
def _tiles(shapes: "tuple[tuple[int, int], ...]", rows: int, span: "int | None", device: torch.device) -> Tensor:
    """(layer, first row, first pair) of each program, for ``rows`` rows by ``span`` pairs each, or by whole rows."""
    tiles = [
        torch.cartesian_prod(
            torch.tensor([layer]), torch.arange(0, m, rows), torch.arange(0, (n + 1) // 2 if span else 1, span or 1)
        )
        for layer, (m, n) in enumerate(shapes)
    ]
    return torch.cat(tiles).int().to(device)


def _count_write(weights: "list[Tensor]") -> None:
    # a kernel's writes do not move the version counters, by which autograd knows that W changed
    if COUNTS_LISTS:
        torch.autograd.graph.increment_version(weights)
    else:
        for weight in weights:
            torch.autograd.graph.increment_version(weight)
