"""The three ways to put noise on a list of weights and to take it off again.

Each is a function of the draws that perturbs the weights in place and returns the function that restores them. A faster
way, or one for quantised weights, is another such function.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reversible
from .reversible import chunk_size
from .scale import fill_std
from .scratch import Scratch


@dataclass
class Draw:
    """One weight's noise for one step. ``rows``: its 2-D view; ``std``: set by :func:`flatopt.scale.fill_std`."""

    target: object
    rows: Tensor
    key: "tuple[int, int]"
    sigma: float
    noise: str
    std: Tensor | None = None


FUSED_ON = {"cuda"}  # device types


@functools.cache
def _kernels():
    try:
        from . import kernels
    except ImportError:  # no Triton
        return None
    return kernels


def reversible_(draws: "list[Draw]") -> Callable[[], None]:
    kernels = _kernels() if any(draw.rows.device.type in FUSED_ON for draw in draws) else None
    fused, others = [], []
    for draw in draws:
        (fused if kernels and draw.rows.device.type in FUSED_ON and kernels.takes(draw) else others).append(draw)
    if others or draws[0].noise != "filter":
        fill_std(draws)
    toggle_fused = kernels.fuse(fused) if fused else None
    grids = [draw.std is not None and reversible.grid(draw.std, draw.sigma, draw.rows.dtype) for draw in others]

    def toggle() -> None:
        if toggle_fused:
            toggle_fused()
        scratch = Scratch()
        for draw, grid in zip(others, grids):
            if draw.noise == "element":
                reversible.toggle_elements_(draw.rows, draw.sigma, draw.key)
            else:
                reversible.toggle_(draw.rows, grid, draw.key, scratch)

    toggle()
    return toggle


def copy_(draws: "list[Draw]") -> Callable[[], None]:
    fill_std(draws)
    clean = [draw.rows.clone() for draw in draws]
    for draw in draws:
        _add_gaussian_(draw, 1)

    def restore() -> None:
        for draw, rows in zip(draws, clean):
            draw.rows.copy_(rows)

    return restore


def subtract_(draws: "list[Draw]") -> Callable[[], None]:
    """The official code's way: add, then subtract the same noise. Rounding leaves a drift; for comparison."""
    fill_std(draws)
    # |w| is gone once w has moved
    scales = [draw.rows.abs() if draw.noise == "element" else None for draw in draws]
    for draw, scale in zip(draws, scales):
        _add_gaussian_(draw, 1, scale)

    def restore() -> None:
        for draw, scale in zip(draws, scales):
            _add_gaussian_(draw, -1, scale)

    return restore


def _add_gaussian_(draw: Draw, sign: int, scale: Tensor | None = None) -> None:
    rows = draw.rows
    generator = torch.Generator(rows.device).manual_seed((draw.key[0] << 31) ^ draw.key[1])
    work = torch.promote_types(rows.dtype, torch.float32)
    tall = max(1, chunk_size(rows.device) // rows.shape[1])
    for top in range(0, rows.shape[0], tall):
        w = rows[top : top + tall]
        z = torch.empty(w.shape, dtype=work, device=w.device).normal_(generator=generator)
        if draw.std is None:
            std = (w if scale is None else scale[top : top + tall]).to(work).abs() * draw.sigma
        else:
            std = draw.std.expand(rows.shape[0], 1)[top : top + tall]
        w.copy_((w + z.mul_(std)) if sign > 0 else (w - z.mul_(std)))


RESTORES = {"reversible": reversible_, "copy": copy_, "subtract": subtract_}
