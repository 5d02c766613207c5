"""What training with each restore mode leaves of the frozen weights, and what its noise looks like.

A perceptron trained on handwritten digits is adapted to their negatives with PEFT LoRA under FlatPerturbOptimizer, for
each dtype of the base and each restore mode. After every step the base weights are compared with those before training,
bit by bit; between forward and step the noise is compared with Eq. 7.

    python -m benchmarks.exactness            # some 2 minutes on a CPU
    python -m benchmarks.exactness --sigma 0.15 --steps 6250
"""

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import flatopt
from flatopt import FlatPerturbOptimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("reversible", "copy", "subtract")
BITS = {2: torch.int16, 4: torch.int32}
LAYERS = ["0", "2", "4"]
BATCH = 32


def digits(device: str) -> "tuple[torch.Tensor, torch.Tensor]":
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 8 - 1, dtype=torch.float32, device=device), torch.tensor(labels, device=device)


def batches(x: torch.Tensor, y: torch.Tensor, steps: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=generator).to(x.device)
        yield x[chosen], y[chosen]


def trained_base(x: torch.Tensor, y: torch.Tensor, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 10)).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for images, labels in batches(x, y, 300, seed):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


class Moments:
    """Std, kurtosis and the share of zeros of standardised noise, summed up over steps."""

    def __init__(self):
        self.n = self.second = self.fourth = self.untouched = 0.0

    def add(self, z: torch.Tensor) -> None:
        self.n += z.numel()
        self.second += z.square().sum().item()
        self.fourth += z.pow(4).sum().item()
        self.untouched += (z == 0).sum().item()

    def summary(self) -> "dict[str, float]":
        variance = self.second / self.n
        return {
            "noise std / nominal": variance**0.5,
            "noise kurtosis": self.fourth / self.n / variance**2 if variance else float("nan"),
            "untouched": self.untouched / self.n,
        }


