"""The kernels from Python: a plan's launches and their table, kept while nothing in it changes."""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.language import constexpr

from ...core.arguments import NOISES
from ...core.weight import WeightView
from ..fingerprint import Flags
from ..noise import Key, signed
from ..norms import rows_of, standard_deviations
from ..reversible import delta_table, grid_bits
from ..rounding import KERNEL_GROUPS, Format, format_named, nf4_levels, refuse_rescaled, to_rounded
from . import kernels, rounding
from .kernels import ADD, APPROX, PERTURB, PERTURBED, READ, RESTORE, RESUME, SPAN, SUBTRACT, TOGGLE
from .table import DTYPES, Entry, Kind, Row, entry, upload

# What an H200 likes best, for rounding an H100 (benchmarks/LOG.md). Whatever stands here, the noise is the same, up to the
# last bits of the stds.
ROWS, PAIRS, WARPS = 8, 64, 4
PREPARE_DEPTH, PREPARE_STAGES = 256, 1
NORM_ROWS, NORM_DEPTH, NORM_WARPS, NORM_STAGES = 64, 64, 4, 4
ROUND_SIZE, ROUND_COLUMNS, ROUND_WARPS = 2048, 512, 4
ROUNDINGS = {"int": rounding.SYMMETRIC, "uint": rounding.ASYMMETRIC, "nf4": rounding.NORMAL_FLOAT}
SCRATCH_KEPT = 1 << 23  # bytes
CALLS_COMPILED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)  # before, constants were left out of the call
COUNTS_LISTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


