"""One weight's noise, and what is kept of the weight from step to step.

Between two steps anyone may replace, move, merge or write to a weight, so every step looks. What it sees again it does not
work out again: on a small model that would take longer than the noise.
"""

from torch import Tensor

from .noise import sub_key
from .scale import weight_square_sums
from .sharding import local, shard_index
from .targets import Target


class Draw:
    """The noise on ``target``, the ``index``-th of its optimizer.

    From :meth:`look` until the window lets go, ``weight`` is the weight without autograd, but with its version counter, so
    that a graph that saved it notices. ``version``: its version when flatopt last wrote to it. ``std``: set by
    :func:`flatopt.scale.fill_std` or :mod:`flatopt.fused`, which keeps ``layer`` and ``launches`` here.
    """

    def __init__(self, target: Target, index: int):
        self.target, self.index, self.part = target, index, 0
        self.parameter = self.weight = self.version = self.std = self.layer = self.launches = None
        self.step_key, self.sigma, self.noise = None, 0.0, "filter"
        self._seen = self._square_sums = None

    def look(self) -> None:
        """Look the weight up; raise unless it can be perturbed now."""
        parameter = self.target.parameter
        if self._seen is None or self._seen[0] != id(parameter):
            self.target.check()  # before anything is asked of what may be no tensor, or a quantised one
        weight = local(parameter.detach())
        allowed = parameter.requires_grad, getattr(self.target.layer, "merged", False) is True
        seen = id(parameter), weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), *allowed
        if seen != self._seen or weight._version != self.version:
            self._seen = self._square_sums = self.layer = None
            self.target.check()
            self._seen, self.part, self.version = seen, shard_index(parameter), weight._version
        self.parameter, self.weight = parameter, weight

    @property
    def rows(self) -> Tensor:
        """The weight as a 2-D view, rows = outputs, columns = fan-in."""
        return self.target.rows_of(self.weight)

    @property
    def key(self) -> "tuple[int, int]":
        """64 bits that name this noise: of the step, the target, and this rank's part of a sharded weight."""
        key = sub_key(self.step_key, self.index)
        return sub_key(key, self.part) if self.part else key

    def square_sums(self, rows: Tensor) -> Tensor:
        """Row sums of squares of W alone, kept as long as nobody but flatopt changes W."""
        if self._square_sums is None:
            self._square_sums = weight_square_sums(rows)
        return self._square_sums
