"""What the hooks cost the host: a layer that owns W and a forward, with an optimizer attached and without.

``python -m benchmarks.hooks``, a minute on a CPU. Layers are LoRA on 32 x 32, so small that Python is all that counts, and
few, so that some forwards pass uninterrupted on a busy machine. Variants take turns; of each turn the least CPU time of this
thread counts, and of those the median. Two sizes tell the cost of a layer from that of a forward. What is added is torch's
slower way of calling a module that has any hook, measured by itself with hooks that do nothing, and what flatopt's hooks do.
W is perturbed and restored outside of the measured time.
"""

import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatopt import FlatPerturbOptimizer

SIZES, TURNS, REPEATS = (1, 5), 12, 200


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


def idle_hooks(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.register_forward_pre_hook(lambda module, args: None)
    return model


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(4, 32)
    models = [(model_of(n), idle_hooks(model_of(n)), model_of(n)) for n in SIZES]
    optimizers = []
    for *_, model in models:
        adapter = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        optimizers.append(FlatPerturbOptimizer(adapter, model, sigma=0.05, schedule="constant"))
    for name, call, before in (
        ("forward and backward, at W + noise", train, FlatPerturbOptimizer.perturb),
        ("forward without gradients, at W", read, FlatPerturbOptimizer.restore),
    ):
        turns = []
        for _ in range(TURNS):
            for optimizer in optimizers:
                before(optimizer)
            turns.append([least(call, model, x) for some in models for model in some])
        bare, idle, ours, *larger = map(statistics.median, zip(*turns[1:]))  # the first warms up
        layers = SIZES[1] - SIZES[0]
        idle_layer, layer = ((b - a - larger[0] + bare) / layers for a, b in zip((idle, ours), larger[1:]))
        print(
            f"{name}: a bare layer {(larger[0] - bare) / layers:.1f} us; added a layer {layer:.1f} (hooks that do nothing "
            f"{idle_layer:.1f}), a forward {ours - bare - SIZES[0] * layer:.0f}"
        )


if __name__ == "__main__":
    main()
