"""Medians, their spread, and ratios to plain; as text."""

import statistics


def summary(samples: "list[float]") -> dict:
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"median": middle, "spread": (high - low) / 2, "repeats": len(samples)}


def over_plain(own: "list[list[float]]", plain: "list[list[float]]") -> dict:
    """Ratios of a method's turns to plain's; each stands between two of plain, so that what drifts hits both alike."""
    turns = zip(own, plain, plain[1:])
    return summary([statistics.median(turn) / statistics.median(before + after) for turn, before, after in turns])


def shown_cell(value: "dict | None", digits: int = 2, scale: float = 1) -> str:
    """A :func:`summary`, or nothing where there is none."""
    return "" if value is None else f"{scale * value['median']:.{digits}f} ± {scale * value['spread']:.{digits}f}"
