"""Fine-tune a timm vision transformer with a low-rank adapter, plain and flat side by side over paired seeds.

    python examples/finetune_vit.py

needs no download: a small ViT is trained on handwritten digits and adapted, from 100 labels, to digits that are turned,
bent and paler (see ``digits.py``). Both runs of a seed share the source model, the adapter's initial values, the batches
and the test images; they differ in the one line in :func:`finetune` that wraps the optimizer.

The settings on digits were chosen by validation accuracy on seeds 100 to 103 (``tune_digits.py`` repeats it): first lr
(5e-3, 1e-2, 2e-2) and steps (100 to 800, more helps a little) for plain LoRA alone, then sigma at those. 0.45 was best of
0.15 to 0.6 at 400 steps and of 0.15 to 0.8 at 800 (there on two of the seeds). The seeds reported here, 0 and up, and the
test images played no part. Runs differ so much from seed to seed that a gain of a point or two may not show in the eight of
the default; docs/results/finetune_vit.json has 40 (3 minutes on an H200 with 16 cores).

    python examples/finetune_vit.py --model vit_base_patch32_clip_224.openai --pretrained --data cifar100

is the paper's recipe (Li et al., ICML 2025) on a GPU with a network: CLIP ViT-B/32, sigma 0.15, rank 16, AdamW at 5e-4 with
a cosine and weight decay 0.1, 10 epochs, 3 seeds, frozen head. timm has CLIP's image tower alone, so the head cannot be
made from class names: here it is a linear probe, fitted to the frozen features first and then frozen (Kumar et al., ICLR
2022). Images are only resized and cropped, not augmented.
"""

import argparse
import concurrent.futures
import copy
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import digits
import huggingface_hub
import matplotlib
import peft
import rich.console
import rich.progress
import rich.table
import scipy.stats
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import flatopt
from flatopt import FlatPerturbOptimizer, register_low_rank

ARMS = ("plain", "flat")
ALPHA = 16  # LoRA's alpha, the paper's at every rank
# Chosen as told above.
DIGITS = {
    "sigma": 0.45, "rank": 4, "seeds": 8, "labels": 100, "epochs": 200, "batch": 25, "lr": 1e-2, "weight_decay": 0.01,
    "source_steps": 600, "workers": 0,
}  # fmt: skip
PAPER = {
    "sigma": 0.15, "rank": 16, "seeds": 3, "epochs": 10, "batch": 128, "lr": 5e-4, "weight_decay": 0.1, "workers": 4,
}  # fmt: skip
ADAPTED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # every Linear of timm's transformer block


# --- the adapter ------------------------------------------------------------------------------------------------------


