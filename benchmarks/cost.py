"""What each method adds to a training step, in time and in memory, side by side in one run.

    python benchmarks/cost.py                     # on a GPU: Llama-2-7B, T5-base and ViT-B/32, some 6 minutes on an H200
    python benchmarks/cost.py --device cpu        # the tiny model, some 2 minutes

Methods: plain LoRA; FlatPerturbOptimizer in each restore mode; the procedure of the Flat-LoRA authors' code, written anew
from its description; SAM on the adapter and on the frozen weights. Models are made from their configurations with random
weights: what they compute has no meaning, what it costs does. Steps are timed with device events on a GPU and the wall clock
on a CPU. Plain and a method take turns of a third of a second (or one step); a ratio is that of a turn's median step to the
plain one's before and after it. A cell is the median over steps or turns, its spread half the range between the quartiles.
Perturb and restore are timed by themselves with the host ahead of the device, as it is in training. Memory is
what torch allocated on a GPU; on a CPU the resident process, which is rough. Results: ``cost_<device>.json`` and ``.png`` in
``benchmarks/results``; models that are not measured again stay in them.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from flatopt import SAM, FlatPerturbOptimizer

SIGMA = 0.05  # any would do: the time does not depend on it
WARM_UP = 1  # steps, at each turn
TURN, MOST_STEPS, LEAST_TURNS = 0.3, 100, 3  # a turn's seconds, at most so many steps; turns of a method, at least
TOGGLES = 12  # seconds to time perturb and restore for


# --- models: (model with LoRA r 8 on all its linear layers, a function from a batch to the loss, a batch) ----------------


@dataclass
class Case:
    model: nn.Module
    loss: Callable[[], torch.Tensor]
    what: str


def _adapted(model: nn.Module, **targets) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **targets)).train()


def _language_model(config, device: str, dtype: torch.dtype, batch: int, length: int, what: str) -> Case:
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tokens = torch.randint(config.vocab_size, (batch, length))
    model = _adapted(base, target_modules="all-linear", task_type="CAUSAL_LM")
    return Case(model, lambda: model(input_ids=tokens, labels=tokens).loss, f"{what}, {batch} x {length} tokens")


def llama_7b(device: str) -> Case:
    from transformers import LlamaConfig

    config = LlamaConfig(use_cache=False)  # its defaults are Llama-2-7B's
    return _language_model(config, device, torch.bfloat16, 2, 1024, "Llama-2-7B shape, bf16, adapter fp32")


def t5_base(device: str) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, use_cache=False, decoder_start_token_id=0
    )
    with torch.device(device):
        base = T5ForConditionalGeneration(config)
        source, labels = torch.randint(config.vocab_size, (32, 128)), torch.randint(config.vocab_size, (32, 8))
    model = _adapted(base, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")

    def loss() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(input_ids=source, labels=labels).loss

    return Case(model, loss, "T5-base shape, fp32 under bf16 autocast, 32 x 128 tokens")


def vit_b32(device: str) -> Case:
    import timm

    with torch.device(device):
        base = timm.create_model("vit_base_patch32_224", num_classes=100)
        images, labels = torch.randn(32, 3, 224, 224), torch.randint(100, (32,))
    model = _adapted(base, target_modules=["qkv", "attn.proj", "fc1", "fc2"])

    def loss() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(images).float(), labels)

    return Case(model, loss, "ViT-B/32, fp32 under bf16 autocast, 32 images")


def tiny(device: str) -> Case:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000, use_cache=False
    )
    return _language_model(config, device, torch.float32, 8, 64, "Llama of 4 layers, 512 wide, fp32")


MODELS = {"llama-7b": llama_7b, "t5-base": t5_base, "vit-b32": vit_b32, "tiny": tiny}
ON_GPU = ["llama-7b", "t5-base", "vit-b32"]  # unless others are asked for


# --- methods: each takes a step of `accumulation` micro-batches; some can perturb and restore by themselves ---------------


class Plain:
    def __init__(self, case: Case, optimizer: torch.optim.Optimizer):
        self.case, self.optimizer = case, optimizer

    def gradients(self, accumulation: int) -> None:
        for _ in range(accumulation):
            (self.case.loss() / accumulation).backward()

    def step(self, accumulation: int) -> None:
        self.gradients(accumulation)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours(Plain):
    def __init__(self, case: Case, optimizer: torch.optim.Optimizer, restore: str):
        optimizer = FlatPerturbOptimizer(optimizer, case.model, sigma=SIGMA, schedule="constant", restore=restore)
        super().__init__(case, optimizer)
        self.perturb, self.restore = optimizer.perturb, optimizer.restore


class Official(Plain):
    """What the Flat-LoRA authors' code does, as issue and paper describe it.

    Of each LoRA layer the merged weight is formed, its row norms are repeated to a tensor of the weight's size, and
    ``torch.normal`` with it is added to the weight, from the global generator with a seed of the step. To restore, the
    generator gets the seed again and the same noise is drawn and subtracted.
    """

    def __init__(self, case: Case, optimizer: torch.optim.Optimizer):
        super().__init__(case, optimizer)
        self.layers = [module for module in case.model.modules() if isinstance(module, LoraLayer)]
        self.norms, self.seed = [], 0

    @torch.no_grad()
    def perturb(self) -> None:
        self.seed += 1
        torch.manual_seed(self.seed)
        for layer in self.layers:
            weight = layer.get_base_layer().weight
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            merged = weight + layer.scaling["default"] * (B @ A)
            self.norms.append(merged.norm(dim=1, keepdim=True))
            weight += self.noise(weight, self.norms[-1])

    @torch.no_grad()
    def restore(self) -> None:
        torch.manual_seed(self.seed)
        for layer, norm in zip(self.layers, self.norms):
            weight = layer.get_base_layer().weight
            weight -= self.noise(weight, norm)
        self.norms = []

    def noise(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        columns = weight.shape[1]
        return torch.normal(0.0, (SIGMA / columns**0.5 * norm).repeat(1, columns)).to(weight.dtype)

    def step(self, accumulation: int) -> None:
        self.perturb()
        self.gradients(accumulation)
        self.restore()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Sharpness(Plain):
    def __init__(self, case: Case, optimizer: torch.optim.Optimizer, space: str):
        rho, targets = (0.05, case.model) if space == "full" else (0.003, None)
        super().__init__(case, SAM(optimizer, rho=rho, space=space, targets=targets))

    def step(self, accumulation: int) -> None:
        self.optimizer.step(lambda: self.gradients(accumulation))
        self.optimizer.zero_grad()


METHODS = {
    "plain LoRA": Plain,
    "ours, reversible": partial(Ours, restore="reversible"),
    "ours, copy": partial(Ours, restore="copy"),
    "ours, subtract": partial(Ours, restore="subtract"),
    "official procedure": Official,
    "SAM on the adapter": partial(Sharpness, space="adapter"),
    "SAM on W": partial(Sharpness, space="full"),
}


# --- measuring ------------------------------------------------------------------------------------------------------------


class Clock:
    """Points in the device's time, and milliseconds between them."""

    def __init__(self, device: str):
        self.device, self.points = device, []

    def mark(self) -> None:
        if self.device == "cuda":
            self.points.append(torch.cuda.Event(enable_timing=True))
            self.points[-1].record()
        else:
            self.points.append(time.perf_counter())

    def intervals(self) -> "list[float]":
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.points, self.points[1:])]
        return [1e3 * (b - a) for a, b in zip(self.points, self.points[1:])]


