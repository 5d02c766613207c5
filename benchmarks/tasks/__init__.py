"""The tasks of the ablation benchmark. Both are real and need no network.

A task is a class ``Task(device, cache, quick)`` with

- ``name``; ``targets``: names of the linear layers that get adapters; ``trained_head``: a module trained in full, or None;
- ``fingerprint``: hash of its data (and of its source model), so that results of different data are never compared;
- ``model(seed)``: a fresh copy of the source model; ``train(seed, labels)``: the labelled tensors ``(x, y)``;
- ``evaluation(seed, labels)``: ``{"validation" | "test" | "ood" | "corrupted": [(x, y), ...]}``, all of it disjoint from
  ``train(seed, labels)``; ``corrupted`` has five entries or a multiple of five, sorted by severity.

What is expensive is built once and cached in the folder ``cache``.
"""


def load(name: str, device: str, cache, quick: bool = False):
    if name == "digits":
        from .digits_transfer import DigitsTransfer

        return DigitsTransfer(device, cache, quick)
    if name == "text":
        from .text import Text

        return Text(device, cache, quick)
    raise ValueError(f"unknown task {name!r}: digits or text")
