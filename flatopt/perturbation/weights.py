"""The weights of one optimizer, and where they stand: clean, perturbed, or suspended (clean amid a step)."""

import bisect
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..adapters.base import Adapter
from ..adapters.quantized import data_ptr, format_of
from ..core.checks import check, check_lasting
from ..core.sharding import first_row, fsdp_modules, is_fsdp_module, let_go, local, local_update
from ..core.weight import AdaptedWeight, WeightView, in_memory_order
from ..ops import RESTORES as IN_PLACE
from ..ops import Plan, plan, writing
from .forward import ForwardPlan, own_forwards
from .interrupts import uninterrupted
from .noise import NoiseRequest
from .noisy_layers import install

RESTORES = (*IN_PLACE, "forward")
CLEAN, PERTURBED, SUSPENDED = "clean", "perturbed", "suspended"

_attached: "weakref.WeakSet[PerturbedWeights]" = weakref.WeakSet()


@contextmanager
def _writing() -> Iterator[None]:
    with uninterrupted(), writing():
        yield


class PerturbedWeights:
    """All weights of an optimizer's groups and the plans that move them. Holds no reference to the optimizer.

    ``state`` is ``"clean"``, ``"perturbed"`` or ``"suspended"``: clean for a reader amid a step, the same perturbed bits to
    come back. Every move is all or none: what raises midway is taken back at once, and where even that raises, the state
    stays ``"perturbed"``, ``partly`` is true, and :meth:`restore` goes on from where it stopped.
    """

    def __init__(self, groups: "list[dict[str, Any]]", roots: "list[nn.Module]"):
        self.groups, self.roots = groups, roots
        self._state = CLEAN
        self.noisy = False  # state == PERTURBED: torch.compile keeps code for each value of what a hook reads
        self.partly = False  # perturbed only in part: nobody may use W before restore() has succeeded
        self.held = False  # inside ``with perturbed()``: every forward is one at W + ε
        self.thread = 0  # that perturbed them
        self.taken_over = ""  # a weight that a newer optimizer perturbs now
        self.detach_all: Callable[[], Any] = self.detach  # of the whole optimizer
        self._looks: list[GroupLook] = []
        self._plans: list[Plan] = []
        self._request: NoiseRequest
        self._kept_versions: list[tuple[WeightView, Any]] = []
        self._swapped: list[WeightView] = []  # replaced while perturbed, before a reader suspended: swapped back, maybe
        self._fsdp = fsdp_modules(roots)
        self._lock = threading.RLock()

    @property
    def state(self) -> str:
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        self._state, self.noisy = state, state == PERTURBED

    # --- the moves --------------------------------------------------------------------------------------------------

    def perturb(self, request: NoiseRequest) -> None:
        """Set W to W + ε, of shards after :meth:`reshard`; after a suspension, to the same bits again."""
        if self.state == PERTURBED:
            return
        if self.state == SUSPENDED:
            self.resume()
            return
        with self._lock, _writing():
            self._refuse(self._written(wait=False))  # a GPU tells of the last step now
            self._plans, self._request = self._look(request), request
            self._refuse_shared_memory()
            key = request.key
            self.state, self.thread = PERTURBED, threading.get_ident()
            try:
                for each in self._plans:
                    each.perturb(key)
            except BaseException:
                self._take_back()
                raise
            self._note_versions()

    def restore(self) -> None:
        """Set W back, bit for bit, and end the step's noise. Idempotent.

        Raises:
            RuntimeError: naming the weights that somebody wrote to or replaced while they were perturbed, after all others
                came back.
        """
        if self.state == CLEAN:
            return
        with self._lock, _writing():
            self.reshard()
            replaced, written = self._replaced(), []
            if self.state == PERTURBED:
                written = self._bits_back()
            else:  # what was replaced since by others' hands found W clean
                replaced = [view for view in replaced if view in self._swapped]
            self._end()
            self._refuse(written, replaced)

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
        with self._lock, _writing():
            self.reshard()
            replaced = self._replaced()
            exact = [(v, v.tensor) for look in self._looks if look.exact for v in look.views if v.tensor is not None]
            self._kept_versions = [(v, _unsafe_preserve_version_counter(t)) for v, t in exact]
            written = self._bits_back()
            if written:
                self._end()
                self._refuse(written, replaced)
            self._note_versions()
            self.state, self._swapped = SUSPENDED, replaced

    def resume(self) -> None:
        """The perturbed bits again after :meth:`suspend`; the same noise anew where a weight moved or was replaced."""
        if self.state != SUSPENDED:
            return
        with self._lock, _writing():
            self.reshard()
            replaced = self._replaced()
            if replaced or any(look.moved() for look in self._looks):
                swapped = [view for view in replaced if view in self._swapped]
                self._end()
                self._refuse([], swapped)
                self.perturb(self._request)
                return
            moved = self._written_to()
            self.state = PERTURBED
            try:
                for each in self._plans:
                    each.perturb(self._request.key)
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
        self.state, self.partly = CLEAN, False
        self._plans, self._kept_versions, self._swapped = [], [], []
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
        if said:
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

    @contextmanager
    def gathered_again(self, running: "Sequence[nn.Module]") -> Iterator[None]:
        """A move inside forwards of the FSDP2 modules ``running``: these find gathered what they had gathered before it."""
        gathered = [module for module in running if let_go(module)]
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

    def detach(self) -> None:
        try:
            try:
                self.restore()
            finally:
                with _writing():
                    self._refuse(self._written(wait=True))
        finally:
            _attached.discard(self)
            own_forwards(self.weights())

    def weights(self) -> "list[AdaptedWeight]":
        return [weight for group in self.groups for weight in group["targets"]]

    def writes(self) -> bool:
        """Whether any of this step's noise is in W itself, not in a layer's forward."""
        return any(not isinstance(each, ForwardPlan) for each in self._plans)

    def lie_inside(self, module: nn.Module) -> bool:
        """Whether any of the weights, or a layer that adapts one, is part of ``module``."""
        inside = set(module.modules())
        return any(weight.owner in inside or weight.layer in inside for weight in self.weights())

    def memory(self) -> "list[tuple[int, int, AdaptedWeight]]":
        """(start, end) of what each weight occupies."""
        return [(*extent, weight) for weight in self.weights() if (extent := _extent(weight)) is not None]

    def rivals(self) -> "list[tuple[PerturbedWeights, AdaptedWeight]]":
        """Others that are attached and perturb some of the same memory, each with one such weight."""
        found = []
        for other in list(_attached):
            if other is not self and (shared := _overlap(self.memory(), other.memory())) is not None:
                found.append((other, shared))
        return found

    def _refuse_shared_memory(self) -> None:
        others = [other for other in list(_attached) if other is not self and other.state == PERTURBED]
        if not others:
            return
        mine = self.memory()
        for other in others:
            shared = _overlap(mine, other.memory())
            if shared is not None:
                for look in self._looks:
                    look.release()
                raise RuntimeError(
                    f"{shared.path} is already perturbed by another FlatPerturbOptimizer amid its step; one weight can have "
                    "one. Call detach() on the other optimizer (or step it, or delete it), or give the two different modules"
                )


