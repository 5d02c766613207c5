"""Flat-LoRA in Lightning's Trainer: one callback."""

import math
import warnings
from typing import Any

try:
    import lightning.pytorch as pl
except ImportError:  # the older package of the same code
    import pytorch_lightning as pl  # type: ignore[no-redef]

from ..optimizers.flat import FlatPerturbOptimizer
from .options import checked, warn_late
from .unwrap import bare_optimizer


class FlatPerturbCallback(pl.Callback):
    """Trains the adapters of a ``LightningModule`` at randomly perturbed base weights.

    The same as wrapping the optimizer in ``configure_optimizers`` (:class:`flatopt.FlatPerturbOptimizer` has the formula),
    with :math:`T` = ``trainer.estimated_stepping_batches`` and :math:`t` = ``trainer.global_step``. Automatic and manual
    optimization, accumulation, ``bf16-mixed``; validation and checkpoints see the clean weights; a run resumed with
    ``ckpt_path`` goes on bit for bit.

    Args:
        sigma: noise std in units of the rms of each row of the merged weight; ≥ 0. 0 is plain training.
        total_steps: :math:`T` in optimizer steps, where the trainer cannot know it: it counts a batch as a step under
            manual optimization, and knows nothing of endless data.
        seed: names the noise.
        targets: None: every adapted layer of the module; or target groups as ``FlatPerturbOptimizer`` takes them.
        schedule, noise, restore, draws, shared: as in :class:`flatopt.FlatPerturbOptimizer`.

    Raises:
        ValueError: at once for a value that does not fit; when training begins, if ``total_steps`` is needed and unknown, if
            the module has several optimizers, and for what ``FlatPerturbOptimizer`` refuses.

    Example::

        trainer = lightning.Trainer(max_epochs=3, callbacks=[FlatPerturbCallback(sigma=0.05)])
        trainer.fit(module, loader)
    """

    def __init__(
        self,
        sigma: float = 0.05,
        *,
        total_steps: int | None = None,
        seed: int = 0,
        targets: Any = None,
        schedule: Any = "cosine",
        noise: str = "filter",
        restore: str = "reversible",
        draws: str = "step",
        shared: bool = False,
    ):
        self.targets, self.total_steps = targets, total_steps
        self.options = checked(
            sigma=sigma, seed=seed, schedule=schedule, noise=noise, restore=restore, draws=draws, shared=shared
        )
        self.optimizer: FlatPerturbOptimizer | None = None
        self.loaded = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.detach()
        if trainer.ckpt_path and trainer.global_step and not self.loaded:
            warn_late(trainer.global_step)
        self.loaded = False
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"FlatPerturbCallback works with one optimizer, {type(pl_module).__name__} has {len(trainer.optimizers)}. "
                "Wrap the adapter's in configure_optimizers: FlatPerturbOptimizer(optimizer, self.model, total_steps=...)"
            )
        total = self.total_steps
        if total is None and self.options["schedule"] != "constant":
            total = trainer.estimated_stepping_batches
            if not (math.isfinite(total) and total >= 1):
                raise ValueError(
                    "the trainer does not know how many steps it will take: set max_steps in the Trainer, or total_steps in "
                    "FlatPerturbCallback"
                )
        targets = pl_module if self.targets is None else self.targets
        bare = bare_optimizer(trainer.optimizers[0])
        options = {name: value for name, value in self.options.items() if name != "seed"}
        self.optimizer = FlatPerturbOptimizer(bare, targets, total_steps=total, **options)
        # not what a checkpoint left with the optimizer: load_state_dict tells where that is another
        self.optimizer.seed, self.optimizer.step_count = self.options["seed"], trainer.global_step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.detach()

    def detach(self) -> None:
        """W clean, no hooks left on the module or the optimizer."""
        optimizer, self.optimizer = self.optimizer, None
        if optimizer is not None:
            optimizer.detach()

    def state_dict(self) -> dict[str, Any]:
        """Plain values, kept in the checkpoint to tell a change of settings on resume."""
        return {name: value for name, value in self.options.items() if not callable(value)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = True
        now = self.state_dict()
        changed = [f"{k} was {v}, is {now[k]}" for k, v in state_dict.items() if now.get(k, v) != v]
        if changed:
            warnings.warn(
                f"FlatPerturbCallback goes on with other settings than the checkpoint's: {'; '.join(changed)}. The run will "
                "differ from one that was never stopped.",
                stacklevel=2,
            )
