"""Tables and the picture of what the ranks found."""

from pathlib import Path

from rich.table import Table

from ..cost.summary import shown_cell

SHARDINGS = {"ddp": "DDP", "fsdp2": "FSDP2"}


def scaling(cells: "list[dict]", cell: dict, kind: str) -> float:
    """Median step of ``kind`` on the fewest ranks of this sharding over that of ``cell``."""
    alone = min((c for c in cells if c["sharding"] == cell["sharding"]), key=lambda c: c["ranks"])
    return alone["each"][0][kind]["median"] / cell["each"][0][kind]["median"]


def is_right(rank: dict) -> bool:
    """Whether all adapted weights had noise, and all of W came back bit for bit."""
    return rank["back"] and rank["perturbed"] == rank["layers"]


def sent(found: "list[dict]") -> str:
    """Collectives called and megabytes received."""
    calls = sum(sum(each["calls"].values()) for each in found)
    return f"{calls}, {sum(each['received_bytes'] for each in found) / 1e6:.2f} MB"


def tables(result: dict) -> "list[Table]":
    times, rest = Table(title=f"{result['device']}: {result['what']}"), Table()
    columns = ("", "ranks", "plain ms", "flat ms", "ratio", "weak scaling:\nplain", "\nflat")
    for column in (*columns, "perturb ms:\ndevice", "\nhost", "restore ms:\ndevice", "\nhost"):
        times.add_column(column, justify="right")
    columns = ("", "ranks", "peak GB:\nplain", "\nflat", "collectives, received:\nperturb + restore", "\na plain step")
    for column in (*columns, "\na flat step", "noise in all,\nW back"):
        rest.add_column(column, justify="right")
    for cell in result["cells"]:
        first, each, name = cell["each"][0], cell["each"], (SHARDINGS[cell["sharding"]], str(cell["ranks"]))
        times.add_row(
            *name,
            shown_cell(first["plain_ms"], digits=1),
            shown_cell(first["flat_ms"], digits=1),
            shown_cell(first["ratio"], digits=3),
            *(f"{scaling(result['cells'], cell, kind):.3f}" for kind in ("plain_ms", "flat_ms")),
            *(shown_cell(parts[part]) for parts in first["toggles"].values() for part in ("device_ms", "host_ms")),
        )
        peaks = [[rank[kind] for rank in each] for kind in ("plain_peak_gb", "flat_peak_gb")]
        found = first["collectives"]
        rest.add_row(
            *name,
            *("" if None in peak else f"{max(peak):.3f}" for peak in peaks),
            sent([found["perturb"], found["restore"]]),
            sent([found["plain step"]]),
            sent([found["flat step"]]),
            "yes" if all(map(is_right, each)) else "NO",
        )
    return [times, rest]


def picture(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = result["cells"]
    figure, axis = plt.subplots(figsize=(1.5 + 1.4 * len(cells), 3.8), layout="constrained")
    for shift, kind, label in ((-0.2, "plain_ms", "plain LoRA"), (0.2, "flat_ms", "flat")):
        steps = [cell["each"][0][kind] for cell in cells]
        spread = [step["spread"] for step in steps]
        axis.bar([i + shift for i in range(len(cells))], [step["median"] for step in steps], 0.4, yerr=spread, label=label)
    for i, cell in enumerate(cells):
        first = cell["each"][0]
        top = max(first[kind]["median"] + first[kind]["spread"] for kind in ("plain_ms", "flat_ms"))
        axis.text(i, top, f"× {first['ratio']['median']:.3f}", ha="center", va="bottom", fontsize=8)
    names = [f"{SHARDINGS[cell['sharding']]}, {cell['ranks']} rank{'s' * (cell['ranks'] > 1)}" for cell in cells]
    axis.set_xticks(range(len(cells)), names)
    axis.set_ylabel("ms a step, the same work on each rank")
    axis.margins(y=0.12)
    axis.legend(fontsize=8)
    axis.set_title(f"{result['device']}\n{result['what']}", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
