"""The methods compared: each takes a step of ``accumulation`` micro-batches; some can perturb and restore by themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer

from flatopt import SAM, FlatPerturbOptimizer

from .models import Case

SIGMA = 0.05  # any would do: the time does not depend on it


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