class TritonPlan:
    """See :class:`flatopt.ops.backend.Plan`.

    One launch perturbs all weights alike in dtypes and alignment. It runs as a whole or not at all, and may be done again:
    by the sums that perturbing left, the kernel knows what it finds (``kernels.move``).
    """

    def __init__(self, views: list[WeightView], noise: str, restore: str, group: Sequence[WeightView]):
        self.views, self._noise, self._restore, self._group = views, noise, restore, group
        self._device = rows_of(views[0]).device
        self._seen = Seen([], [], [])
        self._entries: list[Entry] = []
        self._launches: list[Launch] = []
        self._stds: list[Tensor] = []  # of each weight (rows, 1)
        self._marks = Flags(len(views), self._device, on_host=True)
        self._journal = ALL_CLEAN
        self._sigma = 0.0
        self._key: Key | None = None  # of the sums that the launches hold
        self._clean: list[Tensor] = []
        self._tensors: list[Tensor] = []  # the weights, amid a step
        self._format = None if noise in NOISES else format_named(noise)

    def fill_std(self, sigma: float) -> None:
        self._demand_clean("fill_std()")
        with _on(self._device):
            self._sigma, self._key, self._clean = sigma, None, []
            self._tensors = [view.tensor for view in self.views if view.tensor is not None]
            self._look()
            if self._format is not None:
                return
            given = [number for number, e in enumerate(self._entries) if e.given]
            if given:
                stds = standard_deviations([self.views[n] for n in given], self._noise, sigma, self._group)
                for number, std in zip(given, stds):
                    self._stds[number].copy_(std)
            for launch in self._launches:
                launch.fill_std(sigma)

    def perturb(self, key: Key) -> None:
        if key != self._key:
            self._demand_clean("perturbing with another key")
        with _on(self._device):
            again = key == self._key
            if self._restore == "copy":
                if self._clean:
                    if self._journal == ALL_CLEAN:
                        self._keep_what_was_written()
                    self._put_copy_back()
                    again = False
                else:
                    self._clean = [rows_of(view).clone() for view in self.views]
            if self._format is not None:
                self._look()  # between a closure's evaluations the adapter moves
            self._key = key
            _count_writes(self._tensors)
            while self._journal.perturbed < len(self._launches):
                self._perturb_next(again or self._journal.in_doubt)

    def restore(self) -> None:
        if self._journal == ALL_CLEAN:
            return
        with _on(self._device):
            _count_writes(self._tensors)
            if self._restore == "copy":
                self._put_copy_back()
            else:
                if self._journal.in_doubt:
                    self._perturb_next(True)
                how = TOGGLE if self._restore == "reversible" else SUBTRACT
                for number in reversed(range(self._journal.perturbed)):
                    self._journal = Journal(number, in_doubt=True)
                    self._move(self._launches[number], how, RESTORE)
                    self._journal = Journal(number)
            self._marks.send()

    def written(self, wait: bool = False) -> list[WeightView]:
        return [self.views[number] for number in self._marks.read(wait)]

    def release(self) -> None:
        self._demand_clean("release()")
        self._clean, self._tensors = [], []

    def _demand_clean(self, what: str) -> None:
        if self._journal != ALL_CLEAN:
            raise RuntimeError(f"{self.views[0].weight.path} and others are perturbed: call restore() before {what}")

    def _perturb_next(self, again: bool) -> None:
        number, how = self._journal.perturbed, TOGGLE if self._restore == "reversible" else ADD
        self._journal = Journal(number, in_doubt=True)
        if self._format is None:
            self._move(self._launches[number], how, RESUME if again else PERTURB)
        else:
            self._round(self._launches[number])
        self._journal = Journal(number + 1)

    def _round(self, launch: "Launch") -> None:
        self._move(launch, READ, PERTURB)
        if launch.finds:
            launch.round(self._sigma)
        else:
            for number in launch.numbers:
                clean = self._clean[number]
                offset = to_rounded(self.views[number], clean, self._noise)
                rows_of(self.views[number]).copy_(offset.mul_(self._sigma).add_(clean))
        self._move(launch, READ, PERTURBED)

    def _move(self, launch: "Launch", how: constexpr, stage: constexpr) -> None:
        assert self._key is not None
        launch.move(how, stage, self._key, self._sigma, self._marks.set)

    def _keep_what_was_written(self) -> None:
        """To W while it was clean (a checkpoint that was loaded): that is its clean value now."""
        assert self._key is not None
        foreign = torch.zeros(len(self.views), dtype=torch.int32, device=self._device)
        for launch in self._launches:
            launch.move(READ, RESTORE, self._key, self._sigma, foreign)
        for view, clean, new in zip(self.views, self._clean, foreign.bool().unbind()):
            clean.copy_(torch.where(new, rows_of(view), clean))

    def _put_copy_back(self) -> None:
        for launch in self._launches[: self._journal.perturbed]:
            self._move(launch, READ, RESTORE)
        torch._foreach_copy_([rows_of(view) for view in self.views], self._clean)
        self._journal = ALL_CLEAN

    def _look(self) -> None:
        """Follow the weights and updates where they changed; the table goes to the device if something in it did."""
        if self._seen.is_of(self.views, self._tensors):
            return
        if self._format is not None:
            for view in self.views:
                refuse_rescaled(view, self._noise)
        entries = [entry(view, number, self._noise) for number, view in enumerate(self.views)]
        if [e[:3] for e in entries] != [e[:3] for e in self._entries]:
            by_kind: dict[tuple[Kind, bool], list[int]] = {}
            for number, e in enumerate(entries):
                by_kind.setdefault((e.kind, e.given and self._format is not None), []).append(number)
            self._launches = [
                Launch(self._device, kind, {n: entries[n] for n in some}, self._format)
                for (kind, _), some in by_kind.items()
            ]
            stds = {n: std for launch, some in zip(self._launches, by_kind.values()) for n, std in zip(some, launch.stds_of)}
            self._stds = [stds[number] for number in range(len(entries))]
        self._entries, self._seen = entries, Seen.of(self.views, self._tensors)  # the square sums may be new


class Journal(NamedTuple):
    """How far a plan is: its first ``perturbed`` launches' weights are perturbed; the next one's may be, if ``in_doubt``."""

    perturbed: int = 0
    in_doubt: bool = False


ALL_CLEAN = Journal()


class Seen(NamedTuple):
    """What the table was made of."""

    weights: list[int]
    updates: list[object]
    square_sums: list[object]

    @staticmethod
    def of(views: list[WeightView], tensors: list[Tensor]) -> "Seen":
        return Seen([t.data_ptr() for t in tensors], [v.update for v in views], [v.square_sums for v in views])

    def is_of(self, views: list[WeightView], tensors: list[Tensor]) -> bool:
        now = Seen.of(views, tensors)
        return (
            self.weights == now.weights
            and all(map(operator.is_, self.updates, now.updates))
            and all(map(operator.is_, self.square_sums, now.square_sums))
        )


