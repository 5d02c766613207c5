"""One training run of the study: an adapter on a pretrained model, by one of the methods that are compared.

Every method trains the same adapter from the same start on the same batches; they differ in where the gradient is taken.
"""

import contextlib
import gc
import math
import warnings

import torch
from torch import Tensor, nn

import flatopt
from flatopt.flatness import rounding


def adapted(task, rank: int) -> nn.Module:
    """The task's model with LoRA on its targets, alpha = 2 r."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(task.model(), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(task.targets)))


def as_it_is():
    """Inside, compiled modules run as written: compiled code sees neither hooks that come later nor that W is to be
    differentiated."""
    return torch.compiler.set_stance("force_eager")


def compile_blocks(model: nn.Module, kind: str) -> None:
    """Compile the modules of class ``kind``: of a model of many small layers most time goes to the number of kernels.

    One shape a kernel and no limit on how many: what a run computes must not depend on what ran before it.
    """
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module).__name__ == kind:
            module.compile(dynamic=False)


class Lora:
    """One adapted layer: its frozen weight and factors as matrices (rows, fan-in), (rows, r), (r, fan-in)."""

    def __init__(self, layer: nn.Module):
        self.weight = layer.get_base_layer().weight
        self.A, self.B, self.module = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer
        self.scaling = layer.scaling["default"]

    @property
    def rows(self) -> Tensor:
        return self.weight.detach().flatten(1)

    def merged(self) -> Tensor:
        return self.rows.float() + self.scaling * (self.B.detach().flatten(1) @ self.A.detach().flatten(1))


class Gradient:
    """``gradient(batch)`` leaves the gradient in ``.grad`` of ``parameters`` and returns the loss.

    On CUDA the forward and backward of a batch are captured once and replayed: layers this small wait for Python otherwise.
    """

    def __init__(self, model: nn.Module, loss_fn, batch: "tuple[Tensor, ...]", parameters: "list[Tensor]"):
        self.parameters, self.batch, self.graph = parameters, tuple(t.clone() for t in batch), None
        self.model, self.loss_fn = model, loss_fn
        if batch[0].is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._compute()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss, self.grads = self._compute()

    def _compute(self) -> "tuple[Tensor, tuple[Tensor, ...]]":
        frozen = [p for p in self.parameters if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        loss = self.loss_fn(self.model, self.batch)[0]
        grads = torch.autograd.grad(loss, self.parameters)
        for p in frozen:
            p.requires_grad_(False)
        return loss.detach(), grads

    def __call__(self, batch: "tuple[Tensor, ...]") -> Tensor:
        for static, given in zip(self.batch, batch):
            static.copy_(given)
        if self.graph is None:
            self.loss, self.grads = self._compute()
        else:
            self.graph.replay()
        for p, g in zip(self.parameters, self.grads):
            p.grad = g
        return self.loss


class Trainer:
    """A task's adapted model, and training it anew for every run."""

    def __init__(self, task, rank: "int | None" = None):
        self.task, self.rank = task, rank or task.rank
        self.model = adapted(task, self.rank)
        self.layers = [Lora(m) for m in self.model.modules() if hasattr(m, "lora_A")]
        self.parameters = [p for layer in self.layers for p in (layer.A, layer.B)]
        if self.layers[0].weight.is_cuda and task.block is not None:
            compile_blocks(self.model, task.block)
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # the pretrained statistics stay
        self.batch = tuple(t[: task.batch] for t in task.train(0))
        self._gradients = {}

    def gradient(self, full: bool = False, parts: int = 1, key: object = None) -> Gradient:
        """Of the adapter alone, or of the frozen weights too; of a batch, or of one of its ``parts``.

        The last is kept, by these and by ``key``, for a method that changes what is computed: each has a graph's memory.
        """
        known = full, parts, key
        if known not in self._gradients:
            self.drop_gradients()
            wanted = [*self.parameters, *([layer.weight for layer in self.layers] if full else [])]
            batch = tuple(t[: len(t) // parts] for t in self.batch)
            with as_it_is() if key or full else contextlib.nullcontext():
                self._gradients[known] = Gradient(self.model, self.task.loss_and_accuracy, batch, wanted)
        return self._gradients[known]

    def drop_gradients(self) -> None:
        self._gradients.clear()

    def reset(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            bound = 1 / math.sqrt(layer.A[0].numel())
            with torch.no_grad():
                layer.A.copy_((torch.rand(layer.A.shape, generator=generator) * 2 - 1) * bound)
                layer.B.zero_()

    def run(self, config: dict, seed: int) -> None:
        """Train by ``config``: ``method``, ``strength`` (σ, factor or ρ), ``lr``, ``steps``, ``weight_decay``, ``ema``."""
        from .rivals import RIVALS

        self.reset(seed)
        steps = config["steps"]
        for p in self.parameters:
            p.grad = None
        optimizer = torch.optim.AdamW(
            self.parameters, lr=config["lr"], weight_decay=config["weight_decay"], fused=self.batch[0].is_cuda
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with contextlib.ExitStack() as cleanup:
            step_by = {**METHOD, **RIVALS}[config["method"]](self, optimizer, config, seed)
            cleanup.callback(getattr(step_by, "close", lambda: None))
            average = [p.detach().clone() for p in self.parameters] if config["ema"] else []
            data = self.task.train(seed)
            for step, index in enumerate(indices(len(data[0]), steps, self.task.batch, seed)):
                step_by(step, tuple(t[index.to(t.device)] for t in data))
                scheduler.step()
                if average:
                    torch._foreach_lerp_(average, [p.detach() for p in self.parameters], 1 - config["ema"])
            if average:
                torch._foreach_copy_([p.detach() for p in self.parameters], average)
        del step_by, optimizer, scheduler
        gc.collect()  # lets go of the hooks of a FlatPerturbOptimizer

    @contextlib.contextmanager
    def rounded_base(self, form: "str | None"):
        """Inside, the adapted layers' W stands at its values rounded to ``form``."""
        if form is None:
            yield
            return
        round_to = rounding(form)
        offsets = [round_to(layer.rows.float()) - layer.rows.float() for layer in self.layers]
        with self.moved(offsets), torch.enable_grad():
            yield

    @contextlib.contextmanager
    def moved(self, offsets: "list[Tensor]"):
        """W + offset inside; afterwards W's bits."""
        weights = [layer.rows for layer in self.layers]
        clean = [w.clone() for w in weights]
        with torch.no_grad():
            for w, offset in zip(weights, offsets):
                w.copy_(w.float() + offset)
            try:
                yield
            finally:
                torch._foreach_copy_(weights, clean)


def indices(size: int, steps: int, batch: int, seed: int):
    """``steps`` batches of indices, reshuffled each time round; short last ones are dropped."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(size, generator=generator)
        yield order[:batch]
        order = order[batch:]


def rising(step: int, steps: int) -> float:
    return 0.5 * (1 - math.cos(math.pi * step / steps))


# A method is given the trainer, the optimizer and the run's settings, and returns ``step(number, batch)``.


def plain(trainer, optimizer, config, seed):
    gradient = trainer.gradient()

    def step(_, batch):
        gradient(batch)
        optimizer.step()

    return step


def flat(trainer, optimizer, config, seed):
    """The library's: the noise of Eq. 7, taken off bit for bit."""
    gradient = trainer.gradient()
    wrapped = flatopt.FlatPerturbOptimizer(
        optimizer, trainer.model, sigma=config["strength"], total_steps=config["steps"], seed=seed
    )

    def step(_, batch):
        wrapped.perturb()
        gradient(batch)  # a replayed graph calls no hooks
        wrapped.step()

    return step


def qat(trainer, optimizer, config, seed):
    """The library's quantisation-aware training: in a share ``strength`` of each batch, 1 or 1 / n, the merged weight is
    that of ``form`` (without it int4, a scale a row); in the rest W is clean. ``way``: how far W is moved, 1 without it,
    or ``"rising"`` as the noise does."""
    share, way = config["strength"], config.get("way", 1)
    parts, rises = 2 if share == 1 else round(1 / share), way == "rising"
    gradient = trainer.gradient(parts=parts)
    # a replayed graph calls no hooks: they say so, and the step below does what they would
    warnings.filterwarnings("ignore", "draws=|noise=.* in every forward")
    wrapped = flatopt.FlatPerturbOptimizer(
        optimizer,
        trainer.model,
        sigma=1 if rises else way,
        schedule="cosine" if rises else "constant",
        total_steps=config["steps"],
        noise=config.get("form", "int4"),
        restore="copy",
        draws="step" if share == 1 else f"mixed/{parts}",
    )

    def step(_, batch):
        size, sums = len(batch[0]) // parts, [torch.zeros_like(p) for p in trainer.parameters]
        for k in range(parts):
            if k == 0 or share == 1:
                wrapped.perturb()
            else:
                wrapped.restore()
            gradient(tuple(t[k * size : (k + 1) * size] for t in batch))
            torch._foreach_add_(sums, [p.grad for p in trainer.parameters], alpha=1 / parts)
        for p, total in zip(trainer.parameters, sums):
            p.grad = total
        wrapped.step()

    return step


def group_noise(merged: Tensor, group: int, bits: int, generator: torch.Generator, shape: str = "uniform") -> Tensor:
    """Uniform over one rounding step of a symmetric format, max|W'| / (2^(bits-1) - 1) in each group of ``group`` inputs; or
    Gaussian of the same std."""
    rows, fan_in = merged.shape
    filled = nn.functional.pad(merged, (0, -fan_in % group)).view(rows, -1, group)
    width = filled.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    draw = {"uniform": torch.rand, "gaussian": torch.randn}[shape](filled.shape, device=merged.device, generator=generator)
    u = draw.sub_(0.5) if shape == "uniform" else draw.div_(math.sqrt(12))
    return u.mul_(width).view(rows, -1)[:, :fan_in]


def group(trainer, optimizer, config, seed):
    """Noise shaped like int4 by groups of 64: std = strength × step/√12; uniform, or of the ``shape`` that is given."""
    gradient, shape = trainer.gradient(), config.get("shape", "uniform")
    generator = torch.Generator(trainer.batch[0].device).manual_seed(seed)

    def step(number, batch):
        factor = config["strength"] * rising(number, config["steps"])
        with trainer.moved([factor * group_noise(layer.merged(), 64, 4, generator, shape) for layer in trainer.layers]):
            gradient_in(gradient, batch)
        optimizer.step()

    return step


def gradient_in(gradient, batch):
    with torch.enable_grad():
        return gradient(batch)


def sam(space: str):
    def make(trainer, optimizer, config, seed):
        gradient = trainer.gradient(full=space == "full")
        wrapped = flatopt.SAM(
            optimizer, rho=config["strength"], space=space, targets=trainer.model if space == "full" else None
        )
        return lambda _, batch: wrapped.step(lambda: gradient(batch))

    return make


METHOD = {
    "plain": plain,
    "flat": flat,
    "group": group,
    "qat": qat,
    "sam-adapter": sam("adapter"),
    "sam-full": sam("full"),
}
