"""What the hooks on layers cost the host: forwards of many tiny layers, with and without an optimizer attached.

``python -m benchmarks.hooks [layers]`` takes half a minute on a CPU. Layers are LoRA on 32 x 32, so small that Python is all
that counts. Variants take turns; of each turn the least CPU time of this thread counts, and of those the median, as a busy
machine makes them longer. What is added is torch's slower way of calling a module that has any hook, which is measured by
itself with hooks that do nothing, and what flatopt's own do. W is perturbed and restored outside of the measured time.
"""

import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatopt import FlatPerturbOptimizer

TURNS, REPEATS = 40, 9


def model_of(layers: int) -> nn.Module:
    base = nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers)))
    return get_peft_model(base, LoraConfig(r=4, target_modules=r"\d+", init_lora_weights=False))


def train(model: nn.Module, x: torch.Tensor) -> None:
    model(x).sum().backward()


@torch.no_grad()
def read(model: nn.Module, x: torch.Tensor) -> None:
    model(x)


def least(call, model: nn.Module, x: torch.Tensor) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        call(model, x)
        times.append(time.thread_time() - start)
    return min(times) * 1e6


def main(layers: int = 192) -> None:
    torch.set_num_threads(1)
    bare, idle, attached, x = *(model_of(layers) for _ in range(3)), torch.randn(4, 32)
    for module in idle.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.register_forward_pre_hook(lambda module, args: None)
    adapters = [p for p in attached.parameters() if p.requires_grad]
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(adapters, lr=0.0), attached, sigma=0.05, schedule="constant")
    for name, call, before in (
        ("forward and backward, at W + noise", train, optimizer.perturb),
        ("forward without gradients, at W", read, optimizer.restore),
    ):
        turns = []
        for _ in range(TURNS):
            before()
            turns.append([least(call, model, x) for model in (bare, idle, attached)])
        plain, hooked, ours = map(statistics.median, zip(*turns[1:]))  # the first warms up
        print(
            f"{name}: {plain / 1e3:.2f} ms bare; us more a layer: "
            f"{(hooked - plain) / layers:.1f} with hooks that do nothing, {(ours - plain) / layers:.1f} with flatopt's"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
