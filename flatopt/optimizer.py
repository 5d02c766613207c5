"""The optimizer wrapper: the one line that changes."""

import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from numbers import Real
from typing import Any, Union

import torch
from torch import nn
from torch.optim import Optimizer

from .groups import read_groups
from .peft_layers import is_tuner_layer, restore_before_merging
from .restore import RESTORES
from .scale import NOISES
from .schedule import SCHEDULES, Schedule, factor
from .window import Ear, Window, close_around, listen
from .wrapper import OptimizerWrapper

STEP, SEED = "flatopt_step", "flatopt_seed"


class FlatPerturbOptimizer(OptimizerWrapper):
    r"""Trains low-rank adapters at randomly perturbed frozen base weights (Flat-LoRA, Li et al., ICML 2025).

    Minimises the expected loss around the *merged* weight, in the full parameter space, over the adapter alone:

    .. math::
        \min_{A,B}\ \mathbb E_{\varepsilon}\, L(W + sBA + \varepsilon), \qquad
        \varepsilon_{ij} \sim \mathcal N\Big(0,\ \frac{\sigma_t^2}{n}\,\lVert (W + sBA)_{i,:}\rVert^2\Big), \qquad
        \sigma_t = \sigma\cdot\tfrac12\big(1-\cos(\pi t/T)\big)

    with :math:`W` the frozen base weight (:math:`m \times n`, n counted over all input dimensions), :math:`sBA` what the
    adapter adds, :math:`t` the optimizer step and :math:`T` = ``total_steps`` (Eq. 7 of arXiv 2409.14396).

    A step, for the loop you have:

    1. The first training forward (root module in train mode, gradients enabled) draws ε from (seed, step, weight, rank)
       and sets W to W + ε. Further micro-batches see the same ε.
    2. Forward and backward run at W + ε.
    3. ``step()`` puts W back, bit for bit, then runs the wrapped optimizer, and counts the step.

    Evaluation, no-grad forwards, ``state_dict``, ``save_pretrained``, ``merge_and_unload`` and copies see clean W.

    Args:
        optimizer: the constructed optimizer to wrap. ``param_groups``, ``state`` and ``defaults`` are its own, live.
        targets: an ``nn.Module`` (the frozen weight under every low-rank module in it: PEFT layers, modules made known by
            :func:`register_low_rank`), or a list of dicts ``{"modules": module or iterable of modules}`` or ``{"params":
            [frozen parameters]}``, each with ``sigma``, ``schedule``, ``noise``, ``restore`` of its own if it differs.
            See ``perturb_groups`` for the result; it may be changed during training.
        sigma: noise std in units of the rms of each row of the merged weight; ≥ 0. 0.05 is the paper's value for T5 and
            Llama-2-7B, 0.15 for CLIP ViT-B/32; small models need more.
        total_steps: :math:`T`, in optimizer steps. Needed by every schedule but ``"constant"``.
        schedule: ``"cosine"`` (0 → σ, the paper's), ``"linear"`` (0 → σ), ``"constant"``, or a callable from progress in
            [0, 1] to a factor on σ. Past the end the factor stays at its last value.
        noise: ``"filter"`` (above), ``"layer"`` (one std a weight: σ × its rms), ``"isotropic"`` (one std for all weights
            of the group), ``"element"`` (std σ|W|, the paper's Appendix C).
        restore: ``"reversible"`` (no copy: an involution takes the noise on and off, see :mod:`flatopt.reversible`),
            ``"copy"`` (keeps a clean copy; plain Gaussian noise), ``"subtract"`` (the official code's; W drifts by rounding;
            for comparison).
        seed: names the noise. The same seed gives the same run; global random states are neither read nor moved.
        shared: under torch.distributed, draw the same ε on every rank. By default each rank draws its own, a better
            estimate of the expectation at no cost.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value; and for targets that cannot be perturbed
            (none found, quantised, merged, meta, offloaded, empty on this rank, trainable), naming the module and the way
            out. No weight is changed then.

    Example::

        optimizer = torch.optim.AdamW(trainable, lr=5e-4)
        optimizer = FlatPerturbOptimizer(optimizer, model, sigma=0.05, total_steps=steps)
        for x, y in loader:
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        targets: Union[nn.Module, "list[dict[str, Any]]"],
        *,
        sigma: float = 0.05,
        total_steps: int | None = None,
        schedule: Schedule = "cosine",
        noise: str = "filter",
        restore: str = "reversible",
        seed: int = 0,
        shared: bool = False,
    ):
        self._wrap(optimizer)
        if isinstance(optimizer, FlatPerturbOptimizer):
            raise TypeError(
                "optimizer is a FlatPerturbOptimizer already (a notebook cell run twice?). Wrap the bare optimizer; for "
                "several kinds of noise, pass several target groups to one FlatPerturbOptimizer"
            )
        if total_steps is not None and not (_is_whole(total_steps) and total_steps >= 1):
            raise ValueError(f"total_steps must be a positive integer, got {total_steps!r}")
        if not _is_whole(seed):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        defaults = {"sigma": sigma, "schedule": schedule, "noise": noise, "restore": restore}
        self.total_steps, self.shared = total_steps, shared
        self.perturb_groups, self._roots = read_groups(targets, defaults)
        for group in self.perturb_groups:
            _check_group(group, total_steps)
            for target in group["targets"]:
                target.check()
        self._count(int(seed), 0)
        self._warned = self._drawn = False
        self._attach()

    def _attach(self) -> None:
        super()._attach()
        self._window = Window(self._roots)
        myself = weakref.ref(self)
        ear = Ear(self._window, lambda: myself() and myself()._open())
        targets = [target for group in self.perturb_groups for target in group["targets"]]
        self._handles = listen(ear, self._roots, list(dict.fromkeys(t.module for t in targets)))
        for layer in dict.fromkeys(t.layer for t in targets):
            if is_tuner_layer(layer):
                restore_before_merging(layer, close_around)
        # a model that outlives its optimizer keeps clean weights and no hooks
        weakref.finalize(self, _detach, self._window, self._handles).atexit = False

    # --- the perturbation -------------------------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether W stands at W + ε now."""
        return self._window.is_open

    def perturb(self) -> None:
        """Set W to W + ε of the current step; the first training forward does this by itself. Idempotent."""
        self._open()

    def restore(self) -> None:
        """Put W back, bit for bit. Idempotent; ``step()`` does this by itself."""
        self._window.close()

    @contextmanager
    def perturbed(self):
        """W + ε for every forward inside, in eval mode and without gradients too; then as it was before."""
        was_open, was_held = self.is_perturbed, self._window.held
        self.perturb()
        self._window.held = True
        try:
            yield self
        finally:
            self._window.held = was_held
            if not was_open:
                self.restore()

    def _open(self) -> None:
        if self._window.is_open:
            return
        step, seed, rank = self.param_groups[0][STEP], self.param_groups[0][SEED], 0
        for group in self.perturb_groups:
            _check_group(group, self.total_steps)
        sigmas = [group["sigma"] * factor(group["schedule"], step, self.total_steps) for group in self.perturb_groups]
        if not self.shared and torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        self._window.open(list(zip(self.perturb_groups, sigmas)), seed, step, rank)
        self._drawn = True

    # --- the optimizer ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Put W back and run the wrapped optimizer's step.

        With a ``closure``, W is perturbed around each of its evaluations (the same ε, however often the wrapped optimizer
        asks). Returns what the wrapped ``step`` returns: the closure's loss.
        """
        if closure is None:
            self.restore()
            self._warn_if_unseen()
            loss = self.optimizer.step()
        else:

            def evaluate():
                self.perturb()
                try:
                    with torch.enable_grad():
                        return closure()
                finally:
                    self.restore()

            self._window.one_scale = True
            try:
                loss = self.optimizer.step(evaluate)
            finally:
                self._window.one_scale = False
                self.restore()
                self._window.let_go()
        if self._drawn:  # a step without a forward (ZeRO's second group, DCP filling the state) used up no draw
            self._drawn = False
            self._count(self.param_groups[0][SEED], self.param_groups[0][STEP] + 1)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's ``zero_grad``. Says nothing about W: many loops call it between forward and backward."""
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """The wrapped optimizer's ``add_param_group``; which base weights are perturbed does not change."""
        super().add_param_group(param_group)
        self._count(self.param_groups[0][SEED], self.param_groups[0][STEP])

    def eval(self, *args) -> None:
        """Restore W; passed on to the wrapped optimizer, if it has an ``eval``."""
        self.restore()
        super().eval(*args)

    # --- state ------------------------------------------------------------------------------------------------------

    def _count(self, seed: int, step: int) -> None:
        # kept in the param groups, as plain numbers: the one place every checkpoint format carries through unchanged
        for group in self.param_groups:
            group[SEED], group[STEP] = seed, step

    def state_dict(self) -> "dict[str, Any]":
        """The wrapped optimizer's state dict; its param groups carry ``flatopt_seed`` and ``flatopt_step``."""
        return super().state_dict()

    def load_state_dict(self, state_dict: "dict[str, Any]") -> None:
        """Load into the wrapped optimizer and go on with the saved noise and schedule.

        A state dict of the bare optimizer loads too; seed and step then stay as they are.
        """
        self.restore()
        super().load_state_dict(state_dict)

    def _load(self, state_dict: "dict[str, Any]") -> None:
        seed, step = self.param_groups[0][SEED], self.param_groups[0][STEP]
        super()._load(state_dict)
        saved = self.param_groups[0]
        self._count(saved.get(SEED, seed), saved.get(STEP, step))
        self._drawn = False

    def __getstate__(self) -> "dict[str, Any]":
        self.restore()
        names = ("optimizer", "perturb_groups", "total_steps", "shared", "_roots", "_warned", "_drawn")
        return {name: self.__dict__[name] for name in names}

    def __repr__(self) -> str:
        lines = [
            f"  {len(g['targets'])} weights: sigma={g['sigma']}, schedule={g['schedule']}, noise={g['noise']}, "
            f"restore={g['restore']}"
            for g in self.perturb_groups
        ]
        return "\n".join(["FlatPerturbOptimizer (", *lines, f"  {self.optimizer!r}", ")"])

    def _warn_if_unseen(self) -> None:
        if self._drawn or self._warned or all(group.get("lr") == 0 for group in self.param_groups):
            return  # lr 0 everywhere: torch's distributed checkpointing makes such a step to fill the state
        self._warned = True
        warnings.warn(
            "FlatPerturbOptimizer.step() saw no training forward since the last step, so this step was taken at the "
            "unperturbed weights. Reasons: the model was in eval mode; a submodule or another copy of the model was called "
            "instead of the module given as targets; targets were raw parameters, which have no forward to listen to (call "
            "perturb() before the forward, or step(closure)); or step() was called twice.",
            stacklevel=4,
        )


def _detach(window: Window, handles: list) -> None:
    window.close()
    for handle in handles:
        handle.remove()


def _is_whole(value) -> bool:
    return isinstance(value, Real) and float(value).is_integer()


def _check_group(group: "dict[str, Any]", total_steps: int | None) -> None:
    sigma, schedule = group["sigma"], group["schedule"]
    if not (isinstance(sigma, Real) and math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
    if not callable(schedule) and schedule not in list(SCHEDULES):
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a callable, got {schedule!r}")
    if schedule != "constant" and total_steps is None:
        raise ValueError(
            f"schedule {schedule!r} needs total_steps, the number of optimizer steps of the whole training: pass "
            "total_steps=epochs * len(loader) // accumulation, or schedule='constant'"
        )
    if group["noise"] not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {group['noise']!r}")
    if group["restore"] not in list(RESTORES):
        raise ValueError(f"restore must be one of {', '.join(RESTORES)}, got {group['restore']!r}")
