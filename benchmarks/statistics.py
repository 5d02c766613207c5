"""Paired differences over seeds: their t-interval and t-test, and Holm's adjustment over the rows of a table."""

import math

import numpy as np
from scipy import stats

LEVEL = 0.95


def paired(differences: np.ndarray) -> "tuple[float, float, float]":
    """Mean, half-width of its 95 % t-interval, and the two-sided p-value of the paired t-test, over the last axis."""
    n, mean, spread = len(differences), differences.mean(), differences.std(ddof=1)
    if spread == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0
    error = spread / math.sqrt(n)
    return mean, stats.t.ppf((1 + LEVEL) / 2, n - 1) * error, 2 * stats.t.sf(abs(mean) / error, n - 1)


def holm(p_values: "list[float]") -> "list[float]":
    """p-values adjusted for the family-wise error (Holm, Scandinavian Journal of Statistics 1979)."""
    order, adjusted, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