class LowRankLinear(nn.Module):
    """A LoRA layer written by hand: ``linear(x) + scale * up(down(x))``, with ``linear`` frozen."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        self.scale = ALPHA / rank
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.down.t() @ self.up.t())


register_low_rank(LowRankLinear, base=lambda m: m.linear.weight, delta=lambda m: (m.up, m.down, m.scale))


def add_adapter(model: nn.Module, kind: str, rank: int) -> nn.Module:
    """Freeze ``model`` and put an adapter on every linear layer of its blocks: ``lora`` and ``dora`` by PEFT, or ``custom``,
    :class:`LowRankLinear`."""
    if kind != "custom":
        config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(ADAPTED), use_dora=kind == "dora")
        return peft.get_peft_model(model, config)
    model.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        if path.endswith(ADAPTED):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LowRankLinear(layer, rank))
    return model


# --- the training loop: as it always was, but for one line ------------------------------------------------------------


def finetune(
    model: nn.Module,
    loader: DataLoader,
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    sigma: float = 0.0,
    seed: int = 0,
    on_step: "Callable[[], None]" = lambda: None,
) -> float:
    """Train the adapter in ``model``, flat if ``sigma`` > 0, and return the mean loss of the last epoch."""
    device = next(model.parameters()).device
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    if sigma > 0:
        optimizer = FlatPerturbOptimizer(optimizer, model, sigma=sigma, total_steps=steps, seed=seed)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.detach()
            on_step()
    return float(total) / len(loader)


# --- what is trained and tested on ------------------------------------------------------------------------------------


class Task(NamedTuple):
    """``model``: pretrained, with its head. ``mean`` and ``std`` undo the normalisation where images are corrupted."""

    model: nn.Module
    train: torch.utils.data.Dataset
    test: torch.utils.data.Dataset
    mean: Tensor
    std: Tensor


def digits_task(seed: int, args: argparse.Namespace, on_step: "Callable[[], None]") -> Task:
    data = digits.load(seed, args.labels)
    source = digits.Images(*(tensor.to(args.device) for tensor in data.source))
    model = digits.source_model(source, seed, args.source_steps, on_step)
    none = torch.zeros(1, device=args.device)
    return Task(model, TensorDataset(*data.train), TensorDataset(*data.test), none, none + 1)


TORCHVISION: "dict[str, tuple[int, Callable]]" = {  # classes; (root, train?, transform) -> dataset
    "cifar10": (10, lambda root, train, t: torchvision.datasets.CIFAR10(root, train, t, download=True)),
    "cifar100": (100, lambda root, train, t: torchvision.datasets.CIFAR100(root, train, t, download=True)),
    "svhn": (10, lambda root, train, t: torchvision.datasets.SVHN(root, _split(train), t, download=True)),
    "dtd": (47, lambda root, train, t: torchvision.datasets.DTD(root, _split(train), transform=t, download=True)),
    "cars": (196, lambda root, train, t: torchvision.datasets.StanfordCars(root, _split(train), t)),
}


def _split(train: bool) -> str:
    return "train" if train else "test"


def _be_offline_at_once() -> None:
    # the hub's client retries for a minute without a network; offline, it looks in its cache and says at once if that fails
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def pretrained_task(seed: int, args: argparse.Namespace, on_step: "Callable[[], None]") -> Task:
    classes, dataset = TORCHVISION[args.data]
    _be_offline_at_once()
    try:
        model = timm.create_model(args.model, pretrained=True, num_classes=classes)
    except OSError as error:
        sys.exit(
            f"Cannot get the pretrained weights of {args.model}: {_first_line(error)}\n"
            "They come from huggingface.co. Connect this machine to the network; or, on a machine that is connected, run\n"
            f"    hf download timm/{args.model}\n"
            "and copy its ~/.cache/huggingface here (or point HF_HOME at the copy). Without --model, --pretrained and\n"
            "--data this example trains on handwritten digits and needs no network."
        )
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    try:
        train, test = dataset("data", True, transform), dataset("data", False, transform)
    except (OSError, RuntimeError) as error:
        by_hand = (
            "torchvision cannot download it any more" if args.data == "cars" else "torchvision downloads it into ./data"
        )
        sys.exit(
            f"Cannot get the data set {args.data}: {_first_line(error)}\n"
            f"{by_hand}. Connect this machine to the network, or put the files there yourself, as torchvision's manual\n"
            "describes: https://pytorch.org/vision/stable/datasets.html. Without --data this example needs no network."
        )
    if args.labels:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: args.labels]
        train = Subset(train, chosen.tolist())
    model = fit_head(model.to(args.device), DataLoader(train, 256, num_workers=args.workers))
    mean, std = (torch.tensor(config[key], device=args.device).view(-1, 1, 1) for key in ("mean", "std"))
    return Task(model, train, test, mean, std)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def fit_head(model: nn.Module, loader: DataLoader) -> nn.Module:
    """Fit the classifier to the frozen features: logistic regression with a little L2, by L-BFGS from zero."""
    head, device = model.get_classifier(), next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        parts = [
            (model.forward_head(model.forward_features(images.to(device)), pre_logits=True), labels.to(device))
            for images, labels in loader
        ]
        features, labels = (torch.cat(part) for part in zip(*parts))
        head.weight.zero_()
        head.bias.zero_()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


# --- the comparison ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test(model: nn.Module, task: Task, seed: int, args: argparse.Namespace) -> dict:
    """Accuracy (%) and loss on the test images, and accuracy under every corruption and severity."""
    model.eval()
    # drawn on the CPU, digits are the same on every device; for large images that would take too long
    generator = torch.Generator("cpu" if args.data == "digits" else args.device).manual_seed(seed)
    loss, right, corrupted = 0.0, 0.0, {kind: [0.0] * len(digits.SEVERITIES) for kind in digits.CORRUPTIONS}
    for images, labels in DataLoader(task.test, 512, num_workers=args.workers):
        images, labels = images.to(args.device), labels.to(args.device)
        logits = model(images)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += float((logits.argmax(1) == labels).sum())
        for kind, severity in itertools.product(digits.CORRUPTIONS, digits.SEVERITIES):
            worse = digits.corrupt(images * task.std + task.mean, kind, severity, generator)
            logits = model((worse - task.mean) / task.std)
            corrupted[kind][severity - 1] += float((logits.argmax(1) == labels).sum())
    n = len(task.test)
    corrupted = {kind: [100 * count / n for count in counts] for kind, counts in corrupted.items()}
    return {"accuracy": 100 * right / n, "loss": loss / n, "corrupted": corrupted}


def run_seed(seed: int, args: argparse.Namespace, on_step: "Callable[[], None]") -> "dict[str, dict]":
    """Both arms of one seed: equal in everything but sigma."""
    torch.manual_seed(seed)
    task = (digits_task if args.data == "digits" else pretrained_task)(seed, args, on_step)
    result = {}
    for arm in ARMS:
        torch.manual_seed(seed)
        model = add_adapter(copy.deepcopy(task.model), args.adapter, args.rank)
        batch = min(args.batch, len(task.train))
        shuffle = torch.Generator().manual_seed(seed)
        loader = DataLoader(task.train, batch, shuffle=True, drop_last=True, generator=shuffle, num_workers=args.workers)
        sigma = args.sigma if arm == "flat" else 0.0
        start = time.perf_counter()
        train_loss = finetune(
            model, loader, epochs=args.epochs, lr=args.lr, weight_decay=args.weight_decay, sigma=sigma, seed=seed,
            on_step=on_step,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        result[arm] = {"train_loss": train_loss, "train_seconds": seconds, **test(model, task, seed, args)}
    return result


class Interval(NamedTuple):
    """Mean of the paired differences flat - plain and its 95 % t-interval, None for a single seed."""

    mean: float
    low: "float | None"
    high: "float | None"


def interval(values: "list[float]") -> Interval:
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None)
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return Interval(mean, mean - half, mean + half)


def measures(result: dict) -> "dict[str, float]":
    """Every number of one run that is compared."""
    corrupted = result["corrupted"]
    by_kind = {kind: statistics.fmean(values) for kind, values in corrupted.items()}
    by_severity = {f"severity {s}": statistics.fmean(c[s - 1] for c in corrupted.values()) for s in digits.SEVERITIES}
    return {
        "test accuracy": result["accuracy"],
        "corrupted accuracy": statistics.fmean(by_kind.values()),
        **by_severity,
        **by_kind,
        "test loss": result["loss"],
        "train loss": result["train_loss"],
    }


def summarise(runs: "list[dict[str, dict]]") -> "dict[str, dict]":
    """Per measure: each arm's mean and interval, the paired difference and its interval, and the seeds flat is ahead on."""
    per_run = [{arm: measures(run[arm]) for arm in ARMS} for run in runs]
    summary = {}
    for name in per_run[0]["plain"]:
        plain, flat = ([run[arm][name] for run in per_run] for arm in ARMS)
        differences = [f - p for p, f in zip(plain, flat)]
        better = sum(d < 0 if name.endswith("loss") else d > 0 for d in differences)
        summary[name] = {
            "plain": interval(plain)._asdict(),
            "flat": interval(flat)._asdict(),
            "difference": interval(differences)._asdict(),
            "flat_better": f"{better}/{len(differences)}",
        }
    return summary


