"""Estimators of the field and of our own making, in the form of ``methods``: none is in the library.

Where a step takes two gradients, each is of one half of the batch: it costs what plain training costs.
"""

import math

import torch
from torch import Tensor, nn

from .methods import gradient_in, rising


def noise_of(trainer, config: dict, number: int, generator: torch.Generator) -> "list[Tensor]":
    """Eq. 7's noise on each layer: N(0, σ²/n · ‖row of the merged weight‖²), of step ``number``."""
    sigma, found = config["strength"] * rising(number, config["steps"]), []
    for layer in trainer.layers:
        merged = layer.merged()
        std = merged.norm(dim=1, keepdim=True).mul_(sigma / math.sqrt(merged.shape[1]))
        found.append(torch.randn(merged.shape, device=merged.device, generator=generator).mul_(std))
    return found


def halves(places):
    """One half of the batch at each of two places: ``places(trainer, config, number, generator)`` gives W's offsets."""

    def make(trainer, optimizer, config, seed):
        gradient = trainer.gradient(parts=2)
        generator = torch.Generator(trainer.batch[0].device).manual_seed(seed)

        def step(number, batch):
            sums = None
            for k, offsets in enumerate(places(trainer, config, number, generator)):
                half = len(batch[0]) // 2
                with trainer.moved(offsets):
                    gradient_in(gradient, tuple(t[k * half : (k + 1) * half] for t in batch))
                grads = [p.grad.clone() for p in trainer.parameters]
                sums = grads if sums is None else torch._foreach_add(sums, grads)
            for p, total in zip(trainer.parameters, sums):
                p.grad = total / 2
            optimizer.step()

        return step

    return make


def at_plus_and_minus(*given):
    """NSO's pairs (TMLR 2024): +ε and -ε."""
    noise = noise_of(*given)
    return noise, [-each for each in noise]


def at_two_draws(*given):
    return noise_of(*given), noise_of(*given)


def at_w_and_noise(*given):
    """mARWP's mixture (λ = ½): clean and noisy."""
    noise = noise_of(*given)
    return [torch.zeros_like(each) for each in noise], noise


class Activations:
    """Noise of the same variance on a layer's outputs, a draw of its own for every token: σᵢ‖x‖z, σᵢ as in Eq. 7."""

    def __init__(self, trainer, optimizer, config, seed):
        self.trainer, self.optimizer, self.config = trainer, optimizer, config
        torch.manual_seed(seed)  # a captured graph draws from the device's own generator
        if not hasattr(trainer, "activation_stds"):
            device = trainer.batch[0].device
            trainer.activation_stds = [torch.zeros(len(layer.rows), device=device) for layer in trainer.layers]
        self.hooks = [
            layer.module.register_forward_hook(self.add(std)) for layer, std in zip(trainer.layers, trainer.activation_stds)
        ]
        self.gradient = trainer.gradient(key="activations")

    @staticmethod
    def add(std: Tensor):
        def hook(module, inputs, output):
            channels = 1 if isinstance(module.get_base_layer(), nn.Conv2d) else -1
            length = inputs[0].detach().float().norm(dim=channels, keepdim=True)
            shape = (-1, 1, 1) if channels == 1 else (-1,)
            noise = length * std.view(shape) * torch.randn(output.shape, device=output.device)
            return output + noise.to(output.dtype)

        return hook

    def __call__(self, number, batch):
        sigma = self.config["strength"] * rising(number, self.config["steps"])
        with torch.no_grad():
            for layer, std in zip(self.trainer.layers, self.trainer.activation_stds):
                merged = layer.merged()
                std.copy_(merged.norm(dim=1) * (sigma / math.sqrt(merged.shape[1])))
        self.gradient(batch)
        self.optimizer.step()

    def close(self):
        for hook in self.hooks:
            hook.remove()


def nbar(trainer, optimizer, config, seed):
    """nBAR (NeurIPS 2024): before each update A grows by 1 + a·lr and B shrinks by 1 - a·lr where ‖g_A‖ ≥ ‖g_B‖, or the
    other way round; a falls linearly to 0."""
    gradient = trainer.gradient()

    def step(number, batch):
        gradient(batch)
        a = config["strength"] * (1 - number / config["steps"]) * optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for layer in trainer.layers:
                sign = torch.where(layer.A.grad.norm() >= layer.B.grad.norm(), a, -a)
                layer.A.mul_(1 + sign)
                layer.B.mul_(1 - sign)
        optimizer.step()

    return step


