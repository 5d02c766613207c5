"""Flat-LoRA in transformers' Trainer and what is built on it (TRL, axolotl, LLaMA-Factory): one callback."""

import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..optimizers.flat import FlatPerturbOptimizer
from .options import checked, warn_late
from .unwrap import bare_optimizer


class FlatPerturbCallback(TrainerCallback, ExportableState):
    r"""Trains the adapters of a ``transformers.Trainer`` at randomly perturbed base weights, whatever its optimizer.

    .. math::
        \varepsilon_{ij} \sim \mathcal N\Big(0,\ \frac{\sigma_t^2}{n}\,\lVert (W + sBA)_{i,:}\rVert^2\Big), \qquad
        \sigma_t = \sigma\cdot\tfrac12\big(1-\cos(\pi t/T)\big), \qquad t = \texttt{global\_step},\ T = \texttt{max\_steps}

    for every frozen weight W :math:`(m \times n)` under an adapter; the same as ``Trainer(optimizers=(
    FlatPerturbOptimizer(optimizer, model, ...), None))``. Noise is named by (seed, global step, weight, rank), so a run
    resumed from a checkpoint goes on bit for bit. Evaluation, generation and checkpoints see the clean weights.

    Args:
        sigma: noise std in units of the rms of each row of the merged weight; ≥ 0. 0 is plain training. A trial of
            ``hyperparameter_search`` that has a parameter named ``sigma`` trains with that.
        seed: names the noise.
        targets: None: every adapted layer of the trained model. Or target groups as ``FlatPerturbOptimizer`` takes them,
            or a function from the model to them, for a model that the trainer makes itself (``peft_config=``,
            ``model_init=``).
        schedule, noise, restore, draws, shared: as in :class:`flatopt.FlatPerturbOptimizer`.

    Raises:
        ValueError: at once for a value that does not fit; when training begins, for models that ``FlatPerturbOptimizer``
            refuses, and if the trainer's optimizer is a ``FlatPerturbOptimizer`` already.

    Example::

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[FlatPerturbCallback(sigma=0.05)])
        trainer.train()
    """

    def __init__(
        self,
        sigma: float = 0.05,
        *,
        seed: int = 0,
        targets: Any = None,
        schedule: Any = "cosine",
        noise: str = "filter",
        restore: str = "reversible",
        draws: str = "step",
        shared: bool = False,
    ):
        self.targets = targets
        self.options = checked(
            sigma=sigma, seed=seed, schedule=schedule, noise=noise, restore=restore, draws=draws, shared=shared
        )
        self.of_trial: dict[str, Any] = {}
        self.optimizer: FlatPerturbOptimizer | None = None
        self.not_restored: list[str] = []

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps: plain values. ``targets`` and a schedule of your own are not among them."""
        own = {"targets": self.targets is not None, "schedule": callable(self.options["schedule"])}
        lost = [name for name, is_own in own.items() if is_own]
        args = {name: value for name, value in {**self.options, **self.of_trial}.items() if name not in lost}
        return {"args": args, "attributes": {"not_restored": lost}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()  # it can come again without an end: a retry with a smaller batch, an exception, a notebook
        trial = state.trial_params or {}
        self.of_trial = {"sigma": trial["sigma"]} if "sigma" in trial else {}
        options = checked(**{**self.options, **self.of_trial})
        self._check_resumed(state)
        _check_policy_ratio(args)
        targets = kwargs["model"] if self.targets is None else self.targets
        if callable(targets) and not isinstance(targets, nn.Module):
            targets = targets(kwargs["model"])
        bare = bare_optimizer(kwargs["optimizer"])
        seed = options.pop("seed")
        self.optimizer = FlatPerturbOptimizer(bare, targets, total_steps=state.max_steps, **options)
        # not what a checkpoint or an earlier train() left with the optimizer, which is told of above
        self.optimizer.seed, self.optimizer.step_count = seed, state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.optimizer is not None:
            self.optimizer.restore()  # also where the step is skipped, or the optimizer's own step is never called

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the Trainer counts steps that a GradScaler skips, and resumes by its own count
        if self.optimizer is not None:
            self.optimizer.step_count = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """W clean, no hooks left on the model or the optimizer."""
        optimizer, self.optimizer = self.optimizer, None
        if optimizer is not None:
            optimizer.detach()

    def _check_resumed(self, state: Any) -> None:
        if self.not_restored:  # restore_callback_states_from_checkpoint made this object anew, from what the file keeps
            raise ValueError(
                "FlatPerturbCallback was restored from a checkpoint, which cannot keep its "
                f"{' and '.join(self.not_restored)}. Set restore_callback_states_from_checkpoint=False and give the Trainer "
                "the callback as before"
            )
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved is None:
            warn_late(state.global_step)
            state.stateful_callbacks[type(self).__name__] = self.state()  # without it the Trainer's next save is a KeyError
        if state.global_step and isinstance(saved, dict):
            before, now = saved.get("args", {}), self.state()["args"]
            same = {name for name, value in before.items() if now.get(name, value) == value}
            changed = [f"{name} was {before[name]}, is {now[name]}" for name in before if name not in same]
            if changed:
                warnings.warn(
                    f"FlatPerturbCallback goes on from step {state.global_step} with other settings than the checkpoint's: "
                    f"{'; '.join(changed)}. The run will differ from one that was never stopped.",
                    stacklevel=2,
                )


def _check_policy_ratio(args: Any) -> None:
    # TRL takes old log-probs without gradients, so on clean weights, unless it can take them from the training forward
    every = (getattr(args, "steps_per_generation", None) or 1) * getattr(args, "num_iterations", 1)
    reused = hasattr(args, "num_iterations") and args.gradient_accumulation_steps % every != 0
    sampled = getattr(args, "use_vllm", False) and getattr(args, "vllm_importance_sampling_correction", False)
    always = any(cls.__name__ == "RLOOConfig" for cls in type(args).__mro__)
    if reused or sampled or always:
        setting = "num_iterations=1, steps_per_generation a divisor of gradient_accumulation_steps"
        setting += ", vllm_importance_sampling_correction=False" if sampled else ""
        advice = "RLOO always takes it so; GRPOTrainer need not." if always else f"Set {setting}."
        warnings.warn(
            "the policy ratio of this run compares log-probs at perturbed weights with old ones at clean weights, so it is "
            "not 1 before the first update (sigma .05 gave its logarithm a std of .06, sigma .15 of .16). " + advice,
            stacklevel=3,
        )
