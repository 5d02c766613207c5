"""Draws the pictures of how-it-works.md with the library's own functions: ``python docs/pictures.py``."""

import math
from pathlib import Path

import matplotlib
import torch
from torch import nn

from flatopt import FlatPerturbOptimizer, register_low_rank

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parent / "images"
GREY, BLUE, ORANGE = "#7a7a7a", "#0b62a4", "#d9730d"
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


class Frozen(nn.Module):
    """A weight alone, as flatopt sees it under an adapter that adds nothing."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down, self.up = nn.Parameter(torch.zeros(1, weight.shape[1])), nn.Parameter(torch.zeros(weight.shape[0], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


register_low_rank(Frozen, base=lambda m: m.weight, delta=lambda m: (m.up, m.down, 1.0))


def save(figure, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=130)
    plt.close(figure)


def objective() -> None:
    """A sketch: two minima, equally deep and equally wide along the adapter's direction; one is sharp along the others."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained", sharey=True)
    t = torch.linspace(-1, 1, 201)
    for panel, title, widths in (
        (panels[0], "along the adapter's directions", (1.0, 1.0)),
        (panels[1], "along all directions of W", (6.0, 1.2)),
    ):
        for width, colour, label in zip(widths, (GREY, BLUE), ("plain", "flat")):
            panel.plot(t, 0.15 * width * t**2, color=colour, lw=2, label=label)
        panel.set_title(title, fontsize=10)
        panel.set_xticks([0], ["W + sBA"])
        panel.set_yticks([])
    panels[0].set_ylabel("loss (a sketch)")
    panels[0].legend(frameon=False)
    save(figure, "objective")


def step() -> None:
    """Which weights who sees, along a step of two micro-batches with an evaluation between them."""
    parts = [
        ("forward 1", "W + ε"), ("backward 1", "W + ε"), ("evaluate", "W"), ("forward 2", "W + ε"), ("backward 2", "W + ε"),
        ("step(): restore", "W"), ("wrapped\noptimizer", "W"),
    ]  # fmt: skip
    figure, panel = plt.subplots(figsize=(9, 1.6), layout="constrained")
    for i, (what, weights) in enumerate(parts):
        colour = BLUE if "ε" in weights else "#c8c8c8"
        panel.barh(0, 0.96, left=i, color=colour, height=0.8)
        dark = "white" if "ε" in weights else "black"
        panel.text(i + 0.48, 0.12, what, ha="center", va="center", color=dark, fontsize=9)
        panel.text(i + 0.48, -0.24, f"at {weights}", ha="center", va="center", color=dark, fontsize=8)
    panel.annotate("", (len(parts), -0.6), (0, -0.6), arrowprops={"arrowstyle": "->"})
    panel.set_ylim(-0.75, 0.5)
    panel.axis("off")
    save(figure, "step")


def reversible() -> None:
    """The map on a line, for one |ε|: the even blocks go up, the odd ones down, and twice is nothing."""
    length = 0.4
    w = torch.linspace(-1, 1, 4001)
    moved = w + length * (1 - 2 * (torch.floor(w / length) % 2))
    figure, panel = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for k in range(math.floor(-1 / length), math.ceil(1 / length)):
        inside = torch.floor(w / length) == k
        panel.plot(w[inside], moved[inside], color=BLUE if k % 2 == 0 else ORANGE, lw=2)
        panel.axvspan(max(-1, k * length), min(1, (k + 1) * length), color=BLUE if k % 2 == 0 else ORANGE, alpha=0.07, lw=0)
    panel.plot(w, w, color=GREY, lw=0.8, ls="--")
    panel.set_xlabel("w")
    panel.set_ylabel("f(w) = w ± |ε|")
    panel.set_xlim(-1, 1)
    save(figure, "reversible")


def noise(sigma: float = 0.05) -> None:
    """What the library adds to weights of N(0, 1) in both exact modes, in fp32 and bf16, and that it takes it off again."""
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3), layout="constrained", sharey=True)
    z = torch.linspace(-4, 4, 401)
    for panel, dtype in zip(panels, (torch.float32, torch.bfloat16)):
        for restore, colour in (("copy", GREY), ("reversible", BLUE)):
            model = Frozen(torch.randn(256, 4096, generator=torch.Generator().manual_seed(0)).to(dtype))
            before = model.weight.clone()
            parameters = [model.down, model.up]
            optimizer = FlatPerturbOptimizer(
                torch.optim.SGD(parameters, lr=1.0), model, sigma=sigma, schedule="constant", restore=restore
            )
            optimizer.perturb()
            added = (model.weight.double() - before.double()).flatten() / sigma
            optimizer.restore()
            assert torch.equal(model.weight, before)
            counts = torch.histc(added[added != 0].float(), bins=24, min=-3.75, max=3.75) / (len(added) * 7.5 / 24)
            label = f"{restore}: std {added.std():.3f}, {100 * (added == 0).double().mean():.1f} % unmoved"
            panel.step(torch.linspace(-3.75, 3.75 - 7.5 / 24, 24), counts, where="post", color=colour, lw=1.5, label=label)
        panel.plot(z, torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), color="black", lw=0.8, ls="--", label="Gaussian")
        panel.set_title(str(dtype).removeprefix("torch."), fontsize=10)
        panel.set_xlabel("ε / (σ · rms), elements that moved")
        panel.legend(frameon=False, fontsize=7, loc="upper right")
        panel.set_ylim(0, 0.68)
    save(figure, "noise")


if __name__ == "__main__":
    objective()
    step()
    reversible()
    noise()
