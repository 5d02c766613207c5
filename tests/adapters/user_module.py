"""What a user writes to make a low-rank module known; checked by test_typing.py, not run."""

import torch
from torch import Tensor, nn

from flatopt import FlatPerturbOptimizer, register_low_rank


class MyLoRA(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.scale * (x @ self.down.t() @ self.up.t())
        return y


class Beside(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.wrapped = [linear]
        self.dense = nn.Parameter(torch.zeros_like(linear.weight))


def base_of(module: Beside) -> tuple[nn.Module, str]:
    return module.wrapped[0], "weight"


register_low_rank(MyLoRA, base=lambda m: m.linear.weight, delta=lambda m: (m.up, m.down, m.scale))
register_low_rank(MyLoRA, base=lambda m: m.linear.weight, delta=lambda m: [(m.up, m.down, m.scale), (m.up, m.down, 1.0)])
register_low_rank(Beside, base=base_of, delta=lambda m: m.dense)
model = nn.Sequential(MyLoRA(nn.Linear(8, 8), 2, 0.5))
optimizer = FlatPerturbOptimizer(
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), model, total_steps=10
)
