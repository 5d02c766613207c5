"""Who puts the noise on a group of weights and takes it off: backends, and the plans they make.

A backend says which weights it takes (:meth:`Backend.supports`); :func:`plan` asks them in the order of ``BACKENDS`` and
gives each weight to the first that does. Another way to perturb is another class like them, put into ``BACKENDS``.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from ..core.weight import WeightView
from .noise import Key
from .norms import rows_of
from .torch_backend import TorchBackend
from .triton import TritonBackend

RESTORES = ("reversible", "copy", "subtract")


class Plan(Protocol):
    """The weights of one group that one backend takes on one device: every piece of them is either clean or perturbed.

    A step is ``fill_std(sigma)``, ``perturb(key)``, ``restore()``, ``written()``, ``release()``. The first three are called
    inside :func:`~flatopt.ops.writing` and need the views' ``tensor`` and ``rows``; a weight of another shape, strides,
    dtype or device than before needs another plan.
    An exception, wherever it comes from, loses nothing: the next ``perturb`` or ``restore`` goes on from where it was.
    """

    views: list[WeightView]

    def fill_std(self, sigma: float) -> None:
        """Find the noise's standard deviations from the views' ``update`` and ``square_sums``. Once a step, W clean.

        Memory is allocated here or before the first write. RuntimeError where a weight is perturbed.
        """

    def perturb(self, key: Key) -> None:
        """Bring every piece to perturbed; :func:`~flatopt.ops.step_key` makes ``key``.

        What has the perturbed bits of this key already (somebody put them back) is left as it is.
        """

    def restore(self) -> None:
        """Bring every piece back to clean; nothing to do where it is.

        A piece whose bits are not what :meth:`perturb` left keeps them, and its weight is told by :meth:`written`; but
        ``restore="copy"`` puts the clean bits back all the same. A piece that has its clean bits already is clean.
        """

    def written(self, wait: bool = False) -> list[WeightView]:
        """Weights that ``restore`` found with other bits than ``perturb`` left, or that did not come back; each told once.

        Known at once on a CPU. On a GPU the comparison is made there: without ``wait``, what is known by now.
        """

    def release(self) -> None:
        """Keep nothing that refers to W's memory, nor the standard deviations. RuntimeError where a weight is perturbed."""


class Backend(Protocol):
    """A way to perturb weights in place."""

    name: str

    def supports(self, view: WeightView, noise: str) -> str | None:
        """None, or the reason why this backend does not take the weight."""

    def plan(self, views: list[WeightView], noise: str, restore: str, group: Sequence[WeightView]) -> Plan:
        """A plan for ``views``, all on one device; ``group``: all that share one scale where ``noise`` is isotropic."""


BACKENDS: list[Backend] = [TritonBackend(), TorchBackend()]


def plan(views: list[WeightView], noise: str, restore: str) -> list[Plan]:
    """Plans for the weights of one group, each by the first backend that takes it.

    ``noise``: ``"filter"``, ``"layer"``, ``"isotropic"``, ``"element"`` or a format, as ``"int4/32"``. ``restore``:
    ``"reversible"``, ``"copy"`` or ``"subtract"``. ValueError, with each backend's reason, for a weight that none takes.
    """
    shares: dict[tuple[int, torch.device], list[WeightView]] = {}
    for view in views:
        reasons = []
        for number, backend in enumerate(BACKENDS):
            reason = backend.supports(view, noise)
            if reason is None:
                shares.setdefault((number, rows_of(view).device), []).append(view)
                break
            reasons.append(f"{backend.name}: {reason}")
        else:
            raise ValueError(f"{view.weight.path} cannot be perturbed ({'; '.join(reasons)})")
    return [BACKENDS[number].plan(some, noise, restore, views) for (number, _), some in shares.items()]
