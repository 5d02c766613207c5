"""The three ways to put noise on a list of weights and to take it off again.

Each is a function of the draws that perturbs the weights in place and returns the function that restores them. A faster
way, or one for quantised weights, is another such function.
"""

import functools
from collections.abc import Callable

import torch

from . import noise, reversible
from .draw import Draw
from .scale import fill_std
from .scratch import Scratch

FUSED_ON = {"cuda"}  # device types


@functools.cache
def _fused():
    try:
        from . import fused
    except ImportError:  # no Triton, or too old a one
        return None
    return fused


TOGGLE, ADD, SUBTRACT = 0, 1, -1


def _mover(draws: "list[Draw]") -> "Callable[[int], None]":
    """A function that moves all weights in place, one of the three ways; by the kernels what they take."""
    taken, others = [], []
    for draw in draws:
        fused = _fused() if draw.weight.device.type in FUSED_ON else None
        (taken if fused and fused.takes(draw) else others).append(draw)
    if others or draws[0].noise != "filter":
        fill_std(draws)
    move_fused = _fused().fuse(taken) if taken else None
    grids = []

    def move(how: int) -> None:
        if move_fused:
            move_fused(how)
        scratch = Scratch()
        if how == TOGGLE and not grids:
            grids.extend(d.std is not None and reversible.grid(d.std, d.sigma, d.rows.dtype) for d in others)
        for index, draw in enumerate(others):
            if how != TOGGLE:
                _add_(draw, how, scratch)
            elif draw.noise == "element":
                reversible.toggle_elements_(draw.rows, draw.sigma, draw.key)
            else:
                reversible.toggle_(draw.rows, grids[index], draw.key, scratch)

    return move


def _add_(draw: Draw, sign: int, scratch: Scratch) -> None:
    """W + noise or W - noise, plainly rounded."""
    rows, (m, n), device = draw.rows, draw.rows.shape, draw.rows.device
    work = torch.promote_types(rows.dtype, torch.float32)
    keys = noise.row_keys(draw.key, m, device)
    for here in reversible.chunks(m, n, device):
        top, left = here
        w = scratch("w", rows[here].shape, work, device).copy_(rows[here])
        z = noise.normals((keys[0][top], keys[1][top]), left.start, w.shape[1], scratch).to(work)
        if draw.std is None:  # noise="element"
            std = w.abs().mul_(draw.sigma)
        else:
            std = draw.std.expand(m, -1)[here if draw.std.shape[1] > 1 else top]
        rows[here].copy_(w.add_(z.mul_(std), alpha=sign))


def reversible_(draws: "list[Draw]") -> Callable[[], None]:
    move = _mover(draws)
    move(TOGGLE)
    return lambda: move(TOGGLE)


def copy_(draws: "list[Draw]") -> Callable[[], None]:
    move = _mover(draws)
    clean = [draw.rows.clone() for draw in draws]
    move(ADD)
    return lambda: torch._foreach_copy_([draw.rows for draw in draws], clean)


def subtract_(draws: "list[Draw]") -> Callable[[], None]:
    """The official code's way: add, then subtract the same noise. Rounding leaves a drift; for comparison."""
    move = _mover(draws)
    for draw in draws:
        if draw.std is None:  # sigma |w| elementwise, and |w| is gone once w has moved
            draw.std = draw.rows.to(torch.promote_types(draw.rows.dtype, torch.float32)).abs().mul_(draw.sigma)
    move(ADD)
    return lambda: move(SUBTRACT)


RESTORES = {"reversible": reversible_, "copy": copy_, "subtract": subtract_}