def restore_inside(module: nn.Module) -> None:
    """Restore the weights of every optimizer that has some inside ``module``."""
    for weights in list(_attached):
        if weights.state != CLEAN and weights.lie_inside(module):
            weights.restore()


class GroupLook:
    """What was seen of a group's weights, kept from step to step: what is seen again is not worked out again.

    Between two steps anyone may replace, move, merge or write to a weight, so every step looks; on a small model working it
    all out anew would take longer than the noise. ``views`` and ``plans`` keep no reference to W between steps.
    """

    def __init__(self) -> None:
        self.views: list[WeightView] = []
        self.plans: list[Plan] = []
        self.exact = True
        self.parameters: list[Tensor] = []
        self.tensors: list[Tensor] = []
        self._weights: list[AdaptedWeight] = []
        self._settings: tuple[Any, ...] = ()
        self._known: list[WeightView] = []  # of every weight, tied ones too
        self._seen: list[list[Any]] = []  # column by column: identity, memory, kind, version
        self._quantised: list[bool] = []
        self._moved: dict[int, bool] = {}  # of weights that lie in other memory now: with the values that were perturbed?
        self._batches: list[tuple[Adapter, list[WeightView], list[AdaptedWeight]]] = []
        self._keys: list[Any] = []  # of each batch's updates

    def at(self, weights: "list[AdaptedWeight]", first: int, noise: str, restore: str, taken: "set[int]") -> None:
        """Look at ``weights``, numbered from ``first``, and make ``plans``; ``taken``: memory that an earlier group has."""
        settings = (first, noise, restore, list(map(id, weights)))
        if self._settings != settings:
            self._settings, self._weights = settings, list(weights)  # amid a step they are these
            self._seen, self._keys = [], []
            self._quantised = [False] * len(weights)
            self._known = [WeightView(weight, first + i) for i, weight in enumerate(weights)]
            self.plans = []
        parameters = parameters_of(weights)
        before = self._seen[0] if self._seen else [0] * len(weights)
        identities = list(map(id, parameters))
        if identities != before:
            for weight, now, then in zip(weights, identities, before):
                if now != then:
                    check(weight, in_forward=True)  # before anything is asked of what may be no tensor
        tensors = [p.detach() if type(p) is nn.Parameter else local(p.detach()) for p in parameters]
        # in columns: a list a property costs a third of a tuple a weight
        seen: list[Any] = [
            identities,
            [t.data_ptr() for t in tensors],
            [t.dtype for t in tensors],
            [t.shape for t in tensors],
            [t.stride() for t in tensors],
            [p.requires_grad for p in parameters],
            [t._version for t in tensors],
        ]
        if seen != self._seen:
            rows: list[Any] = list(zip(*seen))
            known: list[Any] = list(zip(*self._seen)) or [()] * len(weights)
            for i, (row, before) in enumerate(zip(rows, known)):
                if row != before:
                    if before and row[0] == before[0]:
                        check(weights[i], in_forward=True)
                    self._quantised[i] = format_of(weights[i].owner, weights[i].name) is not None
                    self._known[i] = WeightView(weights[i], first + i, first_row(parameters[i], weights[i].layout))
            self._seen, self._keys, self.plans = seen, [], []
        self.parameters, self.tensors = parameters, tensors
        for view, parameter, tensor, quantised in zip(self._known, parameters, tensors, self._quantised):
            view.parameter, view.tensor = parameter, None if quantised else tensor
        memory = [there or data_ptr(p) for there, p in zip(seen[1], parameters)] if 0 in seen[1] else seen[1]
        views = []
        for view, there in zip(self._known, memory):
            if there not in taken:
                taken.add(there)
                views.append(view)
        if views != self.views:
            self._by_adapter(views)
        self._look_at_updates()
        if not self.plans:
            self._plan(noise, restore)

    def _by_adapter(self, views: "list[WeightView]") -> None:
        self.views, self._keys, self.plans = views, [], []
        batches: dict[int, list[WeightView]] = {}
        for view in views:
            batches.setdefault(id(view.weight.adapter), []).append(view)
        self._batches = [(batch[0].weight.adapter, batch, [v.weight for v in batch]) for batch in batches.values()]

    def _plan(self, noise: str, restore: str) -> None:
        self.exact = restore != "subtract"
        inside = [view for view in self.views if restore == "forward" or view.tensor is None]
        in_place = [view for view in self.views if restore != "forward" and view.tensor is not None]
        if noise == "isotropic" and inside and in_place:
            raise ValueError(
                f"noise='isotropic' has one scale for a whole group, but {inside[0].weight.path} is quantised and others "
                "are not. Put them into groups of their own, or use restore='forward' for all"
            )
        kept = [view for view in in_place if not view.weight.rebuilt]
        rebuilt = [view for view in in_place if view.weight.rebuilt]
        self.plans = [p for some, how in ((kept, restore), (rebuilt, "copy")) if some for p in plan(some, noise, how)]
        self.plans += [ForwardPlan(inside, noise)] if inside else []

    def _look_at_updates(self) -> None:
        """Ask for the updates that are not the same tensors as before."""
        self._keys = self._keys or [None] * len(self._batches)
        for number, (adapter, views, weights) in enumerate(self._batches):
            keys, known = adapter.update_key(weights), self._keys[number]
            if keys is None or keys != known:
                old = [None] * len(views) if keys is None or known is None else known
                news = [view for view, now, then in zip(views, keys or old, old) if then is None or now != then]
                self._ask(adapter, news)
                self._keys[number] = keys

    def _ask(self, adapter: Adapter, views: "list[WeightView]") -> None:
        for view in views:
            if adapter.is_merged(view.weight.layer):
                check(view.weight, in_forward=True)
        for view, update in zip(views, adapter.updates([view.weight for view in views])):
            assert view.parameter is not None
            mine = local_update(update, view.parameter)
            view.update = mine if view.tensor is None else in_memory_order(mine, view.tensor, view.weight.layout)

    def note_versions(self) -> None:
        """What flatopt itself wrote is no change."""
        if self.tensors:
            self._seen[-1] = [tensor._version for tensor in self.tensors]

    def written_to(self) -> "list[WeightView]":
        if not self.tensors or [tensor._version for tensor in self.tensors] == self._seen[-1]:
            return []
        moved = {id(view) for view, t, version in zip(self._known, self.tensors, self._seen[-1]) if t._version != version}
        return [view for view in self.views if id(view) in moved and not view.weight.version_moves]

    def replaced(self) -> "list[WeightView]":
        """Weights in whose place something else stands: another parameter, or other values as its data.

        None where each forward makes them anew. What only lies in other memory (``model.to``) is noted, see :meth:`moved`.
        """
        if not self.tensors:
            return []
        parameters = standing(self._weights)
        if all(map(operator.is_, parameters, self.parameters)) and [p.data_ptr() for p in self.parameters] == self._seen[1]:
            return []
        gone = set()
        for view, here, there in zip(self._known, parameters, self.parameters):
            if view.tensor is None:
                continue
            now = None if here is None else local(here.detach())
            if now is not None and now.data_ptr() != view.tensor.data_ptr() and id(view) not in self._moved:
                # asked before the first bit goes back, and not again where that has to be tried twice
                self._moved[id(view)] = view.weight.rebuilt or (here is there and _same_values(view.tensor, now))
            if not self._moved.get(id(view), here is there or view.weight.rebuilt):
                gone.add(id(view))
        return [view for view in self.views if id(view) in gone]

    @property
    def keeps_copies(self) -> bool:
        """Whether ``restore="copy"``: then a weight that was written to comes back too."""
        return self._settings[2:3] == ("copy",)

    def moved(self) -> bool:
        """Whether any weight lies in other memory since, those apart that each forward makes anew."""
        return any(self._moved.get(id(view)) and not view.weight.rebuilt for view in self._known)

    def follow(self) -> None:
        """What lies in the memory that was left belongs where the weight is now."""
        if self._moved:
            for view, parameter in zip(self._known, standing(self._weights)):
                if parameter is not None and view.tensor is not None and self._moved.get(id(view)):
                    now = local(parameter.detach())
                    if now.shape == view.tensor.shape:
                        now.copy_(view.tensor)
            self._moved = {}

    def release(self) -> None:
        for each in self.plans:
            each.release()
        self.parameters, self.tensors, self._moved = [], [], {}
        for view in self._known:
            view.parameter = view.tensor = view.rows = None


