"""The optimizer wrapper: the one line that changes."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from ..adapters.checks import check, check_lasting
from ..adapters.forwards import refuse_unrounded, unsupported_reason
from ..adapters.guards import guard
from ..adapters.quantized import format_of
from ..adapters.raw import RAW
from ..adapters.registry import as_plain_data, from_plain_data
from ..core.arguments import is_whole
from ..core.warn import warn_user
from ..core.weight import AdaptedWeight
from ..ops import NOISES
from ..perturbation.doors import Doors
from ..perturbation.gradients import came_since, gradients_of, wanted
from ..perturbation.hooks import ProcessWide, listen
from ..perturbation.memory import refuse_overlapping
from ..perturbation.noise import NoiseRequest
from ..perturbation.strangers import find_strangers, listen_for_strangers
from ..perturbation.weights import CLEAN, PERTURBED, SUSPENDED, PerturbedWeights
from .groups import read_groups
from .others import OtherOptimizers, chain_of
from .sam import SAM
from .schedule import Schedule, factor
from .settings import check_draws, check_group, perturbed_one_in, refuse_draws_under_sam
from .told import Told, why_detached
from .wrapper import OptimizerWrapper

STEP, SEED = "flatopt_step", "flatopt_seed"

_before_steps: "weakref.WeakKeyDictionary[Optimizer, Any]" = weakref.WeakKeyDictionary()  # hooks on wrapped optimizers


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
       and sets W to W + ε. Further micro-batches see the same ε, unless ``draws`` says otherwise.
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
            of the group), ``"element"`` (std σ|W|, the paper's Appendix C). Or a format that the merged model will be served
            in, as :func:`flatopt.flatness.rounding` reads it (``"int4/32"``, ``"nf4/64"``): no noise, W moves by
            :math:`\sigma_t (Q(W + sBA) - (W + sBA))`, so that for σ = 1 the model runs as rounded and the gradient goes
            straight through (quantisation-aware training). Use ``sigma=1, schedule="constant", draws="mixed/4"``; it needs
            ``restore="copy"``.
        restore: ``"reversible"`` (no copy: an involution takes the noise on and off, see :mod:`flatopt.ops.reversible`),
            ``"copy"`` (keeps a clean copy; plain Gaussian noise), ``"subtract"`` (the official code's; W drifts by rounding;
            for comparison), ``"forward"`` (W is never written to: the layers' own forward computes with W + ε and makes ε
            again in backward, :mod:`flatopt.perturbation.forward`). Quantised weights (bitsandbytes, torchao, HQQ, quanto,
            fp8, GPTQ, AWQ) always get the last.
        draws: ``"step"`` (one ε a step), or under gradient accumulation ``"micro-batch"`` (each micro-batch its own ε, so
            that the step's gradient averages over as many draws; one more move of W and back a micro-batch) or ``"mixed"``
            (the first, third, ... its own ε each, the others clean W: the mixture of mARWP, Li et al., 2024, arXiv
            2404.00357, with λ = ½; with two, as dear as ``"step"``) or ``"mixed/n"`` (one in n its own ε, the first). A
            training forward after a backward begins the next micro-batch; all graphs of the one before must be done with by
            then.
        seed: names the noise. The same seed gives the same run; global random states are neither read nor moved.
        shared: under torch.distributed, draw the same ε on every rank. By default each rank draws its own, a better
            estimate of the expectation at no cost.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value; and for targets that cannot be perturbed
            (none found, quantised in an unknown way, merged, meta, offloaded, empty on this rank, trainable), naming the
            module and the way out. No weight is changed then.

    Example::

        optimizer = torch.optim.AdamW(trainable, lr=5e-4)
        optimizer = FlatPerturbOptimizer(optimizer, model, sigma=0.05, total_steps=steps)
        for x, y in loader:
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    __module__ = "flatopt"  # the path by which pickles and users name it

    def __init__(
        self,
        optimizer: Optimizer,
        targets: "nn.Module | list[dict[str, Any]]",
        *,
        sigma: float = 0.05,
        total_steps: int | None = None,
        schedule: Schedule = "cosine",
        noise: str = "filter",
        restore: str = "reversible",
        draws: str = "step",
        seed: int = 0,
        shared: bool = False,
    ):
        self._wrap(optimizer)
        if any(isinstance(layer, FlatPerturbOptimizer) for layer in chain_of(optimizer)):
            raise TypeError(
                "optimizer is a FlatPerturbOptimizer already, or wraps one (a notebook cell run twice? "
                "accelerator.prepare after wrapping?). Wrap the bare optimizer; for several kinds of noise, pass several "
                "target groups to one FlatPerturbOptimizer"
            )
        check_draws(seed, draws)
        defaults = {"sigma": sigma, "schedule": schedule, "noise": noise, "restore": restore}
        self._seed, self._step, self._draw, self._draws = int(seed), 0, 0, draws
        self._one_in = perturbed_one_in(draws)
        self.total_steps, self.shared = total_steps, shared
        self._told = Told()
        self.perturb_groups, self._roots = read_groups(targets, defaults)
        weights = [weight for group in self.perturb_groups for weight in group["targets"]]
        for group in self.perturb_groups:
            check_group(group)
            if group["noise"] not in NOISES:
                self._check_rounding(group)
            elif group["sigma"] > 1:
                warn_user(
                    f"sigma={group['sigma']:g} is noise larger than the weights themselves: sigma is a share of their rms, "
                    ".05 for a large model, .5 for a tiny one"
                )
            for weight in group["targets"]:
                check_lasting(weight)
                check(weight, in_forward=True)
                _check_forward(weight, group)
        if any(isinstance(each, SAM) for each in chain_of(optimizer)):
            refuse_draws_under_sam(draws)
        if draws != "step" and any(weight.adapter is RAW for weight in weights):
            raise ValueError(
                f"draws={draws!r} with raw parameters as targets: they have no forward that begins a micro-batch. Give the "
                "modules that hold them"
            )
        refuse_overlapping(weights)
        self._drawn, self._parts = False, set[int]()
        self._checked: dict[int, tuple[Any, ...]] = {}  # the settings of each group that were found to fit
        self._adopt(self.innermost.param_groups)
        if seed != 0:  # not the default
            self._told.another_seed(self._seed, int(seed))
        self._attach()

    # --- attached to an optimizer and a model -----------------------------------------------------------------------

    def _attach(self) -> None:
        super()._attach()
        self._others = OtherOptimizers(self._roots)
        self._weights = PerturbedWeights(self.perturb_groups, self._roots)
        self._take_over()
        self._weights.attach()
        self._weights.optimizer = myself = weakref.ref(self)

        def perturb() -> None:
            if (optimizer := myself()) is not None:
                optimizer.perturb()

        def is_over() -> bool:
            return (optimizer := myself()) is not None and optimizer._micro_batch_is_over()

        def next_draw() -> None:
            if (optimizer := myself()) is not None:
                optimizer._next_draw()

        def adapters_wanted() -> bool:
            optimizer = myself()
            return optimizer is not None and optimizer._draws != "step" and wanted(optimizer._trained_adapters())

        self._gradients: list[Any] = []  # of some trained parameters, when the draw began
        self._made = self._one_in  # micro-batches of the last step
        self._doors = Doors(self._weights, perturb, is_over, next_draw, adapters_wanted)
        weights = self._weights.weights()
        self._adapters = _parameters_of_adapters(weights)
        listen(self._doors, self._roots, weights)
        listen_for_strangers(self._doors)
        handles: list[Any] = []
        inner = self.innermost
        if inner in _before_steps:
            _before_steps[inner].remove()  # of one that is gone
        before_step = _before_steps[inner] = inner.register_step_pre_hook(
            _weakly(myself, FlatPerturbOptimizer._before_inner_step, gone=_tell_once_gone(inner))
        )
        for register, hook in (
            (inner.register_step_post_hook, FlatPerturbOptimizer._after_inner_step),
            (inner.register_state_dict_pre_hook, FlatPerturbOptimizer._before_inner_state_dict),
            (inner.register_load_state_dict_post_hook, FlatPerturbOptimizer._after_inner_load),
            (register_optimizer_step_pre_hook, FlatPerturbOptimizer._before_any_step),
        ):
            handles.append(register(_weakly(myself, hook)))
        layers = dict.fromkeys((weight.adapter, weight.layer) for weight in weights)
        methods = dict.fromkeys(method for adapter, layer in layers for method in adapter.guarded_methods(layer))
        releases = [
            guard(methods, self._doors.clean_inside),
            guard([(AveragedModel, "update_parameters")], self._doors.clean_for_a_reader),
        ]
        # a model that outlives its optimizer keeps clean weights and no hooks
        self._finalizer = weakref.finalize(self, _detach, self._weights, self._doors, handles, releases)
        self._finalizer.atexit = False

        def detach_all(finalizer: "weakref.finalize[Any, Any]" = self._finalizer) -> None:
            before_step.remove()  # left where the collector took this optimizer, to tell of it
            finalizer()

        self._weights.detach_all = detach_all
        self._mirror()

    def _take_over(self) -> None:
        for other, weight in self._weights.rivals():
            state = other.state
            other.taken_over = weight.path
            other.detach_all()
            warn_user(
                f"{weight.path} was perturbed by an older FlatPerturbOptimizer that is still referenced"
                f"{' (amid a step: its weights are restored)' if state == PERTURBED else ''}; the new one takes over and "
                "the old one perturbs no more. Call detach() on an optimizer that is done with, or use it as a context "
                "manager; give a trainer one FlatPerturbCallback",
            )

    def detach(self) -> None:
        """Put W back and take off all hooks: the wrapped optimizer and the model are as if never touched. Idempotent.

        The wrapped optimizer, ``optimizer.optimizer``, goes on bare; a new FlatPerturbOptimizer may be put around it.
        """
        self._weights.detach_all()
        ProcessWide.take_off_ended()

    def __enter__(self) -> "FlatPerturbOptimizer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # --- the perturbation -------------------------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether W stands at W + ε now; not while a reader amid a step finds it clean. True also where ε is 0: by the
        schedule, or in a clean micro-batch of ``draws="mixed"``."""
        return self._weights.state == PERTURBED

    @property
    def total_steps(self) -> int | None:
        """Length of the schedule in optimizer steps; may be set later than at construction, and changed."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        if value is not None and not (is_whole(value) and value >= 1):
            raise ValueError(f"total_steps must be a positive integer, got {value!r}")
        self._total_steps = None if value is None else int(value)

    @property
    def step_count(self) -> int:
        """Steps taken so far: names the noise, with the seed, and is the schedule's time. May be set, as on a resume."""
        return self._step

    @step_count.setter
    def step_count(self, value: int) -> None:
        self._step = int(value)
        self._mirror()

    @property
    def seed(self) -> int:
        """Names the noise."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = int(value)
        self._mirror()

    @property
    def draws(self) -> str:
        """As given; for another, detach and make a new optimizer."""
        return self._draws

    def perturb(self) -> None:
        """Set W to W + ε of the current step; the first training forward does this by itself. Idempotent.

        Raises:
            ValueError: a schedule without ``total_steps``, or a weight that cannot be perturbed now, named.
            RuntimeError: after :meth:`detach`, or where another optimizer is amid a step on the same weight.
        """
        if self._weights.partly:
            self._weights.restore()
        if not self._doors.looked:
            find_strangers(self._doors)
            if any(group["sigma"] for group in self.perturb_groups):
                self._told.running_statistics(self._roots)
        if self._weights.state != CLEAN:
            self._weights.resume()
            return
        if not self._finalizer.alive:
            raise RuntimeError(why_detached(self._weights.taken_over))
        self._adopt(self.optimizer.param_groups)
        if self._doors.adapters_changed:
            self._doors.adapters_changed = False
            self._checked.clear()
            self._adapters = _parameters_of_adapters(self._weights.weights())
            self._told.adapted_later(self._roots, self._weights.weights())
        for number, group in enumerate(self.perturb_groups):
            settings = (group["sigma"], group["schedule"], group["noise"], group["restore"], self._total_steps)
            checked = self._checked.get(number)
            if checked is None or not all(map(is_, settings, checked)):
                check_group(group, self)
                if group["noise"] not in NOISES:
                    self._check_rounding(group)
                self._checked[number] = settings
        total = self._total_steps
        if total is not None and self._step >= total and any(g["schedule"] != "constant" for g in self.perturb_groups):
            self._told.past_the_end(self._step, total)
        sigmas = tuple(g["sigma"] * factor(g["schedule"], self._step, self._total_steps) for g in self.perturb_groups)
        if self._total_steps == 1 and not any(sigmas) and any(group["sigma"] for group in self.perturb_groups):
            self._told.one_step()
        if self._draw % self._one_in:
            sigmas = (0.0,) * len(sigmas)
        rank = 0 if self.shared else self._weights.data_parallel_rank()
        try:
            self._weights.perturb(NoiseRequest(self._seed, self._step, rank, sigmas, self._draw))
        finally:
            if self.is_perturbed:  # also where an interrupt waited until W was perturbed
                self._drawn, self._parts = True, set()
                self._doors.unseen_steps.watch(next(self._trained(), None))
                if self._draws != "step":
                    self._gradients = gradients_of(self._trained_adapters())

    def restore(self) -> None:
        """Put W back, bit for bit. Idempotent; ``step()`` does this by itself.

        Raises:
            RuntimeError: naming the weights that were written to while perturbed, after all others came back.
        """
        self._weights.restore()

    @contextmanager
    def perturbed(self) -> "Iterator[FlatPerturbOptimizer]":
        """W + ε for every forward inside, in eval mode and without gradients too; then as it was before."""
        before, was_held = self._weights.state, self._weights.held
        if not was_held and self._micro_batch_is_over():
            self._next_draw()
        self.perturb()
        self._weights.held = True
        try:
            yield self
        finally:
            self._weights.held = was_held
            if before == CLEAN:
                self.restore()
            elif before == SUSPENDED:
                self._weights.suspend()

    # --- the optimizer ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Put W back and run the wrapped optimizer's step.

        With a ``closure``, W is perturbed around each of its evaluations (the same ε, however often the wrapped optimizer
        asks). Returns what the wrapped ``step`` returns: the closure's loss.

        The restoring and counting hang on the innermost optimizer's own step, so they are right whoever calls that.
        """
        if not self._finalizer.alive:
            if self._weights.taken_over:
                raise RuntimeError(why_detached(self._weights.taken_over))
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._inner_seen = False
        try:
            loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
            if not self._inner_seen and self.optimizer is self.innermost:
                self._told.no_hooks(self.optimizer)
                self._after_inner_step(self.optimizer)
            return loss
        finally:
            if closure is not None:
                self.restore()

    def _before_inner_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._inner_seen = True
        itself, given = args[:1], args[1:]  # torch hands over step's arguments with self among them
        closure = kwargs.get("closure", given[0] if given else None)
        through_the_graph = getattr(optimizer, "is_second_order", False)  # its step differentiates the gradients once more
        if closure is None:
            if through_the_graph:
                self._weights.resume()
            else:
                self.restore()
            lr_0 = all(group.get("lr") == 0 for group in optimizer.param_groups)  # DCP makes such a step to fill the state
            another_part = self._parts and _first_parameter(optimizer) not in self._parts  # ZeRO steps group by group
            if not (self._drawn or lr_0 or another_part):
                self._told.unseen()
            return None
        if self._micro_batch_is_over():
            self._next_draw()  # Lightning has only the last micro-batch in the closure
        first = self._draw

        def evaluate() -> Any:
            self._begin_draw(first)
            self.perturb()
            self._doors.unseen_steps.watch(None)  # the optimizer moves them between evaluations
            self._doors.trained = False
            try:
                with torch.enable_grad():
                    loss = closure()
            except BaseException:
                self.restore()
                raise
            if self._weights.state == SUSPENDED and not self._doors.trained:
                self._told.unseen()
            if not through_the_graph:
                self._weights.suspend()  # not restored: the adapter moves between evaluations, the noise must not
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluate}
        return (*itself, evaluate, *given[1:]), kwargs

    def _after_inner_step(self, optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
        self._weights.restore(untouched=True)  # since the last evaluation of a closure
        if self._drawn:
            before, self._made = self._made, self._draw + 1
            if max(before, self._made) < self._one_in:  # one alone is the last of an epoch
                self._told.too_few_micro_batches(self._draws, self._made, self._one_in)
        self._begin_draw()
        self._others.note_own_step()
        self._doors.first_pass.read = {}  # what is read with gradients after a step is no second pass
        self._parts.add(_first_parameter(optimizer))
        if self._drawn:  # a step without a forward (ZeRO's second group, DCP filling the state) used up no draw
            self._drawn = False
            self._adopt(self.optimizer.param_groups)
            self.step_count += 1

    def _micro_batch_is_over(self) -> bool:
        if self._draws == "step":
            return False
        return self._doors.backward_began or came_since(self._gradients, self._trained_adapters())

    def _next_draw(self) -> None:
        self.restore()
        self._draw += 1
        self._doors.backward_began, self._gradients = False, []

    def _begin_draw(self, draw: int = 0) -> None:
        if self._draw != draw:
            self._weights.restore(untouched=True)
            self._draw = draw
        self._doors.backward_began, self._gradients = False, []

    def _before_any_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # the backward in between was for that step: a discriminator's or critic's, on what the model gave without gradients
        self._doors.first_pass.read = {}
        if optimizer is not self and self._weights.state != CLEAN and "another step" not in self._told.subjects:
            warning = self._others.warning_of_step(optimizer, self, self.innermost)
            if warning is not None:
                self._told.another_step(warning)

    def _trained(self) -> "Iterator[torch.Tensor]":
        return (p for group in self.innermost.param_groups for p in group["params"])

    def _trained_adapters(self) -> "Iterator[torch.Tensor]":
        return (p for p in self._trained() if id(p) in self._adapters)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """The wrapped optimizer's ``zero_grad``. Says nothing about W: many loops call it between forward and backward."""
        super().zero_grad(*args, **kwargs)

    def add_param_group(self, param_group: "dict[str, Any]") -> None:
        """The wrapped optimizer's ``add_param_group``; which base weights are perturbed does not change."""
        super().add_param_group(param_group)
        self._mirror()

    def eval(self, *args: Any) -> None:
        """Clean W; passed on to the wrapped optimizer, if it has an ``eval``."""
        self._weights.suspend()
        super().eval(*args)

    # --- state ------------------------------------------------------------------------------------------------------

    def _mirror(self) -> None:
        # kept in the param groups, as plain numbers: the one place every checkpoint format carries through unchanged
        for groups in {id(o.param_groups): o.param_groups for o in (self.optimizer, self.innermost)}.values():
            for group in groups:
                group[SEED], group[STEP] = self._seed, self._step

    def _adopt(self, param_groups: "list[dict[str, Any]]") -> None:
        """Go on with the noise and schedule that a checkpoint left in the param groups."""
        for group in param_groups[:1]:
            self._seed, self._step = int(group.get(SEED, self._seed)), int(group.get(STEP, self._step))

    def _before_inner_state_dict(self, optimizer: Optimizer) -> None:
        self._mirror()

    def _after_inner_load(self, optimizer: Optimizer) -> None:
        self.restore()
        made_with = self._seed
        self._adopt(optimizer.param_groups)
        self._told.another_seed(self._seed, made_with)
        self._mirror()
        self._drawn = False
        self._begin_draw()

    def state_dict(self) -> "dict[str, Any]":
        """The wrapped optimizer's state dict; its param groups carry ``flatopt_seed`` and ``flatopt_step``."""
        self._mirror()
        return super().state_dict()

    def load_state_dict(self, state_dict: "dict[str, Any]") -> None:
        """Load into the wrapped optimizer and go on from the saved step with the saved seed.

        Sigma, schedule and ``total_steps`` are this object's own, and are not saved.

        A state dict of the bare optimizer loads too; seed and step then stay as they are.
        """
        self.restore()
        super().load_state_dict(state_dict)
        self._adopt(self.optimizer.param_groups)
        self._mirror()

    def __getstate__(self) -> "dict[str, Any]":
        self.restore()
        groups = [{**group, "targets": as_plain_data(group["targets"])} for group in self.perturb_groups]
        names = (
            "optimizer",
            "_total_steps",
            "shared",
            "_roots",
            "_drawn",
            "_parts",
            "_seed",
            "_step",
            "_draws",
        )
        own = {"perturb_groups": groups, "_told": self._told.subjects, "_draw": self._draw + self._micro_batch_is_over()}
        return {name: self.__dict__[name] for name in names} | own

    def __setstate__(self, state: "dict[str, Any]") -> None:
        groups = [{**group, "targets": from_plain_data(group["targets"])} for group in state["perturb_groups"]]
        self._one_in = perturbed_one_in(state["_draws"])
        self._checked = {}
        super().__setstate__(state | {"perturb_groups": groups, "_told": Told(state["_told"])})

    def _check_rounding(self, group: "dict[str, Any]") -> None:
        for weight in group["targets"]:
            refuse_unrounded(weight, group["noise"])
        self._told.rounding(group, self._roots, self._one_in)

    def __repr__(self) -> str:
        lines = []
        for group in self.perturb_groups:
            quantised = sum(format_of(weight.owner, weight.name) is not None for weight in group["targets"])
            lines.append(
                f"  {len(group['targets'])} weights: sigma={group['sigma']}, schedule={group['schedule']}, "
                f"noise={group['noise']}, restore={group['restore']}"
                + (f" ({quantised} quantised: forward)" if quantised and group["restore"] != "forward" else "")
            )
        return "\n".join(["FlatPerturbOptimizer (", *lines, f"  {self.optimizer!r}", ")"])


def _weakly(
    reference: "weakref.ref[FlatPerturbOptimizer]", method: Callable[..., Any], gone: Callable[[], None] = lambda: None
) -> Callable[..., Any]:
    def hook(*args: Any) -> Any:
        optimizer = reference()
        return gone() if optimizer is None else method(optimizer, *args)

    return hook


def _tell_once_gone(inner: Optimizer) -> Callable[[], None]:
    kind = type(inner).__name__
    told: list[bool] = []

    def tell() -> None:
        if not told:
            told.append(True)
            warn_user(
                f"the FlatPerturbOptimizer around this {kind} is gone, as nothing kept it, so its steps are taken without "
                "noise. Keep it and step it: optimizer = FlatPerturbOptimizer(optimizer, ...). If you are done with it, "
                "call its detach()"
            )

    return tell


def _detach(weights: PerturbedWeights, doors: Doors, handles: "list[Any]", releases: "list[Callable[[], None]]") -> None:
    try:
        weights.detach()
    finally:
        doors.weights = None
        for handle in (*handles, *doors.handles, *(each for some in doors.strangers.values() for each in some)):
            handle.remove()
        for release in releases:
            release()


def _parameters_of_adapters(weights: "list[AdaptedWeight]") -> "set[int]":
    return {id(p) for weight in weights for p in weight.layer.parameters()}


def _first_parameter(optimizer: Optimizer) -> int:
    return next((id(p) for group in optimizer.param_groups for p in group["params"]), 0)


def _check_forward(weight: AdaptedWeight, group: "dict[str, Any]") -> None:
    if group["restore"] == "forward" or format_of(weight.owner, weight.name) is not None:
        reason = unsupported_reason(weight, group["noise"])
        if reason is not None:
            raise ValueError(f"{weight.path} cannot get its noise in the forward: {reason}")
