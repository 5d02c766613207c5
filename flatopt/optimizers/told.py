"""What an optimizer tells its user: most likely mistakes, each once, with the way out."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..adapters.registry import find_weights
from ..core.warn import warn_user
from ..core.weight import AdaptedWeight


class Told:
    """Of one optimizer; ``subjects``: what it has told."""

    def __init__(self, subjects: Iterable[str] = ()) -> None:
        self.subjects = set(subjects)

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self.subjects:
            self.subjects.add(subject)
            warn_user(text)

    def another_step(self, text: str) -> None:
        self._warn_once("another step", text)

    def another_seed(self, seed: int, made_with: int) -> None:
        if seed != made_with:
            self._warn_once(
                "seed",
                f"the state that was loaded or wrapped goes on with its seed, {seed}; this optimizer was made with "
                f"seed={made_with}. To draw other noise from here on, set optimizer.seed",
            )

    def unseen(self) -> None:
        self._warn_once(
            "unseen",
            "FlatPerturbOptimizer.step() saw no training forward since the last step, so this step was taken at the "
            "unperturbed weights. Reasons: the model was in eval mode; another copy of the model, or a submodule without "
            "adapted weights, was called instead of the module given as targets; targets were raw parameters, which have no "
            "forward to listen to (call perturb() before "
            "the forward, or step(closure)); or step() was called twice.",
        )

    def adapted_later(self, roots: "list[nn.Module]", weights: "list[AdaptedWeight]") -> None:
        mine = {(weight.owner, weight.name) for weight in weights}
        try:
            later = [weight.path for weight in find_weights(roots) if (weight.owner, weight.name) not in mine]
        except ValueError as error:  # a layer that cannot be perturbed
            later = [str(error)]
        if later:
            self._warn_once(
                f"adapted later: {later}",
                f"adapted since FlatPerturbOptimizer was made, so without noise: {', '.join(later)}. Call detach() and make "
                "a new one around optimizer.optimizer, which gives them noise; step and seed go on",
            )

    def running_statistics(self, roots: "list[nn.Module]") -> None:
        found = {
            id(module): f"{name} ({type(module).__name__})"
            for root in roots
            for name, module in root.named_modules()
            if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
        }
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            self._warn_once(
                "running statistics",
                f"{next(iter(found.values()))}{more} is in train mode: its running statistics are gathered at W + ε and "
                "then used with W. Put such layers into eval mode after model.train(), or gather them anew after training: "
                "torch.optim.swa_utils.update_bn(loader, model)",
            )

    def one_step(self) -> None:
        self._warn_once(
            "one step",
            "total_steps=1 and the schedule begins at 0, so the only step has no noise. Use schedule='constant'",
        )

    def past_the_end(self, step: int, total_steps: int) -> None:
        self._warn_once(
            "past the end",
            f"step {step} is past total_steps={total_steps}: sigma stays where the schedule ended. If training is over, "
            "call the model in eval mode or without gradients; else set optimizer.total_steps to the number of "
            "optimizer steps of the whole training; for a second run, make a new optimizer or set "
            "optimizer.step_count = 0",
        )

    def too_few_micro_batches(self, draws: str, made: int, one_in: int) -> None:
        self._warn_once(
            "too few micro-batches",
            f"draws={draws!r}, but two steps in succession had fewer micro-batches than that, the last one "
            f"{made}, and the first of them is always perturbed. Accumulate over {one_in} or more "
            "(parts of the batch), or give another draws",
        )

    def no_hooks(self, optimizer: Any) -> None:
        self._warn_once(
            "no hooks",
            f"{type(optimizer).__name__} steps without running torch's step hooks, so flatopt sees only steps made "
            "through this FlatPerturbOptimizer: a step of the bare optimizer, or of a scheduler or framework that holds it, "
            "leaves W "
            "perturbed. Step the FlatPerturbOptimizer",
        )

    def rounding(self, group: "dict[str, Any]", roots: "list[nn.Module]", one_in: int) -> None:
        """Of a group whose ``noise`` is a format."""
        mine = {id(weight.parameter): weight for weight in group["targets"]}
        tied: dict[str, str] = {}
        for root in roots:
            for module in root.modules():
                for parameter in module._parameters.values():
                    weight = mine.get(id(parameter))
                    if weight is not None and module is not weight.owner:
                        tied[weight.path] = f"{weight.path} is tied to a weight of {type(module).__name__}"
        if tied:
            more = f" ({len(tied) - 3} more)" if len(tied) > 3 else ""
            self._warn_once(
                f"tied: {sorted(tied)}",
                f"{'; '.join(list(tied.values())[:3])}{more}, which reads it too: it is rounded with the first one's "
                "adapter alone. Leave it out, or use noise='filter'",
            )
        if group["sigma"] > 0 and (group["sigma"] < 0.5 or group["schedule"] in ("cosine", "linear")):
            self._warn_once(
                "a short way",
                f"sigma={group['sigma']:g} with schedule={group['schedule']!r} goes a part of the way to the weights "
                f"rounded to {group['noise']}: pass sigma=1, schedule='constant' to train at the rounded ones",
            )
        if one_in == 1:
            self._warn_once(
                "rounded alone",
                f"noise={group['noise']!r} in every forward fits the model to the rounded weights alone: it lost 11 to 36 "
                "points at full precision where we measured it. Accumulate over four micro-batches and pass "
                "draws='mixed/4', which leaves three of them at clean weights, or over two and pass draws='mixed'",
            )


def why_detached(taken_over: str) -> str:
    """``taken_over``: a weight that a newer optimizer perturbs now, if one does."""
    if not taken_over:
        return "this FlatPerturbOptimizer is detached: detach() was called. Make a new one around optimizer.optimizer"
    return (
        "this FlatPerturbOptimizer is detached, since a newer FlatPerturbOptimizer perturbs "
        f"{taken_over} too and took over: one weight can have one at a time. Step the newer one, or make "
        "a new one around optimizer.optimizer; for several adapters on one base, give one optimizer all their parameters"
    )