def efm(trainer, optimizer, config, seed, decay: float = 0.9):
    """EFMLoRA (arXiv 2508.00522), as we read it: the ascent ρ g_W/‖g_W‖ in the space of W, carried to B by A's
    pseudo-inverse, from an average over past gradients of B.

    From g_B = s g_W Aᵀ the part of g_W that A sees is g_B (AAᵀ)⁻¹ A / s, and s ε_B A = ε_W gives ε_B = ε_W A⁺ / s."""
    gradient = trainer.gradient()
    means = [torch.zeros_like(layer.B) for layer in trainer.layers]

    def ascent() -> "list[Tensor]":
        found, size = [], torch.zeros((), device=trainer.batch[0].device)
        for layer, mean in zip(trainer.layers, means):
            A = layer.A.detach().flatten(1).float()
            ridge = 1e-6 * A.square().sum() * torch.eye(len(A), device=A.device)
            solved = torch.linalg.solve(A @ A.t() + ridge, mean.flatten(1).float(), left=False)  # g_B (AAᵀ)⁻¹
            size += (solved @ A / layer.scaling).square().sum()
            found.append(solved / layer.scaling**2)
        return [config["strength"] * each / size.sqrt().clamp(min=1e-12) for each in found]

    def step(number, batch):
        clean = [layer.B.detach().clone() for layer in trainer.layers]
        with torch.no_grad():
            if number:
                for layer, up in zip(trainer.layers, ascent()):
                    layer.B.add_(up.view_as(layer.B).to(layer.B.dtype))
        gradient(batch)
        with torch.no_grad():
            for layer, before, mean in zip(trainer.layers, clean, means):
                layer.B.copy_(before)
                mean.lerp_(layer.B.grad, 1 - decay)
        optimizer.step()

    return step


class Dropout:
    """PEFT's ``lora_dropout`` at rate ``strength``."""

    def __init__(self, trainer, optimizer, config, seed):
        torch.manual_seed(seed)
        self.optimizer, rate = optimizer, config["strength"]
        self.adapters = [layer.module.lora_dropout for layer in trainer.layers]
        for dropouts in self.adapters:
            dropouts["default"] = nn.Dropout(rate)
        self.gradient = trainer.gradient(key=("dropout", rate))

    def __call__(self, number, batch):
        self.gradient(batch)
        self.optimizer.step()

    def close(self):
        for dropouts in self.adapters:
            dropouts["default"] = nn.Identity()


def bilora(trainer, optimizer, config, seed):
    """Bi-LoRA (arXiv 2508.19564): a second pair climbs by the same backward; √Σ‖B₂A₂‖² is kept ≤ ρ; dropped at the end."""
    gradient = trainer.gradient(full=True)
    generator = torch.Generator().manual_seed(seed + 1)
    device, pairs = trainer.batch[0].device, []
    for layer in trainer.layers:
        m, n = layer.rows.shape
        A = torch.rand(trainer.rank, n, generator=generator).sub(0.5).mul(2 / math.sqrt(n)).to(device)
        pairs.append((torch.zeros(m, trainer.rank, device=device), A))

    def step(_, batch):
        scaling = trainer.layers[0].scaling
        with trainer.moved([scaling * (B @ A) for B, A in pairs]):
            gradient_in(gradient, batch)
            lr = optimizer.param_groups[0]["lr"]
            for layer, (B, A) in zip(trainer.layers, pairs):
                g = layer.weight.grad.flatten(1).float()
                up_B, up_A = scaling * g @ A.t(), scaling * B.t() @ g
                B.add_(up_B, alpha=lr)
                A.add_(up_A, alpha=lr)
            length = torch.stack([(scaling * (B @ A)).square().sum() for B, A in pairs]).sum().sqrt()
            shrink = (config["strength"] / length.clamp(min=1e-12)).clamp(max=1).sqrt()
            for B, A in pairs:
                B.mul_(shrink)
                A.mul_(shrink)
        optimizer.step()

    return step


RIVALS = {
    "bilora": bilora,
    "antithetic": halves(at_plus_and_minus),
    "two draws": halves(at_two_draws),
    "mixed": halves(at_w_and_noise),
    "activations": Activations,
    "efm": efm,
    "nbar": nbar,
    "dropout": Dropout,
}
