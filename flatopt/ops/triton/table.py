"""The table that the kernels read: one row of int64 a weight, its fields named here, for those who write and who read."""

import array
import struct
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...core.arguments import NOISES
from ...core.weight import WeightUpdate, WeightView
from ..norms import rows_of, square_sums

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
MAX_RANK = 64  # beyond it the small matrices of kernels.norms no longer fit shared memory everywhere


class Row(NamedTuple):
    """A weight in the table: addresses in bytes, strides in elements, 0 for what there is not."""

    weight: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int
    std: int  # where its rows' standard deviations begin in the launch's
    square_sums: int
    rank: int
    a: int
    a_row_stride: int
    a_column_stride: int
    b: int
    b_row_stride: int
    b_column_stride: int
    scratch: int  # where the copy of its A begins in the launch's
    scaling: int  # a float32's bits
    name: int  # the weight's number, which names its noise
    first_row: int  # the number of its first row in the whole of a sharded weight
    norms: int  # of the rows, where the adapter fixes them
    mark: int  # its number among the plan's marks; -1: it gets none


def field(name: str) -> tl.constexpr:
    """Where a row has it, for the kernels."""
    return tl.constexpr(Row._fields.index(name))


class Kind(NamedTuple):
    """What one launch must have in common."""

    dtype: torch.dtype
    packed: bool  # rows contiguous and aligned to 16 bytes
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    rank: int  # rounded up to a power of two, 16 at least


class Entry(NamedTuple):
    """A weight's row, the kind of launch it belongs to, and the tensors it points to, which must be kept.

    ``given``: the kernels do not know the update, so what follows from it must be given: standard deviations, or W rounded.
    """

    kind: Kind
    row: Row
    given: bool
    kept: tuple[Tensor, ...]


class _Factors(NamedTuple):
    """What the row norms of W' follow from: W's square sums and at most one pair of factors, or the norms themselves."""

    sums: Tensor | None = None
    B: Tensor | None = None
    A: Tensor | None = None
    scaling: float = 0.0
    norms: Tensor | None = None


def _factors(view: WeightView, update: WeightUpdate, with_sums: bool) -> _Factors | None:
    """None if it takes more than the kernels know."""
    rows = rows_of(view)
    if update.row_norm is not None:
        norms = update.row_norm.detach()
        known = norms.dtype in DTYPES and norms.device == rows.device
        return _Factors(norms=norms.contiguous()) if known else None
    if update.dense is not None or update.alpha is not None or len(update.factors) > 1:
        return None
    if update.factors:
        B, A, scaling = update.factors[0]
        if isinstance(scaling, Tensor) or A.shape[0] > MAX_RANK or A.dtype not in DTYPES or B.dtype not in DTYPES:
            return None
        if not A.device == B.device == rows.device:
            return None
        return _Factors(_square_sums(view) if with_sums else None, B, A, scaling)
    return _Factors(_square_sums(view) if with_sums else None)


def _square_sums(view: WeightView) -> Tensor:
    if view.square_sums is None:
        view.square_sums = square_sums(rows_of(view))
    return view.square_sums


def entry(view: WeightView, mark: int, noise: str) -> Entry:
    """A weight as the table has it; for ``noise`` by rows or a format, the kernels shall find what it needs, if they can."""
    rows = rows_of(view)
    by_update = noise == "filter" or noise not in NOISES
    factors = _factors(view, view.update, noise == "filter") if by_update else None
    sums, B, A, scaling, norms = factors or _Factors()
    (m, n), (down, right) = rows.shape, rows.stride()
    r = 0 if A is None else A.shape[0]
    a_dtype = torch.float32 if A is None else A.dtype
    b_dtype = norms.dtype if norms is not None else torch.float32 if B is None else B.dtype
    packed = right == 1 and (n | down) % 8 == 0 and rows.data_ptr() % 16 == 0
    row = Row(
        rows.data_ptr(),
        m,
        n,
        down,
        right,
        0,
        0 if sums is None else sums.data_ptr(),
        r,
        *_matrix(A),
        *_matrix(B),
        0,
        int(struct.unpack("i", struct.pack("f", scaling))[0]),
        view.index,
        view.first_row,
        0 if norms is None else norms.data_ptr(),
        -1 if view.weight.rebuilt else mark,
    )
    kind = Kind(rows.dtype, packed, a_dtype, b_dtype, max(16, 1 << (r - 1).bit_length() if r else 0))
    return Entry(kind, row, factors is None, tuple(t for t in (sums, B, A, norms) if t is not None))


def _matrix(factor: Tensor | None) -> tuple[int, int, int]:
    """Where a factor is, and its strides."""
    if factor is None or factor.numel() == 0:
        return 0, 0, 0
    return factor.data_ptr(), factor.stride(0), factor.stride(1)


def upload(rows: Iterable[Row], device: torch.device) -> Tensor:
    """The table on the device; the host does not wait for it."""
    table = array.array("q")
    for row in rows:
        table.extend(row)
    host = torch.frombuffer(table, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()