def run(dtype: torch.dtype, restore: str, seed: int, args, on_step) -> dict:
    x, y = digits(args.device)
    base = trained_base(x, y, seed).to(dtype)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS))  # the adapter stays in fp32
    layers = [model.base_model.model[int(name)] for name in LAYERS]
    weights = [layer.base_layer.weight for layer in layers]
    before = [w.detach().clone() for w in weights]
    size, norm = sum(w.numel() for w in weights), sum(w.double().square().sum() for w in before).sqrt()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    optimizer = FlatPerturbOptimizer(
        optimizer, model, sigma=args.sigma, total_steps=args.steps, restore=restore, seed=seed, schedule="cosine"
    )
    every, late = max(1, args.steps // 50), Moments()
    curve = {"step": [], "sigma_t": [], "changed": [], "drift": [], "std": [], "untouched": []}
    inexact = 0
    for step, (images, labels) in enumerate(batches(-x, y, args.steps, seed + 1)):
        clean = [w.detach().clone() for w in weights]
        loss = nn.functional.cross_entropy(model(images.to(dtype)).float(), labels)
        loss.backward()
        sigma_t = args.sigma * 0.5 * (1 - math.cos(math.pi * step / args.steps))
        measured = step % every == every - 1
        if measured:
            now, last = Moments(), step >= 0.9 * args.steps
            for layer, w, c in zip(layers, weights, clean):
                merged = c.double() + layer.get_delta_weight("default").detach().double()
                std = sigma_t * merged.square().mean(dim=1, keepdim=True).sqrt()  # Eq. 7
                z = (w.double() - c.double()) / std
                now.add(z)
                if last:  # sigma_t is sigma there, to 2.5 %
                    late.add(z)
        optimizer.step()
        optimizer.zero_grad()
        changed = sum(
            (w.view(BITS[w.element_size()]) != b.view(BITS[w.element_size()])).sum() for w, b in zip(weights, before)
        )
        inexact += bool(changed)
        if measured:
            drift = sum((w.double() - b.double()).square().sum() for w, b in zip(weights, before)).sqrt() / norm
            seen = now.summary()
            values = (step + 1, sigma_t, changed / size, drift, seen["noise std / nominal"], seen["untouched"])
            for key, value in zip(curve, values, strict=True):
                curve[key].append(float(f"{float(value):.6g}"))
        on_step()
    return {
        "seed": seed,
        "steps not bit-exact": inexact,
        "weights changed": curve["changed"][-1],
        "relative drift": curve["drift"][-1],
        **late.summary(),
        "curve": curve,
    }


COLUMNS = {
    "steps not bit-exact": "{:.0f}",
    "weights changed": "{:.2%}",
    "relative drift": "{:.2g}",
    "noise std / nominal": "{:.3f}",
    "noise kurtosis": "{:.2f}",
    "untouched": "{:.2%}",
}


def table(result: dict) -> Table:
    args = result["arguments"]
    title = f"{args['steps']} steps, sigma {args['sigma']}, {args['seeds']} seeds: mean ± standard deviation over seeds"
    shown = Table(title=title)
    for name in ("base", "restore", *COLUMNS):
        shown.add_column(name, justify="left" if name in ("base", "restore") else "right")
    for row in result["rows"]:
        cells = []
        for name, form in COLUMNS.items():
            values = [r[name] for r in row["runs"]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(form.format(statistics.mean(values)) + (f" ± {form.format(spread)}" if spread else ""))
        shown.add_row(row["dtype"], row["restore"], *cells)
    return shown


def picture(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    colours = dict(zip(DTYPES, ("tab:green", "tab:blue", "tab:orange")))
    styles = dict(zip(MODES, ("-", ":", "--")))
    panels = [
        ("step", "drift", "relative drift of the base weights, ‖W − W₀‖ / ‖W₀‖"),
        ("step", "changed", "share of base weights changed"),
        ("sigma_t", "std", "noise std / nominal (Eq. 7)"),
        ("sigma_t", "untouched", "share of weights without noise"),
    ]
    for (across, up, title), axis in zip(panels, axes.flat):
        for row in result["rows"]:
            curves = [run["curve"] for run in row["runs"]]
            at = curves[0][across]
            values = torch.tensor([curve[up] for curve in curves])
            style = {"color": colours[row["dtype"]], "linestyle": styles[row["restore"]]}
            axis.plot(at, values.mean(0), label=f"{row['dtype']} {row['restore']}", linewidth=1.6, **style)
            axis.fill_between(at, values.amin(0), values.amax(0), color=style["color"], alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step" if across == "step" else "σ at that step", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].set_yscale("symlog", linthresh=1e-9, linscale=0.5)
    axes[0, 0].set_ylim(bottom=-2e-10)
    axes[1, 0].set_ylim(0.8, 1.1)
    for axis in axes[0]:
        axis.annotate(
            "reversible and copy: 0 in all three dtypes", (0.5, 0.07), xycoords="axes fraction", ha="center", fontsize=8
        )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=9, loc="outside lower center")
    args = result["arguments"]
    figure.suptitle(
        f"LoRA on digits, {args['steps']} steps at σ = {args['sigma']} (cosine), {args['seeds']} seeds: mean and range",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sigma", type=float, default=0.05, help="the paper's for language models")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of exactness.json, .png")
    args = parser.parse_args()
    if min(args.steps, args.seeds) < 1:
        parser.error("--steps and --seeds must be at least 1")
    torch.set_num_threads(1)  # the weights are small
    console = Console()
    wide = Console(width=max(console.width, 118))  # the table's width

    rows = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    with bar:
        task = bar.add_task("", total=len(DTYPES) * len(MODES) * args.seeds * args.steps)
        for dtype in DTYPES:
            for restore in MODES:
                bar.update(task, description=f"{dtype} {restore}")
                runs = [run(DTYPES[dtype], restore, seed, args, lambda: bar.advance(task)) for seed in range(args.seeds)]
                rows.append({"dtype": dtype, "restore": restore, "runs": runs})
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.exactness", *sys.argv[1:]]),
        "versions": {"flatopt": flatopt.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "arguments": {"steps": args.steps, "sigma": args.sigma, "seeds": args.seeds, "batch": BATCH},
        "rows": rows,
    }
    wide.print(table(result))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "exactness.json").write_text(json.dumps(result) + "\n")
    picture(result, args.out / "exactness.png")
    console.print(f"written: {args.out / 'exactness.json'}, {args.out / 'exactness.png'}")


if __name__ == "__main__":
    main()
