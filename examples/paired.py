"""The table every example ends with: plain and flat side by side, and what their difference is worth."""

import statistics

import rich.console
import rich.table
import scipy.stats


def show(title: str, runs: "list[dict[str, dict[str, float]]]") -> None:
    """Print ``runs[i][arm][measure]``, one run a seed, both arms of a seed equal in all but the noise.

    The last column is the 95 % t-interval of the mean paired difference; a single seed has none, and says so.
    """
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("", "plain", "flat", "flat - plain", "95 % interval" if len(runs) > 1 else ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for measure in runs[0]["plain"]:
        plain, flat = ([run[arm][measure] for run in runs] for arm in ("plain", "flat"))
        differences = [f - p for p, f in zip(plain, flat)]
        mean, between = statistics.fmean(differences), "one seed"
        if len(runs) > 1:
            half = float(scipy.stats.t.ppf(0.975, len(runs) - 1)) * statistics.stdev(differences) / len(runs) ** 0.5
            between = f"{mean - half:+.3f} to {mean + half:+.3f}"
        table.add_row(measure, f"{statistics.fmean(plain):.3f}", f"{statistics.fmean(flat):.3f}", f"{mean:+.3f}", between)
    rich.console.Console(width=110).print(table)
