"""Sharpness-aware minimisation, the comparison: on the adapter, or on the frozen weights under it."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapters.checks import check
from ..adapters.registry import as_plain_data, from_plain_data
from ..core.arguments import is_number
from ..core.sharding import fsdp_modules, is_sharded, local
from ..core.warn import warn_user
from ..core.weight import AdaptedWeight
from ..perturbation.interrupts import uninterrupted
from ..perturbation.weights import perturbed_by_another
from .groups import read_groups
from .others import chain_of
from .replay import random_state, running_statistics_kept
from .settings import refuse_draws_under_sam
from .wrapper import OptimizerWrapper

SPACES = ("adapter", "full")


class SAM(OptimizerWrapper):
    r"""Sharpness-aware minimisation around any optimizer (Foret et al., ICLR 2021; adaptive: Kwon et al., ICML 2021).

    .. math::
        \varepsilon = \rho\,\frac{g}{\lVert g\rVert_2} \quad\text{or, adaptive,}\quad
        \varepsilon = \rho\,\frac{T^2 g}{\lVert T g\rVert_2},\ T = \operatorname{diag}|w|

    with :math:`g` the gradient at the weights :math:`w`. The wrapped optimizer then steps with the gradient taken at
    :math:`w + \varepsilon`. The norm runs over all perturbed weights together, in float32 (float64 for float64 weights),
    and over all shards of a DTensor. Where it is zero or not finite, :math:`\varepsilon = 0`.

    A step evaluates ``closure`` twice: at :math:`w` and at :math:`w + \varepsilon`. The second time sees the same random
    numbers (dropout, also numpy's and Python's), leaves BatchNorm's running statistics alone, and afterwards the global
    random states are as after one evaluation. The weights come back bit for bit from a copy, also when the closure raises.

    Args:
        optimizer: the constructed optimizer to wrap. ``param_groups``, ``state``, ``defaults`` and ``state_dict()`` are its
            own, moments and all.
        rho: radius ρ ≥ 0. 0.05 is Foret et al.'s; for LoRA the Flat-LoRA paper found .05 best on W and .003 on (A, B), out
            of {.001, .003, .005, .01, .05, .1, .2, .5}. Adaptive wants about ten times more. An attribute: may be changed.
        space: ``"adapter"`` perturbs the parameters that the wrapped optimizer trains, w = (A, B, ...); ``"full"`` the
            frozen base weights of ``targets``, w = W, at the cost of a gradient and a copy of W while the step lasts.
        targets: for ``space="full"``: a module, or a list of dicts with ``"modules"`` or ``"params"``, as for
            :class:`~flatopt.FlatPerturbOptimizer`.
        adaptive: scale with the weights, element by element (ASAM, without its small constant: weights at 0 stay there).
        shared: under torch.distributed, average g over the ranks, so that all ascend to one point. By default each rank
            takes the ``.grad`` that its closure left: under DDP the average for ``"adapter"``, which DDP has reduced by
            then, and the rank's own for ``"full"``, as DDP knows no frozen weights: an ascent per rank, the m-sharpness of
            Foret et al., at no cost. For that with ``"adapter"`` have the closure use ``ddp.no_sync()`` while
            ``optimizer.is_perturbed`` is False. DTensor gradients are reduced by FSDP and always shared.

    Raises:
        TypeError, ValueError: for arguments that do not fit, and for targets that cannot be perturbed, naming the module
            and the way out.
        RuntimeError: at a step in ``space="full"`` on weights that a FlatPerturbOptimizer perturbs.

    Example::

        optimizer = SAM(torch.optim.AdamW(trainable, lr=5e-4), rho=0.003)
        for micro_batches in loader:

            def closure():  # everything that makes the gradient of this step; gradients are cleared before
                total = 0.0
                for x, y in micro_batches:
                    loss = criterion(model(x), y) / len(micro_batches)
                    loss.backward()
                    total += loss.item()
                return total

            loss = optimizer.step(closure)

    With a ``GradScaler``, or to change the gradient before the step, take the step in two halves, and let the closure call
    ``scaler.scale(loss).backward()``::

        optimizer.backward(closure)
        scaler.step(optimizer)
        scaler.update()

    FSDP2 works in both spaces; FSDP1 and DeepSpeed, whose flat shards do not tell of the other ranks, are not supported.
    """

    __module__ = "flatopt"  # the path by which pickles and users name it

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        rho: float = 0.05,
        space: str = "adapter",
        targets: "nn.Module | list[dict[str, Any]] | None" = None,
        adaptive: bool = False,
        shared: bool = False,
    ):
        self._wrap(optimizer)
        _check_rho(rho)
        if space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
        if space == "full" and targets is None:
            raise ValueError("space='full' perturbs the frozen base weights of targets: pass targets=model")
        if space != "full" and targets is not None:
            raise ValueError(
                f"space={space!r} perturbs the parameters that the optimizer trains, whatever the targets: leave targets "
                "out, or pass space='full' to perturb the frozen base weights of these"
            )
        for each in chain_of(optimizer):
            refuse_draws_under_sam(getattr(each, "draws", "step"))
        self.rho, self.space, self.adaptive, self.shared = rho, space, adaptive, shared
        self._targets: list[AdaptedWeight] = []
        self._roots: list[nn.Module] = []
        if space == "full":
            groups, self._roots = read_groups(targets, {})
            self._targets = [target for group in groups for target in group["targets"]]
            self._check_targets()
        self._ready = self._warned = False
        self._attach()

    def _attach(self) -> None:
        super()._attach()
        self._saved: list[tuple[Tensor, Tensor]] | None = None

    @property
    def is_perturbed(self) -> bool:
        """Whether the closure is being evaluated at w + ε: False in its first evaluation, True in its second."""
        return self._saved is not None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Two evaluations of ``closure``, then the wrapped optimizer's step.

        Args:
            closure: does the forward and backward of *all* micro-batches of the step and returns the loss. Gradients are
                cleared before each evaluation. May be left out after :meth:`backward`.

        Returns:
            What the closure returned at w, the unperturbed weights (the first time, if the wrapped optimizer asks again).

        Raises:
            RuntimeError: without a closure, if :meth:`backward` was not called since the last step.
        """
        if closure is None:
            # lr 0 everywhere: torch's distributed checkpointing makes such a step to fill the state
            if not self._ready and any(group.get("lr") != 0 for group in self.param_groups):
                raise RuntimeError(
                    "SAM needs the gradient twice: pass step(closure), where closure() does the forward and backward of the "
                    "whole step and returns the loss; or call backward(closure) before step(), e.g. with a GradScaler"
                )
            loss = self.optimizer.step()
        else:
            losses = []

            def evaluate() -> Any:
                losses.append(self.backward(closure))
                return losses[-1]

            loss = self.optimizer.step(evaluate)
            loss = losses[0] if losses else loss
        self._ready = False
        return loss

    def backward(self, closure: Callable[[], Any]) -> Any:
        """The first half of :meth:`step`: leave the gradient at w + ε in ``.grad`` and w as it was; return the loss."""
        _check_rho(self.rho)
        self._descend()  # what an interrupted step left
        parameters = self._perturbed_parameters()
        devices = {p.device for p in parameters}
        before = random_state(devices)
        with torch.enable_grad():
            try:
                with _differentiable(parameters):
                    self.zero_grad()
                    loss = closure()
                    after = random_state(devices)
                    self._ascend(parameters)
                before()
                try:
                    self.zero_grad()
                    with running_statistics_kept():
                        closure()
                finally:
                    after()
            finally:
                self._descend()
        self._ready = True
        return loss

    def _check_targets(self) -> None:
        for target in self._targets:
            check(target)
            if target.rebuilt:
                raise ValueError(
                    f"{target.path} is made anew at each forward (PEFT on nn.MultiheadAttention), so no gradient reaches "
                    "it; leave it out: pass the other layers as [{'modules': [...]}]"
                )

    def _perturbed_parameters(self) -> "list[Tensor]":
        if self.space == "full":
            for module in fsdp_modules(self._roots):
                module.reshard()  # type: ignore[operator]
            self._check_targets()
            shared = perturbed_by_another(self._targets)
            if shared is not None:
                raise RuntimeError(
                    f"{shared.path} is perturbed by a FlatPerturbOptimizer too, which would take SAM's ascent for a "
                    "stranger's write to it. Call detach() on that optimizer, or use SAM's space='adapter'"
                )
            parameters = [target.parameter for target in self._targets]
        else:
            parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return list(dict.fromkeys(parameters))

    @torch.no_grad()
    def _ascend(self, parameters: "list[Tensor]") -> None:
        """Set the weights to w + ε and keep w."""
        self._saved = []
        if self.shared and torch.distributed.is_available() and torch.distributed.is_initialized():
            _average_gradients(parameters)
        parameters = [p for p in parameters if p.grad is not None]
        if not parameters:
            self._warn_no_gradient()
            return
        norm = _norm(_scaled_gradient(p) if self.adaptive else _gradient(p) for p in parameters)
        if not (math.isfinite(norm) and norm > 0):
            return
        for parameter in parameters:
            w, g = local(parameter.detach()), local(_gradient(parameter))
            self._saved.append((w, w.clone()))
            work = torch.promote_types(w.dtype, torch.float32)
            step = g.to(work) * (self.rho / norm)
            if self.adaptive:
                step *= w.to(work).square()
            w.copy_(w.to(work) + step)
        torch.clear_autocast_cache()  # an autocast region around the whole step holds half-precision copies of w

    @torch.no_grad()
    def _descend(self) -> None:
        if self._saved is None:
            return
        with uninterrupted():
            for w, clean in self._saved:
                w.copy_(clean)
            self._saved = None
        torch.clear_autocast_cache()

    def _warn_no_gradient(self) -> None:
        if self._warned:
            return
        self._warned = True
        reasons = "the closure did not call backward(), or trains other parameters than this optimizer's"
        if self.space == "full":
            reasons = (
                "the closure did not call backward(), or the module detaches its frozen weights (then only space='adapter' "
                "can work)"
            )
        warn_user(f"SAM found no gradient on any weight it should perturb, so w stays put: {reasons}.")

    def __getstate__(self) -> "dict[str, Any]":
        names = ("optimizer", "rho", "space", "adaptive", "shared", "_roots", "_ready", "_warned")
        return {name: self.__dict__[name] for name in names} | {"_targets": as_plain_data(self._targets)}

    def __setstate__(self, state: "dict[str, Any]") -> None:
        super().__setstate__(state | {"_targets": from_plain_data(state["_targets"])})

    def __repr__(self) -> str:
        what = f"{len(self._targets)} weights of W" if self.space == "full" else "the parameters of"
        return f"SAM (\n  rho={self.rho}, adaptive={self.adaptive}, on {what}\n  {self.optimizer!r}\n)"


def _check_rho(rho: float) -> None:
    if not (is_number(rho) and rho >= 0):
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")


@contextmanager
def _differentiable(parameters: "list[Tensor]") -> "Iterator[None]":
    """Frozen parameters get gradients inside; afterwards they are frozen again, without any."""
    frozen = [(p, p.grad) for p in parameters if not p.requires_grad]
    try:
        for parameter, _ in frozen:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield
    finally:
        with uninterrupted():
            for parameter, grad in frozen:
                parameter.requires_grad_(False)
                parameter.grad = grad


def _average_gradients(parameters: "list[Tensor]") -> None:
    for parameter in parameters:
        if is_sharded(parameter):
            continue
        if parameter.grad is None:  # every rank must take part
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # those without one were left out
    return parameter.grad


def _scaled_gradient(parameter: Tensor) -> Tensor:
    work = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(work).abs() * _gradient(parameter).to(work)


def _norm(tensors: "Iterable[Tensor]") -> float:
    """The 2-norm of all tensors together, at least in float32; that of the whole tensor where it is sharded."""
    norms = []
    for tensor in tensors:
        tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
        norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))