def show(summary: "dict[str, dict]", title: str, console: rich.console.Console) -> None:
    table = rich.table.Table(title=title, title_justify="left")
    for column, justify in (("", "left"), *((c, "right") for c in ("plain", "flat", "flat-plain", "95 %", "ahead"))):
        table.add_column(column, justify=justify, no_wrap=True)
    for name, row in summary.items():
        digits_after = 3 if name.endswith("loss") else 1
        number = f"{{:.{digits_after}f}}".format
        signed = f"{{:+.{digits_after}f}}".format
        difference = Interval(**row["difference"])
        between = "-" if difference.low is None else f"{signed(difference.low)} to {signed(difference.high)}"
        table.add_row(
            name, number(row["plain"]["mean"]), number(row["flat"]["mean"]), signed(difference.mean), between,
            row["flat_better"], end_section=name in ("corrupted accuracy", "severity 5", digits.CORRUPTIONS[-1]),
        )  # fmt: skip
    console.print(table)


def picture(summary: "dict[str, dict]", title: str, path: Path) -> None:
    """Left: accuracy by severity of corruption. Right: the paired differences. Error bars: 95 % t-intervals over seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"plain": "#7a7a7a", "flat": "#0b62a4"}
    labels = {"plain": "plain: AdamW", "flat": "flat: FlatPerturbOptimizer(AdamW)"}
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1, 1.15), layout="constrained")

    def bars(row):
        return [[0 if row[k] is None else abs(row[k] - row["mean"])] for k in ("low", "high")]

    severities = (0, *digits.SEVERITIES)
    rows = [summary["test accuracy"], *(summary[f"severity {s}"] for s in digits.SEVERITIES)]
    for arm, aside, marker in (("plain", -0.06, "s"), ("flat", 0.06, "o")):
        means = [row[arm]["mean"] for row in rows]
        error = [[length for (length,) in side] for side in zip(*(bars(row[arm]) for row in rows))]
        left.errorbar(
            [s + aside for s in severities],
            means,
            error,
            marker=marker,
            capsize=3,
            color=colours[arm],
            label=labels[arm],
            lw=1.8,
        )
    left.set_xticks(severities, ["clean", *map(str, digits.SEVERITIES)])
    left.set_xlabel(f"severity of corruption (mean of {len(digits.CORRUPTIONS)} kinds)")
    left.set_ylabel("test accuracy, %")
    left.grid(axis="y", alpha=0.25)
    left.legend(frameon=False)

    names = ["test accuracy", "corrupted accuracy", *digits.CORRUPTIONS]
    for y, name in enumerate(names):
        row = summary[name]["difference"]
        shade = colours["flat"] if y < 2 else "#6fa8d6"
        right.errorbar(row["mean"], y, xerr=bars(row), marker="o", capsize=3, color=shade, lw=1.8)
        right.annotate(f"{row['mean']:+.1f}", (row["mean"], y), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(names)), ["clean", "all corruptions", *digits.CORRUPTIONS])
    right.set_ylim(len(names) - 0.5, -0.7)
    right.set_xlabel("flat - plain, percentage points of test accuracy")
    right.grid(axis="x", alpha=0.25)
    loss = summary["test loss"]
    change = Interval(**loss["difference"])
    between = "" if change.low is None else f" (95 % interval {change.low:+.2f} to {change.high:+.2f})"
    line = f"Test loss {loss['plain']['mean']:.2f} plain, {loss['flat']['mean']:.2f} flat: {change.mean:+.2f}{between}"
    heading = f"{title[0].upper()}{title[1:]}\n{line}. Error bars: 95 % t-intervals over seeds"
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def arguments(argv: "list[str] | None" = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Values in brackets: digits / with --data.")
    parser.add_argument(
        "--adapter", choices=("lora", "dora", "custom"), default="lora", help="[lora]; custom: by hand, above"
    )
    parser.add_argument("--model", help="a pretrained timm ViT, with --pretrained and --data")
    parser.add_argument("--pretrained", action="store_true", help="start from the weights on huggingface.co")
    parser.add_argument("--data", choices=("digits", *TORCHVISION), default="digits")
    parser.add_argument("--sigma", type=float, help="strength of the noise of the flat arm [0.45 / 0.15]")
    parser.add_argument("--rank", type=int, help="rank of the adapter [4 / 16]")
    parser.add_argument("--seeds", type=int, help="number of paired runs [10 / 3]")
    parser.add_argument("--labels", type=int, help="labelled training images [100 / all]")
    parser.add_argument("--epochs", type=int, help="passes over them [200 / 10]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    parser.add_argument("--out", type=Path, default=Path("finetune_vit"), help="writes OUT.png and OUT.json [finetune_vit]")
    args = parser.parse_args(argv)
    if (args.data == "digits") == bool(args.model or args.pretrained) or bool(args.model) != args.pretrained:
        parser.error(
            "--model, --pretrained and --data go together; without all three, the ViT is trained on digits on the spot"
        )
    defaults = DIGITS if args.data == "digits" else PAPER
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("rank", "seeds", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


_steps = None  # steps done, shared by the worker processes


def _start_worker(steps) -> None:
    global _steps
    _steps = steps
    torch.set_num_threads(1)


def _advance() -> None:
    with _steps.get_lock():
        _steps.value += 1


def _work(seed: int, args: argparse.Namespace) -> "dict[str, dict]":
    return run_seed(seed, args, _advance)


def run_all(args: argparse.Namespace, progress: rich.progress.Progress) -> "list[dict[str, dict]]":
    """:func:`run_seed` of every seed. The digits' small models leave most of a machine idle: there each core takes seeds."""
    bar = progress.add_task("training and testing", total=None)
    if args.data != "digits" or args.seeds == 1:
        return [run_seed(seed, args, lambda: progress.advance(bar)) for seed in range(args.seeds)]
    per_seed = args.source_steps + 2 * args.epochs * (args.labels // min(args.batch, args.labels))
    progress.update(bar, total=args.seeds * per_seed)
    context = multiprocessing.get_context("spawn")
    steps = context.Value("q", 0)
    workers = min(os.cpu_count() or 1, args.seeds, 8)  # on a GPU each takes half a GB
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (steps,)) as pool:
        futures = [pool.submit(_work, seed, args) for seed in range(args.seeds)]
        while not all(future.done() for future in futures):
            progress.update(bar, completed=steps.value)
            time.sleep(0.2)
        progress.update(bar, completed=steps.value)
        return [future.result() for future in futures]


def main(argv: "list[str] | None" = None) -> None:
    args = arguments(argv)
    console = rich.console.Console()
    start = time.perf_counter()
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, console=console) as progress:
        runs = run_all(args, progress)
    seconds = time.perf_counter() - start
    summary = summarise(runs)

    labels = f"{args.labels} labels" if args.labels else "all labels"
    what = "digits, turned, bent and paler" if args.data == "digits" else f"{args.model} on {args.data}"
    title = f"{what}: {labels}, {args.adapter} rank {args.rank}, sigma {args.sigma:g}, {args.seeds} paired seeds"
    show(summary, title, console)
    picture(summary, title, args.out.with_suffix(".png"))
    record = {
        "command": " ".join(["python", "examples/finetune_vit.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": {**vars(args), "out": str(args.out)},
        "summary": summary,
        "runs": [{"seed": seed, **run} for seed, run in enumerate(runs)],
        "seconds": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.device}",
        "versions": {m.__name__: m.__version__ for m in (flatopt, torch, timm, peft)},
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"{seconds:.0f} s; wrote {args.out.with_suffix('.png')} and {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
