"""A flat optimizer from a model and an optimizer class, in one call."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .optimizers.flat import FlatPerturbOptimizer
from .optimizers.schedule import Schedule


def create_flat_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    sigma: float = 0.05,
    total_steps: int,
    schedule: Schedule = "cosine",
    noise: str = "filter",
    restore: str = "reversible",
    draws: str = "step",
    seed: int = 0,
    shared: bool = False,
    **kwargs: Any,
) -> FlatPerturbOptimizer:
    """``optimizer_cls`` over the trainable parameters of ``model``, around which its frozen base weights are perturbed.

    In the manner of PEFT's ``create_loraplus_optimizer``. The formula and the meaning of ``sigma`` (in units of the rms of
    each row of the merged weight), ``total_steps`` (in optimizer steps), ``schedule``, ``noise``, ``restore``, ``draws``,
    ``seed`` and ``shared`` stand at :class:`FlatPerturbOptimizer`.

    Args:
        model: a model with adapters: PEFT's, or of a module known by :func:`register_low_rank`.
        optimizer_cls: a ``torch.optim.Optimizer`` class.
        lr: learning rate of all trainable parameters.
        kwargs: passed on to ``optimizer_cls`` (``weight_decay``, ``betas``, ...).

    Raises:
        TypeError: if ``model`` is no module, or ``optimizer_cls`` a name or an optimizer.
        ValueError: if ``model`` has no trainable parameter, and whatever :class:`FlatPerturbOptimizer` refuses.

    Example::

        optimizer = create_flat_optimizer(model, torch.optim.AdamW, lr=5e-4, sigma=0.05, total_steps=1000, weight_decay=0.01)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r:.80}. For raw parameters, use FlatPerturbOptimizer")
    if isinstance(optimizer_cls, Optimizer) or not callable(optimizer_cls):
        raise TypeError(
            f"optimizer_cls must be a class, such as torch.optim.AdamW, got {optimizer_cls!r:.80}. Around an optimizer that "
            "is there already, put FlatPerturbOptimizer"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter. Add adapters first (peft.get_peft_model), or load them for "
            "training (PeftModel.from_pretrained(..., is_trainable=True))"
        )
    return FlatPerturbOptimizer(
        optimizer_cls(parameters, lr=lr, **kwargs),  # type: ignore[call-arg]
        model,
        sigma=sigma,
        total_steps=total_steps,
        schedule=schedule,
        noise=noise,
        restore=restore,
        draws=draws,
        seed=seed,
        shared=shared,
    )