class Launch:
    """Weights alike in dtypes and alignment, and their table on the device."""

    def __init__(self, device: torch.device, kind: Kind, numbered: dict[int, Entry], form: Format | None):
        self.kind, self.numbers, members = kind, list(numbered), list(numbered.values())
        # the scratch: AA^T of every member, float32, and behind them the copies of A
        table, heights, offset, self.scratch = [], [], 0, len(members) * kind.rank**2 * 4 // kind.dtype.itemsize
        for member in members:
            row = member.row
            table.append(row._replace(std=offset, scratch=self.scratch))
            heights.append(row.rows)
            offset, self.scratch = offset + row.rows, self.scratch + (row.rank * row.columns + 7) // 8 * 8
        shapes = tuple((member.row.rows, member.row.columns) for member in members)
        self._scratch: Tensor | None = None  # kept from step to step if it is small
        self.finds = not all(member.given for member in members)
        self.table = upload(table, device)
        self.tiles = _tiles(shapes, ROWS, SPAN.value, device)
        self.norm_tiles = _tiles(shapes, NORM_ROWS, None, device)
        self.stds = torch.zeros(offset, dtype=torch.float32, device=device)
        self.stds_of: tuple[Tensor, ...] = torch.split(self.stds.unsqueeze(1), heights)
        self.sums = torch.zeros(len(self.tiles) * ROWS * 2, dtype=torch.int32, device=device)
        self.whole = kind.packed and all(m % ROWS == 0 and n // 2 % PAIRS == 0 for m, n in shapes)
        # a thread reads 16 bytes at a time: that many words have one total
        self.halvings = 0 if not kind.packed else 1 if kind.dtype == torch.float32 else 2
        if form is not None:
            self._of_round = self._rounding(form, shapes, [member.row for member in members])
        self._of_move = self.table, self.tiles, self.stds, delta_table(device), self.sums
        self._compile()

    def _compile(self) -> None:
        kind, dtype, b_dtype, rank = self.kind, DTYPES[self.kind.dtype], DTYPES[self.kind.b_dtype], self.kind.rank
        prepare_depth, depth = PREPARE_DEPTH * 16 // rank, max(32, NORM_DEPTH * 16 // rank)
        constants: tuple[Any, ...] = dtype, DTYPES[kind.a_dtype], rank, prepare_depth, APPROX
        self._prepare = Kernel(kernels.prepare, len(self.stds_of), constants, num_stages=PREPARE_STAGES)
        constants = kind.packed, dtype, b_dtype, rank, NORM_ROWS, depth, APPROX
        programs, options = len(self.norm_tiles), {"num_warps": NORM_WARPS, "num_stages": NORM_STAGES}
        self._norms = Kernel(kernels.norms, programs, constants, **options)
        constants = kind.packed, self.whole, dtype, ROWS, PAIRS, self.halvings, APPROX
        programs, options = len(self.tiles), {"num_warps": WARPS, "enable_fp_fusion": False}
        hows = (how.value for how in (TOGGLE, ADD, SUBTRACT, READ))
        self._moves = {how: Kernel(kernels.move, programs, (how, *constants), **options) for how in hows}

    def _rounding(
        self, form: Format, shapes: tuple[tuple[int, int], ...], members: list[Row]
    ) -> "tuple[Kernel, Tensor, Tensor]":
        kind, device = self.kind, self.table.device
        # a group that is no such power has all of a row
        group = form.group if form.group is not None and form.group in KERNEL_GROUPS else 0
        columns = max(group, ROUND_COLUMNS)
        rows = ROUND_SIZE // columns
        tiles = _tiles(shapes, rows, None, device)
        # of A: rows contiguous and aligned, as PEFT makes them
        a_packed = all(m.a_column_stride == 1 and m.a_row_stride % 8 == m.a % 16 == 0 for m in members if m.rank)
        constants: tuple[Any, ...] = ROUNDINGS[form.kind].value, form.bits, group, kind.packed, a_packed
        constants += DTYPES[kind.dtype], DTYPES[kind.a_dtype], DTYPES[kind.b_dtype], rows, columns
        kernel = Kernel(rounding.to_rounded, len(tiles), constants, num_warps=ROUND_WARPS, enable_fp_fusion=False)
        return kernel, tiles, nf4_levels(device, torch.float32)

    def round(self, sigma: float) -> None:
        """See ``rounding.to_rounded``."""
        kernel, tiles, levels = self._of_round
        kernel(self.table, tiles, levels, float(sigma))

    def fill_std(self, sigma: float) -> None:
        """Find the standard deviations that are not given."""
        if not self.finds:
            return
        scratch = self._scratch
        if scratch is None:
            scratch = torch.empty(self.scratch, dtype=self.kind.dtype, device=self.stds.device)
            self._scratch = scratch if scratch.nbytes <= SCRATCH_KEPT else None
        self._prepare(self.table, scratch)
        self._norms(self.table, self.norm_tiles, self.stds, scratch, float(sigma))

    def move(self, how: constexpr, stage: constexpr, key: Key, sigma: float, marks: Tensor) -> None:
        """See ``kernels.move``."""
        below = math.frexp(sigma)[1] - 1 + grid_bits(sigma, self.kind.dtype)
        self._moves[how.value](*self._of_move, marks, below, signed(key[0]), signed(key[1]), stage.value)


class Kernel:
    """One launch of a kernel: compiled at the first call, after which only tensors and numbers of the same kinds are given.

    Triton looks at every argument, option and global of each launch, which takes it longer than all else that a step does
    for a dozen weights. The compiled kernel is called without.
    """

    def __init__(self, kernel: Any, programs: int, constants: tuple[Any, ...], **options: Any):
        self._kernel, self._grid, self._constants, self._options = kernel, (programs, 1, 1), constants, options
        self._compiled: Callable[..., None] | None = None
        self._stream: Callable[[], int] | None = None  # the current one

    def __call__(self, *arguments: Any) -> None:
        if self._compiled is not None:
            # of a tensor, the launcher would ask for its address and the driver whether that is on a GPU: by then it is
            given = [a.data_ptr() if type(a) is Tensor else a for a in arguments]
            stream = {} if self._stream is None else {"stream": self._stream()}
            self._compiled(*given, *self._constants, **stream)
            return
        compiled = self._kernel[self._grid](*arguments, *self._constants, **self._options)
        if compiled is not None and CALLS_COMPILED:  # None in Triton's interpreter
            self._compiled, self._stream = compiled[self._grid], _current_stream(arguments[0])


_HERE = contextlib.nullcontext()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _HERE
    return torch.cuda.device(device.index)


def _current_stream(of: Any) -> Callable[[], int] | None:
    """Tells the stream that a launch on a tensor's device is for; Triton's launcher would ask for the device each time."""
    if not (isinstance(of, Tensor) and of.is_cuda):
        return None
    ask = getattr(triton.runtime.driver.active, "get_current_stream", None)
    return ask and functools.partial(ask, of.device.index)


@functools.lru_cache(maxsize=64)
def _tiles(shapes: tuple[tuple[int, int], ...], rows: int, span: int | None, device: torch.device) -> Tensor:
    """(weight, first row, first pair) of each program, for ``rows`` rows by ``span`` pairs each, or by whole rows."""
    tiles = [
        torch.cartesian_prod(
            torch.tensor([number], dtype=torch.int32, device="cpu"),
            torch.arange(0, m, rows, dtype=torch.int32, device="cpu"),
            torch.arange(0, (n + 1) // 2 if span else 1, span or 1, dtype=torch.int32, device="cpu"),
        )
        for number, (m, n) in enumerate(shapes)
    ]
    return torch.cat(tiles).to(device)


def _count_writes(tensors: list[Tensor]) -> None:
    # a kernel's writes do not move the version counters, by which autograd knows that W changed
    if COUNTS_LISTS:
        torch.autograd.graph.increment_version(tensors)
    else:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)
