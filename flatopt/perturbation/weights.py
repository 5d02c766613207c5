"""The weights of one optimizer, and where they stand: clean, perturbed, or suspended (clean amid a step)."""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..adapters.quantized import format_of
from ..core.sharding import (
    data_parallel_rank,
    fsdp_modules,
    is_fsdp_module,
    mesh_of,
    reshard_amid_forward,
    tensor_parallel_mesh,
)
from ..core.weight import AdaptedWeight, WeightView
from ..ops import RESTORES as IN_PLACE
from ..ops import Plan, writing
from .forward import ForwardPlan, own_forwards
from .interrupts import uninterrupted
from .look import GroupLook
from .memory import extents, overlap
from .noise import NoiseRequest
from .noisy_layers import install
from .tensors import storage_of

RESTORES = (*IN_PLACE, "forward")
CLEAN, PERTURBED, SUSPENDED = "clean", "perturbed", "suspended"

_attached: "weakref.WeakSet[PerturbedWeights]" = weakref.WeakSet()


class PerturbedWeights:
    """All weights of an optimizer's groups and the plans that move them. Holds the optimizer only while they move.

    ``state`` is ``"clean"``, ``"perturbed"`` or ``"suspended"``: clean for a reader amid a step, the same perturbed bits to
    come back. Every move is all or none: what raises midway is taken back at once, and where even that raises, the state
    stays ``"perturbed"``, ``partly`` is true, and :meth:`restore` goes on from where it stopped.
    """

    def __init__(self, groups: "list[dict[str, Any]]", roots: "list[nn.Module]"):
        self.groups, self.roots = groups, roots
        self.state = CLEAN
        self.noisy = False  # state == PERTURBED: torch.compile keeps code for each value of what a hook reads
        self.partly = False  # perturbed only in part: nobody may use W before restore() has succeeded
        self.moved = False  # there is noise now, for readers that stand clean amid it too
        self.writes = False  # some of it is in W itself, not in a layer's forward
        self.held = False  # inside ``with perturbed()``: every forward is one at W + ε
        self.thread = 0  # that perturbed them
        self.taken_over = ""  # a weight that a newer optimizer perturbs now
        self.optimizer: Callable[[], Any] = lambda: None  # a weak reference to it
        self.detach_all: Callable[[], Any] = self.detach  # of the whole optimizer
        self._looks: list[GroupLook] = []
        self._plans: list[Plan] = []
        self.request: NoiseRequest | None = None  # of the noise in W now, or last
        self._kept_versions: list[tuple[WeightView, Any]] = []
        self._swapped: list[WeightView] = []  # replaced while perturbed, before a reader suspended: swapped back, maybe
        self._fsdp = fsdp_modules(roots)
        self._mesh: tuple[Any] | None = None  # of the forward, where no weight tells it: looked up once
        self._lock = threading.RLock()
        self._process = os.getpid()

    def _stand(self, state: str) -> None:
        self.state, self.noisy = state, state == PERTURBED

    # --- the moves --------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def perturb(self, request: NoiseRequest) -> None:
        """Set W to W + ε; after a suspension, to the same bits again."""
        if self.state == PERTURBED:
            return
        if self.state == SUSPENDED:
            self.resume()
            return
        _optimizer = self._about_to_move()
        with self._lock, uninterrupted(), writing():
            self.reshard()
            self._refuse(self._written(wait=False))  # a GPU tells of the last step now
            self._plans, self.request = self._look(request), request
            self.moved, self.writes = bool(self._plans), any(not isinstance(each, ForwardPlan) for each in self._plans)
            self._refuse_shared_memory()
            key = request.key
            self._stand(PERTURBED)
            self.thread = threading.get_ident()
            try:
                for each in self._plans:
                    each.perturb(key)
            except BaseException:
                self._take_back()
                raise
            self._note_versions()

    @torch.compiler.disable
    def restore(self, untouched: bool = False) -> None:
        """Set W back, bit for bit, and end the step's noise. Idempotent.

        ``untouched``: nobody ran since W was suspended, so it need not be asked whether W is still clean. Who kept W + ε
        before (an EMA's ``store``) may have put that back, through ``.data``.

        Raises:
            RuntimeError: naming the weights that somebody wrote to or replaced while they were perturbed, after all others
                came back.
        """
        if self.state == CLEAN:
            return
        _optimizer = self._about_to_move()
        with self._lock, uninterrupted(), writing():
            self.reshard()
            replaced, written = self._replaced(), []
            if self.state == SUSPENDED and not untouched and not replaced and all(look.exact for look in self._looks):
                self.resume()
            if self.state == PERTURBED:
                written = self._bits_back()
            else:  # what was replaced since by others' hands found W clean
                replaced = [view for view in replaced if view in self._swapped]
            self._end()
            self._refuse(written, replaced)

    @torch.compiler.disable
    def suspend(self) -> None:
        """Clean W for a reader amid a step; :meth:`resume` puts the same perturbed bits back.

        A graph that saved the perturbed W is then valid again, so the version counters go back too. Not so with
        ``subtract``, whose bits drift: there backward raises, as it should. A weight that was replaced may only be swapped
        out (``functional_call``, an EMA): if it is not back for :meth:`resume` or :meth:`restore`, they raise.
        """
        if self.partly:
            self.restore()
        if self.state != PERTURBED:
            return
        _optimizer = self._about_to_move()
        with self._lock, uninterrupted(), writing():
            self.reshard()
            replaced = self._replaced()
            exact = [(v, v.tensor) for look in self._looks if look.exact for v in look.views if v.tensor is not None]
            self._kept_versions = [(v, _unsafe_preserve_version_counter(t)) for v, t in exact]
            written = self._bits_back()
            if written:
                self._end()
                self._refuse(written, replaced)
            self._note_versions()
            self._stand(SUSPENDED)
            self._swapped = replaced

    @torch.compiler.disable
    def resume(self) -> None:
        """The perturbed bits again after :meth:`suspend`; the same noise anew where a weight moved or was replaced."""
        request = self.request
        if self.state != SUSPENDED or request is None:
            return
        _optimizer = self._about_to_move()
        with self._lock, uninterrupted(), writing():
            self.reshard()
            replaced = self._replaced()
            if replaced or any(look.moved() for look in self._looks):
                swapped = [view for view in replaced if view in self._swapped]
                self._end()
                self._refuse([], swapped)
                self.perturb(request)
                return
            moved = self._written_to()
            for look in self._looks:
                look.follow_adapters()
            self._stand(PERTURBED)
            try:
                for each in self._plans:
                    each.perturb(request.key)
                self._follow()
                moved += self._written(wait=False)
                for view, kept in self._kept_versions:
                    # what was written to in between is not what a graph saved: there backward must raise
                    if view not in moved:
                        kept.__exit__(None, None, None)
            except BaseException:
                self._take_back()
                raise
            self._kept_versions, self._swapped = [], []
            self._note_versions()

    def _about_to_move(self) -> Any:
        """The optimizer, to be held while weights move: the collector would have them restored, at any allocation."""
        if os.getpid() != self._process:
            self._refuse_shared_with_processes()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the base weights would have to move while a CUDA graph is captured: each replay would repeat this step's "
                "noise. Call optimizer.perturb() before the capture and before each replay, and optimizer.step() after it"
            )
        return self.optimizer()

    def _bits_back(self) -> "list[WeightView]":
        """Every piece clean. Returns the weights that somebody wrote to."""
        written_to = bool(self._written_to())
        try:
            for each in self._plans:
                each.restore()
            self._follow()
            found = self._written(wait=written_to)
        except BaseException:
            self._take_back()
            raise
        self.partly = False
        return found

    def _written(self, wait: bool) -> "list[WeightView]":
        return [view for look in self._looks for each in look.plans for view in each.written(wait)]

    def _take_back(self) -> None:
        """After a failure: clean, or else perturbed with all that a later :meth:`restore` needs."""
        try:
            for each in self._plans:
                each.restore()
            self._follow()
        except BaseException:
            self.partly = True
            return  # the failure that is being handled is the one to tell
        self._end()

    def _end(self) -> None:
        self._note_versions()
        self._stand(CLEAN)
        self.partly = False
        self._plans, self._kept_versions, self._swapped = [], [], []
        self.moved = self.writes = False
        for look in self._looks:
            look.release()

    # --- the look ---------------------------------------------------------------------------------------------------

    def _look(self, request: NoiseRequest) -> "list[Plan]":
        """Every weight looked at once, and the plans of this step, their standard deviations filled in."""
        while len(self._looks) < len(self.groups):
            self._looks.append(GroupLook())
        at_work: list[tuple[GroupLook, float]] = []
        seen: set[int] = set()
        first = 1  # a weight's number is its place in the groups, tied and unperturbed ones counted
        try:
            for look, group, sigma in zip(self._looks, self.groups, request.sigmas):
                weights = group["targets"]
                if sigma > 0:
                    look.at(weights, first, group["noise"], group["restore"], seen)
                    at_work.append((look, sigma))
                else:
                    look.release()
                first += len(weights)
            for look, sigma in at_work:
                for each in look.plans:
                    each.fill_std(sigma)
        except BaseException:
            for look in self._looks:
                look.release()
            raise
        return [each for look, _ in at_work for each in look.plans]

    def _note_versions(self) -> None:
        for look in self._looks:
            look.note_versions()

    def _written_to(self) -> "list[WeightView]":
        """Weights whose version counters say that somebody else wrote to them; the checksums say whether it matters."""
        return [view for look in self._looks for view in look.written_to()]

    def _replaced(self) -> "list[WeightView]":
        return [view for look in self._looks for view in look.replaced()]

    def _follow(self) -> None:
        for look in self._looks:
            look.follow()

    def _refuse(self, written: "list[WeightView]", replaced: "Sequence[WeightView]" = ()) -> None:
        if not (written or replaced):
            return
        for look in self._looks:
            look.forget()
        kept = {id(view) for look in self._looks if look.keeps_copies for view in look.views}
        overwritten, lost = [v for v in written if id(v) in kept], [v for v in written if id(v) not in kept]
        said = []
        if lost:
            said.append(
                f"{_names(lost)} was written to while it was perturbed, so its clean value is lost. Reload the base weights"
            )
        if overwritten:
            said.append(
                f"{_names(overwritten)} was written to while it was perturbed: its clean value is back, from the copy, and "
                "what was written is lost"
            )
        if replaced:
            said.append(
                f"{_names(replaced)} was replaced while it was perturbed: the parameter that it was is clean again, the new "
                "one was left as it is, and has noise in it if it was made from the old one's values. If so, reload it"
            )
        said.append(
            "All other weights are back. Before changing or swapping base weights (an EMA), call optimizer.restore()"
        )
        raise RuntimeError(". ".join(said))

    def reshard(self) -> None:
        """Let go of what FSDP2 gathered, so that the weights are the shards."""
        if not self._fsdp and any(map(is_fsdp_module, self.roots)):
            self._fsdp = fsdp_modules(self.roots)  # sharded since the optimizer was made
        for module in self._fsdp:
            module.reshard()  # type: ignore[operator]

    def data_parallel_rank(self) -> int:
        """This process's number among those that draw noise of their own."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0
        self.reshard()  # gathered weights do not tell which ranks share one
        mesh = mesh_of(weight.parameter for weight in self.weights())
        if mesh is None:
            self._mesh = self._mesh or (tensor_parallel_mesh(self.roots),)
            (mesh,) = self._mesh
        return data_parallel_rank(mesh)

    @contextmanager
    def gathered_again(self, running: "Sequence[nn.Module]") -> Iterator[None]:
        """A move inside forwards of the FSDP2 modules ``running``: these find gathered what they had gathered before it."""
        gathered = [module for module in running if reshard_amid_forward(module)]
        self.reshard()
        self._fsdp += [module for module in gathered if module not in self._fsdp]
        yield
        for module in gathered:
            module.unshard()  # type: ignore[operator]

    # --- one weight, one optimizer ----------------------------------------------------------------------------------

    def attach(self) -> None:
        _attached.add(self)
        for group in self.groups:
            for weight in group["targets"]:
                if group["restore"] == "forward" or format_of(weight.owner, weight.name) is not None:
                    install(weight.owner)

    @torch.compiler.disable
    def detach(self) -> None:
        try:
            try:
                self.restore()
            finally:
                _optimizer = self._about_to_move()
                with self._lock, uninterrupted(), writing():
                    self._refuse(self._written(wait=True))
        finally:
            _attached.discard(self)
            own_forwards(self.weights())

    def weights(self) -> "list[AdaptedWeight]":
        return [weight for group in self.groups for weight in group["targets"]]

    def lie_inside(self, module: nn.Module) -> bool:
        """Whether any of the weights, a layer that adapts one, or what shares their memory, is part of ``module``."""
        inside = set(module.modules())
        if any(weight.owner in inside or weight.layer in inside for weight in self.weights()):
            return True
        mine = {storage_of(weight.parameter) for weight in self.weights()} - {0}
        held = (tensor for part in inside for tensor in (*part._parameters.values(), *part._buffers.values()))
        return any(tensor is not None and storage_of(tensor) in mine for tensor in held)

    def memory(self) -> "list[tuple[int, int, AdaptedWeight]]":
        """(start, end) of what each weight occupies."""
        return extents(self.weights())

    def rivals(self) -> "list[tuple[PerturbedWeights, AdaptedWeight]]":
        """Others that are attached and perturb some of the same memory, each with one such weight."""
        found = []
        for other in list(_attached):
            if other is not self and (shared := overlap(self.memory(), other.memory())) is not None:
                found.append((other, shared))
        return found

    def _refuse_shared_with_processes(self) -> None:
        for weight in self.weights():
            if weight.parameter.device.type == "cpu" and weight.parameter.is_shared():
                raise RuntimeError(
                    f"{weight.path} lies in memory that this process shares with the one that FlatPerturbOptimizer was made "
                    "in: noise put on or taken off here would be so there. Call a copy here (copy.deepcopy(model))"
                )

    def _refuse_shared_memory(self) -> None:
        if len(_attached) <= 1:  # self, the usual case
            return
        others = [other for other in list(_attached) if other is not self and other.state == PERTURBED]
        if not others:
            return
        mine = self.memory()
        for other in others:
            shared = overlap(mine, other.memory())
            if shared is not None:
                for look in self._looks:
                    look.release()
                raise RuntimeError(
                    f"{shared.path} is already perturbed by another FlatPerturbOptimizer amid its step; one weight can have "
                    "one. Call detach() on the other optimizer (or step it, or delete it), or give the two different modules"
                )


def perturbed_by_another(targets: "Iterable[AdaptedWeight]") -> "AdaptedWeight | None":
    """One of ``targets`` that a FlatPerturbOptimizer perturbs, or shares memory with one that it does."""
    mine = extents(targets) if _attached else []
    found = (overlap(mine, weights.memory()) for weights in list(_attached))
    return next((weight for weight in found if weight is not None), None)


def restore_inside(module: nn.Module, targets: "Sequence[AdaptedWeight]" = ()) -> None:
    """Restore the weights of every optimizer that has some inside ``module``, or in the memory of ``targets``.

    Raises:
        RuntimeError: amid a ``with optimizer.perturbed()``, which would put its noise on again at the next forward.
    """
    moved = [weights for weights in list(_attached) if weights.state != CLEAN or weights.held]
    mine = extents(targets) if moved else []
    for weights in moved:
        if weights.lie_inside(module) or overlap(mine, weights.memory()) is not None:
            if weights.held:
                raise RuntimeError(
                    f"{weights.weights()[0].path} is held at W + ε by `with optimizer.perturbed()`, and its clean value is "
                    "asked for: do this outside of it"
                )
            weights.restore()


def _names(views: "Sequence[WeightView]") -> str:
    return ", ".join(view.weight.path for view in views)
