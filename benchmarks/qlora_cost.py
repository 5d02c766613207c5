"""What noise in the forward adds to a QLoRA step, in time and in memory, side by side in one run.

    python -m benchmarks.qlora_cost                    # on a GPU: Llama-2-7B in nf4, some 4 minutes; needs bitsandbytes
    python -m benchmarks.qlora_cost --checkpointing    # activations recomputed, so that the noise is made three times
    python -m benchmarks.qlora_cost --parts            # the device's part and the host's; into the rows that are there
    python -m benchmarks.qlora_cost --device cpu       # a tiny model in fp32: does it run, not how fast

Methods: plain QLoRA; FlatPerturbOptimizer with W + ε made from 4 bits by one kernel; with W dequantised by bitsandbytes and
the noise added by another kernel; and (asked for by name) with torch's own operations. Random weights, double quantised nf4,
LoRA r 8 on all linear layers, batches of 2 x 1024 tokens. Timed as in ``benchmarks.cost``, whose turns and cells these are:
a ratio is that of a turn to those of plain QLoRA before and after it. ``by_layer``: one linear layer alone, forward and
backward, the median of each way in microseconds. Whole steps wait for a host whose speed wanders, so ``parts`` tells the two
apart: the device's, as in ``benchmarks.cost.parts``; and the host's, the ratio of whole steps on 2 x 8 tokens, on which the
device waits for the host. Results: ``benchmarks/results/qlora_cost_<device>.json``.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import nn

from flatopt.perturbation import noisy_layers

from .cost.__main__ import RESULTS, device_name, versions
from .cost.methods import METHODS, Ours
from .cost.models import Case, adapted, llama
from .cost.parts import on_device
from .cost.show import steps_table
from .cost.steps import compare, measure
from .cost.summary import summary

FEW = 8  # tokens a row, so few that the device waits for the host
WAYS = {"one kernel": None, "dequantised first": "_fused", "torch's operations": "_kernels"}


@contextmanager
def way(name: str) -> Iterator[None]:
    """How W + ε is made while this is open."""
    fused, kernels = noisy_layers.NoisyWeight._fused, noisy_layers._kernels
    if WAYS[name] == "_fused":
        noisy_layers.NoisyWeight._fused = lambda *_: None
    elif WAYS[name] == "_kernels":
        noisy_layers._kernels = lambda *_: None
    try:
        yield
    finally:
        noisy_layers.NoisyWeight._fused, noisy_layers._kernels = fused, kernels


class InForward(Ours):
    """The optimizer with W + ε made in one of WAYS."""

    def __init__(self, case: Case, optimizer: torch.optim.Optimizer, made: str):
        super().__init__(case, optimizer, restore="forward")
        self.made = made

    def step(self, accumulation: int) -> None:
        with way(self.made):
            super().step(accumulation)


METHODS.update({f"ours, {name}": partial(InForward, made=name) for name in WAYS})


def four_bits(linear: nn.Linear, device: str) -> nn.Module:
    """The layer in double quantised nf4, as transformers' BitsAndBytesConfig makes it."""
    import bitsandbytes

    dtype = linear.weight.dtype
    options = {"bias": linear.bias is not None, "compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": True}
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, device="meta", **options)
    quantised = {"quant_type": "nf4", "compress_statistics": True, "requires_grad": False}
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, module=layer, **quantised).to(device)
    layer.bias = linear.bias
    return layer


def cases(device: str, checkpointing: bool) -> "tuple[Case, Case]":
    """The model on the tokens it is timed on, and on a few."""
    from peft import prepare_model_for_kbit_training

    if device == "cuda":
        model, length, what = llama(device, torch.bfloat16), 1024, "Llama-2-7B shape, nf4"
    else:
        small = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4}
        model, length = llama(device, torch.float32, vocab_size=1000, **small), 64
        what = "Llama of 2 layers, 256 wide, nf4"
    tokens = torch.randint(model.config.vocab_size, (2, length), device=device)
    for block in model.model.layers:
        for parent in block.children():
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, four_bits(child, device))
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted(model, target_modules=projections, task_type="CAUSAL_LM")

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return model(input_ids=tokens, labels=tokens).loss

    what += ", recomputed activations" if checkpointing else ""
    sizes = tokens, tokens[:, :FEW]
    return tuple(Case(model, partial(loss, some), f"{what}, {some.shape[0]} x {some.shape[1]} tokens") for some in sizes)