class Peak:
    """The most memory in use since it was made, in GB: allocated on a GPU, resident (Linux) on a CPU."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> "float | None":
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        if sys.platform == "linux":
            return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
        return None


@contextmanager
def made(make: Callable, case: Case) -> Iterator[Plain]:
    """A method with an AdamW of its own; afterwards the model has no hooks and no gradients."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    method = make(case, torch.optim.AdamW(parameters, lr=1e-5))
    try:
        yield method
    finally:
        case.model.zero_grad()
        method.__dict__.clear()


def take_turn(make: Callable, case: Case, accumulation: int, device: str, steps: "int | None"):
    """A new method for a while: (milliseconds of each step, peak memory).

    Without ``steps``, as many as fill TURN.
    """
    with made(make, case) as method:
        for _ in range(WARM_UP):
            method.step(1)
        if device == "cuda":
            torch.cuda.synchronize()
        peak, clock, began = Peak(device), Clock(device), time.perf_counter()
        clock.mark()
        while len(clock.points) <= (steps or MOST_STEPS):
            method.step(accumulation)
            clock.mark()
            if device == "cuda" and accumulation * len(clock.points) % 16 == 0:
                clock.points[-1].synchronize()  # or the host would queue steps without end
            if not steps and time.perf_counter() - began > TURN:
                break
        return clock.intervals(), peak.gigabytes()


def time_toggle(method: Plain, device: str) -> "list[float]":
    """Milliseconds to perturb and to restore."""
    clock = Clock(device)
    if device == "cuda":
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms: the host gets ahead
    clock.mark()
    method.perturb()
    clock.mark()
    method.restore()
    clock.mark()
    return clock.intervals()


def time_toggles(methods: "list[str]", case: Case, device: str) -> "dict[str, dict]":
    """Milliseconds to perturb and to restore, of the methods that can do it by themselves, and their sum over the official
    procedure's; they take turns, one at a time."""
    times = {name: [] for name in methods if not name.startswith("SAM")}
    rounds, began = 0, time.perf_counter()
    while times and (time.perf_counter() - began < TOGGLES or rounds < 5):
        rounds += 1
        for name, found in times.items():
            with made(METHODS[name], case) as method:
                time_toggle(method, device)  # finds the square sums of W, and compiles
                found.append(time_toggle(method, device))
    toggles = {}
    for name, found in times.items():
        there, back = zip(*found)
        toggles[name] = {"perturb_ms": summary(there), "restore_ms": summary(back), "both_ms": summary([*map(sum, found)])}
        if "official procedure" in times:
            ratios = [sum(own) / sum(official) for own, official in zip(found, times["official procedure"])]
            toggles[name]["both_over_official"] = summary(ratios)
    return toggles


