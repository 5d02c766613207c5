"""Tables of whole steps and of their parts, and the picture of both."""

from pathlib import Path

from rich.table import Table

from .methods import METHODS
from .summary import shown_cell


def steps_table(name: str, result: dict) -> Table:
    shown = Table(title=f"{name}: {result['what']}; {result['layers']} layers, {result['weights'] / 1e6:.1f} M weights")
    for column in ("accumulation", "method"):
        shown.add_column(column)
    for column in ("step ms", "ratio to plain", "perturb ms", "restore ms", "both over official", "peak GB over plain"):
        shown.add_column(column, justify="right")
    for row in result["rows"]:
        over, toggles = row["peak_gb_over_plain"], result["toggles"].get(row["method"], {})
        shown.add_row(
            str(row["accumulation"]),
            row["method"],
            shown_cell(row["step_ms"]),
            shown_cell(row["ratio"], digits=3) or "1",
            shown_cell(toggles.get("perturb_ms")),
            shown_cell(toggles.get("restore_ms")),
            shown_cell(toggles.get("both_over_official")),
            "" if over is None else f"{row['peak_gb']:.3f}" if row["method"] == "plain LoRA" else f"{over:+.3f}",
            end_section=row is result["rows"][-1] or row["method"] == list(METHODS)[-1],
        )
    return shown


def parts_table(models: dict) -> Table:
    shown = Table()
    for column in ("model", "accumulation", "method"):
        shown.add_column(column)
    for column in ("device ms, plain", "device ms", "ratio", "host ms added", "share of the rest, %"):
        shown.add_column(column, justify="right")
    for model, result in models.items():
        for row in result["rows"]:
            if parts := row.get("parts"):
                shown.add_row(
                    model,
                    str(row["accumulation"]),
                    row["method"],
                    shown_cell(parts["device_plain_ms"]),
                    shown_cell(parts["device_ms"]),
                    shown_cell(parts["device_ratio"], digits=4),
                    shown_cell(parts.get("host_ms")),
                    shown_cell(parts.get("host_share"), scale=100),
                )
    return shown


def picture(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = results["models"]
    figure, axes = plt.subplots(
        1, len(models), figsize=(1.5 + 4 * len(models), 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (name, result) in zip(axes[0], models.items()):
        methods = list(dict.fromkeys(row["method"] for row in result["rows"]))[1:]
        accumulations = list(dict.fromkeys(row["accumulation"] for row in result["rows"]))
        for i, accumulation in enumerate(accumulations):
            rows = {row["method"]: row for row in result["rows"] if row["accumulation"] == accumulation}
            height = 0.8 / len(accumulations)
            at = [m + i * height - 0.4 + height / 2 for m in range(len(methods))]
            over = [100 * (rows[m]["ratio"]["median"] - 1) for m in methods]
            spread = [100 * rows[m]["ratio"]["spread"] for m in methods]
            axis.barh(at, over, height, xerr=spread, error_kw={"linewidth": 0.8}, label=f"accumulation {accumulation}")
            for percent, y in zip(over, at):  # all at the edge, where no bar or diamond hides them
                axis.text(
                    0.99, y, f"{percent:+.1f}", transform=axis.get_yaxis_transform(), fontsize=6, ha="right", va="center"
                )
            device = [(rows[m]["parts"]["device_ratio"]["median"], y) for m, y in zip(methods, at) if "parts" in rows[m]]
            axis.plot([100 * (ratio - 1) for ratio, _ in device], [y for _, y in device], "kD", markersize=3)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_xscale("symlog", linthresh=10)
        axis.margins(x=0.2)
        axis.set_title(f"{name}, {result['plain_ms']:.0f} ms", fontsize=9)
        axis.set_xlabel("step time over plain LoRA, %")
        axis.axvline(0, color="black", linewidth=0.6)
    axes[0, 0].invert_yaxis()  # shared
    most = max(axes[0], key=lambda axis: len(axis.containers))
    figure.legend(*most.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    has_parts = any("parts" in row for result in models.values() for row in result["rows"])
    legend = ": whole steps (bars), the device's part of them (diamonds)" if has_parts else ""
    figure.suptitle(results["device"] + legend, fontsize=9)
    figure.savefig(path, dpi=150)
