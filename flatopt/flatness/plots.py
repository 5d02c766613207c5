"""Pictures of the measurements, as matplotlib figures: ``figure.savefig(path)`` writes them, notebooks show them.

Matplotlib is imported when a function is called, and its global state (pyplot) is left alone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy

from .landscape import Curve, Surface
from .range_test import RangeTest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(panels: "Mapping[str, Mapping[str, Curve]]") -> "Figure":
    """Loss curves, a panel for each title and in it a line for each label.

    As in Figure 6 of arXiv 2409.14396: ``{"r = 1": {"LoRA": curve, "Flat-LoRA": curve}, "r = 16": {...}}``.
    """
    _demand_panels(panels, "curve")
    figure = _figure(4.2 * len(panels), 3.4)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items()):
        for label, curve in curves.items():
            ax.plot(curve.position, curve.loss, marker=".", label=label)
        ax.set(title=title, xlabel="distance from W′, in row norms")
        ax.legend()
    axes[0].set_ylabel("loss")
    return figure


def plot_contours(panels: "Mapping[str, Mapping[str, Surface]]", levels: int = 12) -> "Figure":
    """Loss surfaces as filled contours: a row for each title, a column for each label, one colour scale for all."""
    _demand_panels(panels, "surface")
    figure, rows = _figure(3.6 * _columns(panels), 3.2 * len(panels)), list(panels.items())
    axes = figure.subplots(len(rows), _columns(panels), sharex=True, sharey=True, squeeze=False)
    low, high = _range(panels)
    # close together near the minimum, where the models differ
    heights = low + (high - low or 1.0) * numpy.linspace(0, 1, levels + 1) ** 2
    for row, (title, surfaces) in zip(axes, rows):
        for ax, (label, surface) in zip(row, surfaces.items()):
            drawn = ax.contourf(surface.position, surface.position, surface.loss, levels=heights, cmap="viridis")
            ax.contour(drawn, colors="white", linewidths=0.4)
            ax.set(title=f"{label}, {title}", aspect="equal")
    figure.colorbar(drawn, ax=axes, label="loss")
    return figure


def plot_surfaces(panels: "Mapping[str, Mapping[str, Surface]]") -> "Figure":
    """The same in three dimensions, with one scale of the loss for all."""
    _demand_panels(panels, "surface")
    figure, rows = _figure(4.2 * _columns(panels), 3.8 * len(panels)), list(panels.items())
    axes = figure.subplots(len(rows), _columns(panels), squeeze=False, subplot_kw={"projection": "3d"})
    low, high = _range(panels)
    for row, (title, surfaces) in zip(axes, rows):
        for ax, (label, surface) in zip(row, surfaces.items()):
            x, y = numpy.meshgrid(surface.position, surface.position)
            ax.plot_surface(x, y, surface.loss, cmap="viridis", vmin=low, vmax=high)
            ax.set(title=f"{label}, {title}", zlim=(low, high))
    return figure


def plot_range_test(tests: "Mapping[str, RangeTest] | RangeTest") -> "Figure":
    """The rise of the loss over σ with its standard error, the threshold, and each suggested σ."""
    tests = {"": tests} if isinstance(tests, RangeTest) else tests
    if not (isinstance(tests, Mapping) and tests and all(isinstance(test, RangeTest) for test in tests.values())):
        raise ValueError(f"tests must be a RangeTest, or at least one as {{label: RangeTest}}, got {tests!r:.80}")
    figure = _figure(5, 3.6)
    ax = figure.subplots()
    for label, test in tests.items():
        rise, error = [r.value for r in test.rise], [r.stderr for r in test.rise]
        drawn = ax.errorbar(test.sigmas, rise, yerr=error, marker=".", capsize=2, label=label or None)
        colour = drawn.lines[0].get_color()
        ax.axvline(test.suggested, color=colour, linestyle=":", label=f"suggested σ {test.suggested:.2g}")
        ax.axhline(test.threshold, color="grey", linewidth=0.8)
    ax.set(xlabel="σ", ylabel="rise of the loss, E L(W′ + ε) − L(W′)", xscale="log", yscale="log")
    ax.legend()
    return figure


def _demand_panels(panels: "Mapping[str, Mapping[str, object]]", what: str) -> None:
    if not (isinstance(panels, Mapping) and panels and all(isinstance(p, Mapping) and p for p in panels.values())):
        raise ValueError(
            f"panels must have at least one title with one {what}, as {{title: {{label: {what}}}}}, got {panels!r:.80}"
        )


def _range(panels: "Mapping[str, Mapping[str, Surface]]") -> "tuple[float, float]":
    every = [surface.loss for surfaces in panels.values() for surface in surfaces.values()]
    return min(map(numpy.min, every)), max(map(numpy.max, every))


def _columns(panels: "Mapping[str, Mapping[str, object]]") -> int:
    return max(len(each) for each in panels.values())


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