def time_layers(case: Case, ways: "list[str]", tokens: int, repeats: int = 50) -> "list[dict]":
    """Of each shape of layer: microseconds of its forward and its backward, plain and with the noise made in each way."""
    from flatopt.core.weight import AdaptedWeight, WeightView
    from flatopt.ops import step_key
    from flatopt.perturbation.forward import ForwardPlan, own_forwards

    shapes: dict[tuple[int, int], nn.Module] = {}
    for module in case.model.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            shapes.setdefault((base.out_features, base.in_features), base)
    rows = []
    for (m, n), layer in shapes.items():
        weight = AdaptedWeight(layer, "weight", "layer", layer, None)
        plan = ForwardPlan([WeightView(weight, 1)], "filter")
        plan.fill_std(0.05)
        plan.perturb(step_key(0, 0, 0))
        x = torch.randn(tokens, n, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        y = torch.randn(tokens, m, dtype=torch.bfloat16, device="cuda")
        row = {"out": m, "in": n}
        for name in ("plain", *ways):
            plan.restore()
            if name != "plain":
                plan.perturb(step_key(0, 0, 0))
            with way("one kernel" if name == "plain" else name):
                times = []
                for _ in range(repeats):
                    points = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                    torch.cuda._sleep(1_000_000)  # the host gets ahead
                    points[0].record()
                    out = layer(x)
                    points[1].record()
                    out.backward(y)
                    points[2].record()
                    torch.cuda.synchronize()
                    times.append([1e3 * a.elapsed_time(b) for a, b in pairwise(points)])
                    x.grad = None
            row[name] = {
                "forward_us": statistics.median(t[0] for t in times),
                "backward_us": statistics.median(t[1] for t in times),
            }
        own_forwards([weight])
        rows.append(row)
    return rows


def measure_parts(rows: "list[dict]", case: Case, short: Case, command: str, console: Console, save) -> None:
    """The device's part and the host's of the rows that are there: the host's first, as a launch may take longer after
    torch.profiler, and the long steps last."""
    ours = sorted((row for row in rows if row["method"] != "plain LoRA"), key=lambda row: row["accumulation"])
    for row in ours:
        row["parts"] = {"command": command}
        if row["accumulation"] == ours[0]["accumulation"]:
            cell, plain, _ = compare(row["method"], short, row["accumulation"], "cuda", 8.0)
            row["parts"] |= {"host_ratio": cell["ratio"], "host_ms": cell["step_ms"], "host_plain_ms": summary(plain)}
    for row in ours:
        row["parts"] |= on_device(row["method"], case, row["accumulation"], turns=3 if row["accumulation"] < 16 else 1)
        save()
        found = [f"{name} {row['parts'][name]}" for name in ("device_ratio", "host_ratio") if name in row["parts"]]
        console.log(f"{row['method']}, accumulation {row['accumulation']}: {', '.join(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qlora_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["one kernel", "dequantised first"] if gpu else list(WAYS)
    )
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to repeat one cell for (at least 3 turns)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    case, short = cases(args.device, args.checkpointing)
    layers = [m.get_base_layer() for m in case.model.modules() if isinstance(m, LoraLayer)]
    run = {
        "command": shlex.join(["python", "-m", "benchmarks.qlora_cost", *sys.argv[1:]]),
        "versions": {**versions(), "bitsandbytes": __import__("bitsandbytes").__version__},
        "device": device_name(args.device),
        "what": case.what,
        "layers": len(layers),
        "weights": sum(layer.in_features * layer.out_features for layer in layers),
        "toggles": {},
    }
    file = args.out / f"qlora_cost_{device_name(args.device).lower().replace(' ', '-')}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    console, kind = Console(width=120), "checkpointing" if args.checkpointing else "plain"

    def save() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if args.parts:
        measure_parts(results[kind]["rows"], case, short, run["command"], console, save)
        return
    if args.device == "cuda":
        run["by_layer"] = time_layers(case, args.ways, tokens=2048)
        console.print(run["by_layer"])
    methods = [f"ours, {name}" for name in args.ways]
    for rows in measure(case, args.accumulation, methods, args.device, args.seconds, console.log):
        results[kind] = {**run, "plain_ms": rows[0]["step_ms"]["median"], "rows": rows}
        save()
        console.print(steps_table("QLoRA", {**run, "rows": rows}))
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
