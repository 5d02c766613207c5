"""What is asked for: everything that decides the noise of one step."""

from typing import NamedTuple

from ..ops import step_key


class NoiseRequest(NamedTuple):
    r"""One draw of a step's noise: every weight's :math:`\varepsilon` follows from this and its place in the groups.

    ``sigmas``: :math:`\sigma_t` of each group, the schedule's factor in it. ``rank``: the data-parallel rank, 0 where all
    ranks share one noise. ``draw``: its number within the step.
    """

    seed: int
    step: int
    rank: int
    sigmas: tuple[float, ...]
    draw: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """64 bits that name the draw."""
        return step_key(self.seed, self.step, self.rank, self.draw)
