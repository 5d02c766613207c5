"""What the hooks cost the host: of a layer that owns W, and of the model's forward as a whole.

``python -m benchmarks.hooks``, a minute on a CPU. The layer is LoRA on 32 x 32, so small that Python is all that
counts, and is timed from inside the forward of its model. Models take turns; of each turn the least CPU time of this
thread counts, which a busy machine disturbs least, and of those the median. What is added is torch's slower way of
calling a module that has any hook, measured by itself with hooks that do nothing, and what flatopt's hooks do.
"""

import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatopt import FlatPerturbOptimizer

TURNS, REPEATS, CALLS = 15, 300, 10


def least(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append(time.thread_time() - start)
    return min(times) / CALLS * 1e6


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.timed, self.us = nn.Linear(32, 32), False, 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.timed:
            self.us = least(lambda: self.layer(x))
        return self.layer(x)


def adapted(hooks_that_do_nothing: bool = False) -> nn.Module:
    model = get_peft_model(Model(), LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    if hooks_that_do_nothing:
        model.get_base_model().layer.base_layer.register_forward_pre_hook(lambda module, args: None)
    return model


def of_layer_and_forward(model: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    inner = model.get_base_model()
    inner.timed = True
    model(x)
    inner.timed = False
    return inner.us, least(lambda: model(x))


def main() -> None:
    torch.set_num_threads(1)
    bare, idle, attached, x = adapted(), adapted(hooks_that_do_nothing=True), adapted(), torch.randn(4, 32)
    adapter = torch.optim.SGD([p for p in attached.parameters() if p.requires_grad], lr=0.0)
    optimizer = FlatPerturbOptimizer(adapter, attached, sigma=0.05, schedule="constant")
    for name, gradients, before in (
        ("training, W perturbed", True, optimizer.perturb),
        ("evaluating, W clean", False, optimizer.restore),
    ):
        turns = []
        for model in (bare, idle, attached):
            model.train(gradients)
        for _ in range(TURNS):
            before()
            with torch.set_grad_enabled(gradients):
                turns.append([us for model in (bare, idle, attached) for us in of_layer_and_forward(model, x)])
        plain, plain_forward, hooked, _, ours, forward = map(statistics.median, zip(*turns[1:]))  # the first warms up
        print(
            f"{name}: a layer {plain:.1f} us, {hooked - plain:+.1f} with hooks that do nothing, {ours - plain:+.1f} with "
            f"flatopt's; a forward {forward - plain_forward - (ours - plain):+.0f}"
        )


if __name__ == "__main__":
    main()