def summary(samples: "list[float]") -> dict:
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"median": middle, "spread": (high - low) / 2, "repeats": len(samples)}


def over_plain(own: "list[list[float]]", plain: "list[list[float]]") -> dict:
    """Ratios of a method's turns to plain's; each stands between two of plain, so that what drifts hits both alike."""
    turns = zip(own, plain, plain[1:])
    return summary([statistics.median(turn) / statistics.median(before + after) for turn, before, after in turns])


def compare(name: str, case: Case, accumulation: int, device: str, seconds: float) -> "tuple[dict, list, float | None]":
    """The cell of a method, and the step times and peak memory of the plain turns around its own."""
    plain, own, plain_peaks, peaks, began = [], [], [], [], time.perf_counter()
    while len(own) < LEAST_TURNS or time.perf_counter() - began < seconds:
        steps = len(own[0]) if own else None
        for make, turns, most in ((Plain, plain, plain_peaks), (METHODS[name], own, peaks)):
            samples, peak = take_turn(make, case, accumulation, device, steps)
            turns.append(samples)
            most.append(peak)
    plain.append(take_turn(Plain, case, accumulation, device, len(own[0]))[0])
    cell = {"step_ms": summary([*chain(*own)]), "ratio": over_plain(own, plain), "peak_gb": None, "peak_gb_over_plain": None}
    if None not in peaks:
        cell.update(peak_gb=max(peaks), peak_gb_over_plain=max(peaks) - max(plain_peaks))
    return cell, [*chain(*plain)], None if None in plain_peaks else max(plain_peaks)


def measure(case: Case, accumulations: "list[int]", methods: "list[str]", device: str, seconds: float, tick: Callable):
    """Rows of results, yielded as far as they are, after each accumulation; ``tick(what)`` before each cell."""
    rows = []
    for accumulation in accumulations:
        cells, every_plain = {}, []
        for name in methods:
            tick(f"accumulation {accumulation}: {name}")
            cells[name], samples, plain_peak = compare(name, case, accumulation, device, seconds)
            every_plain += samples
        zero = None if plain_peak is None else 0.0
        row = {"step_ms": summary(every_plain), "ratio": None, "peak_gb": plain_peak, "peak_gb_over_plain": zero}
        rows += [
            {"method": name, "accumulation": accumulation, **cell} for name, cell in {"plain LoRA": row, **cells}.items()
        ]
        yield rows


# --- showing --------------------------------------------------------------------------------------------------------------


def shown_cell(value: "dict | None", digits: int = 2, scale: float = 1) -> str:
    """A :func:`summary`, or nothing where there is none."""
    return "" if value is None else f"{scale * value['median']:.{digits}f} ± {scale * value['spread']:.{digits}f}"


def table(name: str, result: dict) -> Table:
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


def results_file(folder: Path, device: str) -> Path:
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    return folder / f"cost_{name}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all but tiny on a GPU, tiny on a CPU")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS)[1:], default=list(METHODS)[1:])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=4.0, help="time to repeat one cell for (at least 3 turns)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    models = args.models or (ON_GPU if args.device == "cuda" else ["tiny"])
    if args.device == "cuda" and not gpu:
        parser.error("this machine has no CUDA device; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)

    device_name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "peft", "transformers", "timm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    args.out.mkdir(parents=True, exist_ok=True)
    file = results_file(args.out, args.device)
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"models": {}}
    results["device"] = device_name

    console = Console()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with bar if console.is_terminal else nullcontext():
        for name in models:
            task = bar.add_task(name, total=len(args.accumulation) * len(args.methods))

            def tick(what: str, task: int = task, name: str = name) -> None:
                bar.update(task, advance=1, description=f"{name}, {what}")

            torch.manual_seed(args.seed)
            case = MODELS[name](args.device)
            layers = [m for m in case.model.modules() if isinstance(m, LoraLayer)]
            weights = sum(layer.get_base_layer().weight.numel() for layer in layers)
            run = {"command": shlex.join(sys.argv), "versions": versions, "seed": args.seed}
            toggles = time_toggles(args.methods, case, args.device)
            sizes = {"what": case.what, "layers": len(layers), "weights": weights, "toggles": toggles}
            for rows in measure(case, args.accumulation, args.methods, args.device, args.seconds, tick):
                results["models"][name] = {**run, **sizes, "plain_ms": rows[0]["step_ms"]["median"], "rows": rows}
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            Console(width=max(console.width, 120)).print(table(name, results["models"][name]))
            del case, layers

    picture(results, file.with_suffix(".png"))
    console.print(f"written: {file}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
