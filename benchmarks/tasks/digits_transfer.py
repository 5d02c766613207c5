"""The digits transfer of ``digits.py``: a small timm ViT, adapted to turned, bent, paler digits.

A seed has a source model, labels, validation images and corruptions of its own; the 600 test images are the same for all.
"""

import functools
import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from . import digits


class DigitsTransfer:
    """See the module. ``quick``: a source model barely trained, and fewer test images."""

    name = "digits"
    targets = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    trained_head = None  # as in the paper's CLIP recipe

    def __init__(self, device: str, cache: Path, quick: bool = False):
        self.device, self.cache, self.quick = device, cache, quick
        self.fingerprint = hashlib.sha256(Path(digits.__file__).read_bytes()).hexdigest()[:16]

    def model(self, seed: int) -> nn.Module:
        """The source model of ``seed``; trained on the CPU, so that every device starts from the same."""
        self.cache.mkdir(parents=True, exist_ok=True)
        file = self.cache / f"digits-{'quick-' if self.quick else ''}{self.fingerprint}-{seed}.pt"
        if file.exists():
            return torch.load(file, map_location=self.device, weights_only=False)
        model = digits.source_model(digits.load(seed).source, seed, steps=10 if self.quick else 400)
        for p in model.parameters():
            p.grad = None
        beside = file.with_suffix(f".{os.getpid()}")
        torch.save(model, beside)  # another process may be building it too
        os.replace(beside, file)
        return model.to(self.device)

    def train(self, seed: int, labels: int) -> "tuple[Tensor, Tensor]":
        return tuple(digits.load(seed, labels, self.device).train)

    @functools.lru_cache(maxsize=32)  # noqa: B019 - a task lives as long as its process
    def evaluation(self, seed: int, labels: int) -> "dict[str, list[tuple[Tensor, Tensor]]]":
        data = digits.load(seed, labels, self.device)
        if self.quick:
            data = data._replace(test=digits.Images(*(tensor[:50] for tensor in data.test)))
        corrupted = sorted(digits.corruptions(data.test.images, seed), key=lambda entry: entry[1])
        return {
            "validation": [tuple(data.validation)],
            "test": [tuple(data.test)],
            "ood": [tuple(data.source)],
            "corrupted": [(images, data.test.labels) for _, _, images in corrupted],
        }