def parameters_of(weights: "list[AdaptedWeight]") -> "list[Tensor]":
    # a plain lookup for all, as properties cost as much as the rest
    found = [weight.owner._parameters.get(weight.name) for weight in weights]
    for weight, parameter in zip(weights, found):
        if parameter is None:
            check_lasting(weight)  # a parametrization has taken its place, maybe
    return [weight.parameter if p is None else p for weight, p in zip(weights, found)]


def standing(weights: "list[AdaptedWeight]") -> "list[Tensor | None]":
    """What stands in the weights' places, found without running anybody's code: a parametrization would compute."""
    found: list[Tensor | None] = [weight.owner._parameters.get(weight.name) for weight in weights]
    for i, weight in enumerate(weights):
        if found[i] is None:
            own = weight.owner.__dict__
            found[i] = own.get(weight.name, own["_buffers"].get(weight.name))
    return found


def _same_values(mine: Tensor, other: Tensor) -> bool:
    """Whether ``other`` is ``mine`` after a ``model.to(...)``."""
    if other.device.type == "meta":
        return True  # all values are gone, and were meant to
    return mine.shape == other.shape and torch.allclose(mine.to(other), other, rtol=0, atol=0, equal_nan=True)


def _names(views: "Sequence[WeightView]") -> str:
    return ", ".join(view.weight.path for view in views)


