"""The noise by torch's own operations, on any device and for every dtype and kind of noise."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from ..core.arguments import NOISES
from ..core.weight import WeightView
from .fingerprint import Flags, checksum
from .noise import Key, normals_of_rows, row_keys, weight_key
from .norms import rows_of, standard_deviations
from .reversible import BITS, Grid, grid, toggled, toggled_elements
from .rounding import to_rounded, whole_weight_needed
from .scratch import Scratch

CHUNK = 1 << 18  # elements worked on at a time on a CPU: the temporaries stay in cache, and small


def chunks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix to work on at a time."""
    size = CHUNK if device.type == "cpu" else CHUNK << 3  # elsewhere the number of launches counts
    tall, wide = max(1, size // max(columns, 1)), max(1, min(columns, size))
    for top in range(0, rows, tall):
        for left in range(0, columns, wide):
            yield slice(top, min(top + tall, rows)), slice(left, min(left + wide, columns))


class Piece(NamedTuple):
    """A part of a weight: it is clean or perturbed as a whole."""

    number: int  # of the weight in the plan
    top: slice
    left: slice


class Write(NamedTuple):
    """A write to W, complete in itself: done twice it is done once."""

    target: Tensor
    bits: Tensor
    then: int  # how many pieces are perturbed after it


class Journal(NamedTuple):
    """How far a plan is: its first ``perturbed`` pieces are perturbed, but for the ``write``, which may have run or not."""

    perturbed: int = 0
    write: Write | None = None


class Sums(NamedTuple):
    """Checksums of a piece: numbers on a CPU, tensors on another device, where reading them would make the host wait."""

    clean: "int | Tensor"
    perturbed: "int | Tensor"


class TorchBackend:
    name = "torch"

    def supports(self, view: WeightView, noise: str) -> str | None:
        dtype = rows_of(view).dtype
        if noise not in NOISES and (reason := whole_weight_needed(view, noise)):
            return reason
        return None if dtype in BITS else f"{dtype} is not fp32, bf16, fp16 or fp64"

    def plan(self, views: list[WeightView], noise: str, restore: str, group: Sequence[WeightView]) -> "TorchPlan":
        return TorchPlan(views, noise, restore, group)


class TorchPlan:
    """See :class:`flatopt.ops.backend.Plan`.

    W changes in one place, :meth:`_write`, whose new bits are complete, in memory of their own, before it begins. So an
    exception before, in or after any operation leaves a journal that says what to do again.
    """

    def __init__(self, views: list[WeightView], noise: str, restore: str, group: Sequence[WeightView]):
        self.views, self._noise, self._restore, self._group = views, noise, restore, group
        self._device = rows_of(views[0]).device
        self._journal = Journal()
        self._sigma = 0.0
        self._key: Key = (0, 0)
        self._stds: list[Tensor] = []  # of each weight; of each element where they are sigma |w|, and |w| will be gone
        self._grids: list[Grid] = []
        self._pieces: list[Piece] = []
        self._sums: list[Sums | None] = []
        self._clean: list[Tensor] = []
        self._written: set[int] = set()
        self._flags: Flags | None = None
        self._row_keys: tuple[Key, int, tuple[Tensor, Tensor]] | None = None  # of the weight at work
        self._to_rounded: tuple[int, Tensor] | None = None  # likewise

    def fill_std(self, sigma: float) -> None:
        self._demand_clean("fill_std()")
        shapes = [rows_of(view).shape for view in self.views]
        self._pieces = [
            Piece(number, *part)
            for number, (rows, columns) in enumerate(shapes)
            for part in chunks(rows, columns, self._device)
        ]
        self._sums, self._clean, self._stds, self._grids = [None] * len(self._pieces), [], [], []
        self._sigma = sigma
        if self._noise in NOISES and self._noise != "element":
            self._stds = standard_deviations(self.views, self._noise, sigma, self._group)
        if self._restore == "reversible":
            stds = self._stds or [torch.tensor([[sigma]], dtype=torch.float32, device=self._device)] * len(self.views)
            self._grids = [grid(std, sigma, rows_of(view).dtype) for std, view in zip(stds, self.views)]
        if self._device.type != "cpu" and self._flags is None:
            self._flags = Flags(len(self.views), self._device)

    def perturb(self, key: Key) -> None:
        self._write()
        if key != self._key:
            self._demand_clean("perturbing with another key")
            self._key, self._sums = key, [None] * len(self._pieces)
        self._to_rounded = None  # between a closure's evaluations the adapter moves
        if self._restore == "copy" and not self._clean:
            self._clean = [rows_of(view).clone() for view in self.views]
        if self._restore == "subtract" and not self._stds:
            self._stds = [_wide(rows_of(view)).abs().mul_(self._sigma) for view in self.views]
        scratch = self._scratch()
        for number in range(self._journal.perturbed, len(self._pieces)):
            self._perturb(number, scratch)

    def restore(self) -> None:
        self._write()
        scratch = self._scratch()
        for number in reversed(range(self._journal.perturbed)):
            self._unperturb(number, scratch)
        if self._flags is not None:
            self._flags.send()

    def written(self, wait: bool = False) -> list[WeightView]:
        if self._flags is not None:
            self._written.update(self._flags.read(wait))
        views = [self.views[number] for number in sorted(self._written)]
        self._written.clear()
        return views

    def release(self) -> None:
        self._demand_clean("release()")
        self._stds, self._grids, self._clean, self._row_keys, self._to_rounded = [], [], [], None, None

    def _demand_clean(self, what: str) -> None:
        if self._journal != Journal():
            raise RuntimeError(f"{self.views[0].weight.path} and others are perturbed: call restore() before {what}")

    def _write(self) -> None:
        """Do the write that the journal tells of, if there is one, and strike it out."""
        write = self._journal.write
        if write is not None:
            write.target.copy_(write.bits)
            self._journal = Journal(write.then)

    def _perturb(self, number: int, scratch: Scratch) -> None:
        piece, known = self._pieces[number], self._sums[number]
        target, found = self._look(piece, scratch)
        sum_found = self._sum(found)
        source = found
        if self._restore == "copy":
            source = self._clean[piece.number][piece.top, piece.left]
            if known is not None and not self.views[piece.number].weight.rebuilt:
                new = (sum_found != known.clean) & (sum_found != known.perturbed)  # W was written to while it was clean
                source.copy_(_choose(new, found, source))
        perturbed = self._moved(source, piece, 1, scratch)
        sums = Sums(sum_found, self._sum(perturbed))
        if known is not None:
            # where nothing moved, clean bits are no sign of it: a closure's adapter may have moved since
            again = (sum_found == known.perturbed) & (known.perturbed != known.clean)
            perturbed = _choose(again, found, perturbed)
            sums = Sums(_choose(again, known.clean, sums.clean), _choose(again, known.perturbed, sums.perturbed))
        self._sums[number] = sums
        self._journal = Journal(number, Write(target, perturbed, number + 1))
        self._write()

    def _unperturb(self, number: int, scratch: Scratch) -> None:
        piece, known = self._pieces[number], self._sums[number]
        assert known is not None  # since it was perturbed
        target, found = self._look(piece, scratch)
        sum_found = self._sum(found)
        ours, foreign = sum_found == known.perturbed, (sum_found != known.perturbed) & (sum_found != known.clean)
        if self._restore == "copy":
            clean = self._clean[piece.number][piece.top, piece.left]
            if not self.views[piece.number].weight.rebuilt:
                self._tell(piece.number, foreign)
        else:
            clean = self._moved(found, piece, -1, scratch)
            self._tell(piece.number, foreign)
            if self._restore == "reversible":
                self._tell(piece.number, ours & (self._sum(clean) != known.clean))
            clean = _choose(ours, clean, found)
        self._journal = Journal(number + 1, Write(target, clean, number))
        self._write()

    def _look(self, piece: Piece, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """A piece of W, and its bits: the same memory, or a copy where it is not contiguous."""
        target = rows_of(self.views[piece.number])[piece.top, piece.left]
        if target.is_contiguous():
            return target, target
        return target, scratch("found", target.shape, target.dtype, target.device).copy_(target)

    def _moved(self, bits: Tensor, piece: Piece, sign: int, scratch: Scratch) -> Tensor:
        """The new bits of a piece, in memory of their own: with the noise on them, or (``sign`` -1) off them."""
        number, top, left = piece
        if self._noise not in NOISES:
            return self._rounded(bits, piece, scratch)
        if self._row_keys is None or self._row_keys[:2] != (self._key, number):
            view = self.views[number]
            keys = row_keys(weight_key(self._key, view.index), rows_of(view).shape[0], self._device, view.first_row)
            self._row_keys = self._key, number, keys
        first, second = self._row_keys[2]
        z = normals_of_rows((first[top], second[top]), left.start, left.stop - left.start, scratch)
        if self._restore != "reversible":
            return self._plus(bits, z, piece, sign, scratch)
        of_rows = self._grids[number].of(top)
        return toggled_elements(bits, z, of_rows) if self._noise == "element" else toggled(bits, z, of_rows, scratch)

    def _plus(self, bits: Tensor, z: Tensor, piece: Piece, sign: int, scratch: Scratch) -> Tensor:
        """W + noise or W - noise, plainly rounded."""
        number, top, left = piece
        work = torch.promote_types(bits.dtype, torch.float32)
        w = scratch("w", bits.shape, work, self._device).copy_(bits)
        if not self._stds:
            std = w.abs().mul_(self._sigma)
        else:
            std = self._stds[number]
            std = std if len(std) == 1 and std.shape[1] == 1 else std[top] if std.shape[1] == 1 else std[top, left]
        w.add_(z.to(work).mul_(std), alpha=sign)
        return w if work == bits.dtype else scratch("rounded", bits.shape, bits.dtype, self._device).copy_(w)

    def _rounded(self, bits: Tensor, piece: Piece, scratch: Scratch) -> Tensor:
        """W, sigma of the way to where the merged weight is the rounded one."""
        number, top, left = piece
        if self._to_rounded is None or self._to_rounded[0] != number:
            self._to_rounded = number, to_rounded(self.views[number], self._clean[number], self._noise)
        work = torch.promote_types(bits.dtype, torch.float32)
        w = scratch("w", bits.shape, work, self._device).copy_(bits).add_(self._to_rounded[1][top, left], alpha=self._sigma)
        return w if work == bits.dtype else scratch("rounded", bits.shape, bits.dtype, self._device).copy_(w)

    def _sum(self, bits: Tensor) -> "int | Tensor":
        total = checksum(bits)
        return total if self._flags is not None else int(total.item())

    def _tell(self, number: int, marked: "bool | Tensor") -> None:
        if isinstance(marked, Tensor):
            assert self._flags is not None
            self._flags.set[number].bitwise_or_(marked)
        elif marked:
            self._written.add(number)

    def _scratch(self) -> Scratch:
        sizes = ((p.top.stop - p.top.start) * (p.left.stop - p.left.start + 1) for p in self._pieces)
        return Scratch(max(sizes, default=0))


@overload
def _choose(first: "bool | Tensor", a: Tensor, b: Tensor) -> Tensor: ...
@overload
def _choose(first: "bool | Tensor", a: "int | Tensor", b: "int | Tensor") -> "int | Tensor": ...
def _choose(first: "bool | Tensor", a: "int | Tensor", b: "int | Tensor") -> "int | Tensor":
    """``a`` or ``b``; where the host does not know ``first``, a tensor that is one of them."""
    if isinstance(first, Tensor):
        return torch.where(first, a, b)
    return a if first else b


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