def _extent(weight: AdaptedWeight) -> "tuple[int, int] | None":
    try:
        tensor = weight.weight
        start = tensor.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
        return (start, start + reach * tensor.element_size()) if start and tensor.numel() else None
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None  # a tensor that is elsewhere (meta, fake, packed): it shares memory with nothing here


def _overlap(
    mine: "list[tuple[int, int, AdaptedWeight]]", others: "list[tuple[int, int, AdaptedWeight]]"
) -> "AdaptedWeight | None":
    """A weight of ``mine`` that shares memory with one of ``others``."""
    others = sorted(others, key=lambda extent: extent[0])
    starts = [start for start, _, _ in others]
    reach = list(itertools.accumulate((end for _, end, _ in others), max))
    for start, end, weight in mine:
        before = bisect.bisect_left(starts, end)
        if before and reach[before - 1] > start:
            return weight
    return None


def refuse_overlapping(weights: "Sequence[AdaptedWeight]") -> None:
    """Raise where two targets are views that share some memory: noise taken off one would be taken off the other."""
    extents = sorted(((*extent, i) for i, weight in enumerate(weights) if (extent := _extent(weight))), key=lambda e: e[:2])
    for (start, end, i), (start2, end2, j) in itertools.pairwise(extents):
        if start2 < end and (start, end) != (start2, end2) and _shares_elements(weights[i], weights[j]):
            raise ValueError(
                f"{weights[i].path} and {weights[j].path} are views of the same memory that overlap in part. Give one of "
                "them, or the tensor they are views of"
            )


def _shares_elements(one: AdaptedWeight, other: AdaptedWeight) -> bool:
    a, b = one.weight, other.weight
    size = a.element_size()
    if b.element_size() != size or (a.data_ptr() - b.data_ptr()) % size:
        return True
    base = min(a.data_ptr(), b.data_ptr())
    offsets = [(t.data_ptr() - base) // size for t in (a, b)]
    span = max(o + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1 for o, t in zip(offsets, (a, b)))
    touched = torch.zeros(span, dtype=torch.uint8)
    touched.as_strided(a.shape, a.stride(), offsets[0]).fill_(1)
    return bool(touched.as_strided(b.shape, b.stride(), offsets[1]).any())
