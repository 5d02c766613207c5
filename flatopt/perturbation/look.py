"""One look at a group's weights, once a step."""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..adapters.checks import check, check_lasting
from ..adapters.forwards import refuse_unrounded
from ..adapters.quantized import data_ptr, format_of
from ..core.arguments import NOISES
from ..core.gathering import Gathering, is_split_as
from ..core.sharding import first_row, is_sharded, local, local_update
from ..core.weight import AdaptedWeight, WeightUpdate, WeightView, in_memory_order
from ..ops import Plan, plan
from .forward import ForwardPlan


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
        self._plain = True  # no parameter is a DTensor
        self._weights: list[AdaptedWeight] = []
        self._memory: set[int] = set()  # of all weights, if none was left out
        self._settings: tuple[Any, ...] = ()
        self._known: list[WeightView] = []  # of every weight, tied ones too
        self._seen: list[list[Any]] = []  # column by column: identity, memory, kind, version
        self._quantised: list[bool] = []
        self._moved: dict[int, bool] = {}  # of weights that lie in other memory now: with the values that were perturbed?
        self._batches: list[tuple[Adapter, list[WeightView], list[AdaptedWeight], list[Any]]] = []  # the last: places
        self._keys: list[Any] = []  # of each batch's updates
        self._reordered: set[WeightView] = set()  # whose update is another than the adapter told
        self._split: dict[WeightView, WeightUpdate] = {}  # sharded updates, as told
        self._gathering: Gathering | None = None  # of their A's; None: not made since one was told

    def at(self, weights: "list[AdaptedWeight]", first: int, noise: str, restore: str, taken: "set[int]") -> None:
        """Look at ``weights``, numbered from ``first``, and make ``plans``; ``taken``: memory that an earlier group has."""
        settings = (first, noise, restore)
        if self._settings != settings or self._weights != list(weights):  # each equals itself alone
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
        self._plain = set(map(type, parameters)) <= {nn.Parameter}
        tensors = [p.detach() for p in (parameters if self._plain else map(local, parameters))]
        # in columns: a list a property costs a third of a tuple a weight
        seen: list[Any] = [
            identities,
            [t.data_ptr() for t in tensors],
            [t.dtype for t in tensors],
            [t.shape for t in tensors],
            [t.stride() for t in tensors],
            [p.requires_grad for p in parameters],
            self._versions(parameters, tensors),
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
            self._seen, self._keys, self.plans, self._memory = seen, [], [], set()
        self.parameters, self.tensors = parameters, tensors
        for view, parameter, tensor, quantised in zip(self._known, parameters, tensors, self._quantised):
            view.parameter, view.tensor = parameter, None if quantised else tensor
        if self._memory and taken.isdisjoint(self._memory):
            taken.update(self._memory)
        else:
            self._leave_out(taken)
        self._look_at_updates()
        if not self.plans:
            self._plan(noise, restore)

    def _leave_out(self, taken: "set[int]") -> None:
        """Of the weights those in memory that is ``taken``, by an earlier group or a weight before them."""
        views, self._memory = [], set()
        for view, there, parameter in zip(self._known, self._seen[1], self.parameters):
            there = there or data_ptr(parameter)
            if there not in taken:
                taken.add(there)
                views.append(view)
        if views != self.views:
            self._by_adapter(views)
        if len(views) == len(self._known) and 0 not in self._seen[1]:
            self._memory = set(self._seen[1])

    def _by_adapter(self, views: "list[WeightView]") -> None:
        self.views, self._keys, self.plans = views, [], []
        self._reordered, self._split, self._gathering = set(), {}, None
        batches: dict[int, list[WeightView]] = {}
        for view in views:
            batches.setdefault(id(view.weight.adapter), []).append(view)
        self._batches = [
            (batch[0].weight.adapter, batch, [v.weight for v in batch], [None] * len(batch)) for batch in batches.values()
        ]

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
        """Ask for the updates that are not the same tensors as before, and gather what is sharded of all."""
        self._keys = self._keys or [None] * len(self._batches)
        for number, (adapter, views, weights, places) in enumerate(self._batches):
            keys, known = adapter.update_key(weights, places), self._keys[number]
            if keys is None or keys != known:
                old = [None] * len(views) if keys is None or known is None else known
                news = [view for view, now, then in zip(views, keys or old, old) if then is None or now != then]
                self._ask(adapter, news)
                self._keys[number] = keys and [self._kept(view, key) for view, key in zip(views, keys)]
        if self._gathering is None:
            split = [(view, self._split[view]) for view in self.views if view in self._split]  # in the order of all ranks
            gathering = Gathering(A for _, update in split for _, A, _ in update.factors)
            for view, update in split:
                view.update = gathering.of(update)
            self._gathering = gathering
        self._gathering.gather()

    def follow_adapters(self) -> None:
        """Where weights are rounded, to the updates as they are: between a closure's evaluations they move."""
        if self.tensors and self._settings[1] not in NOISES:
            self._look_at_updates()

    def _kept(self, view: WeightView, key: Any) -> Any:
        """The key of an update that is kept; of one that holds copies of this step, gathered or reordered, no key."""
        assert view.parameter is not None
        gathered = is_sharded(view.parameter) and view not in self._split
        return object() if gathered or view in self._reordered else key

    def _ask(self, adapter: Adapter, views: "list[WeightView]") -> None:
        noise = self._settings[1]
        for view in views:
            if noise not in NOISES:
                refuse_unrounded(view.weight, noise)  # another adapter may be active now
            if adapter.is_merged(view.weight.layer):
                check(view.weight, in_forward=True)
        for view, update in zip(views, adapter.updates([view.weight for view in views])):
            assert view.parameter is not None
            self._gathering = None
            if is_split_as(update, view.parameter, view.weight.layout):
                self._split[view] = update
                continue
            self._split.pop(view, None)
            mine = local_update(update, view.parameter)
            view.update = mine if view.tensor is None else in_memory_order(mine, view.tensor, view.weight.layout)
            (self._reordered.add if view.update is not mine else self._reordered.discard)(view)

    def _addresses(self) -> "list[int]":
        return [p.data_ptr() for p in (self.parameters if self._plain else map(local, self.parameters))]

    def _versions(self, parameters: "list[Tensor]", tensors: "list[Tensor]") -> "list[Any]":
        """What a write moves: the counter of a parameter, which its tensor shares. A DTensor's own operations move that of
        the DTensor alone, others that of its local tensor."""
        if self._plain:
            return [t._version for t in tensors]
        return [t._version if type(p) is nn.Parameter else (t._version, p._version) for t, p in zip(tensors, parameters)]

    def note_versions(self) -> None:
        """What flatopt itself wrote is no change."""
        if self.tensors:
            self._seen[-1] = self._versions(self.parameters, self.tensors)

    def forget(self) -> None:
        """A weight was written to under the noise: what was seen of it holds no more, whatever its version says."""
        self._seen, self._keys, self.plans = [], [], []

    def written_to(self) -> "list[WeightView]":
        now = self._versions(self.parameters, self.tensors)
        if not self.tensors or now == self._seen[-1]:
            return []
        moved = {id(view) for view, version, known in zip(self._known, now, self._seen[-1]) if version != known}
        return [view for view in self.views if id(view) in moved and not view.weight.version_moves]

    def replaced(self) -> "list[WeightView]":
        """Weights in whose place something else stands: another parameter, or other values as its data.

        None where each forward makes them anew. What only lies in other memory (``model.to``) is noted, see :meth:`moved`.
        """
        if not self.tensors:
            return []
        parameters = standing(self._weights)
        if all(map(operator.is_, parameters, self.parameters)) and self._addresses() == self._seen[1]:
            return []
        gone = set()
        for view, here, there in zip(self._known, parameters, self.parameters):
            if view.tensor is None:
                continue
            fake = type(here).__name__ in ("FakeTensor", "FunctionalTensor")  # torch.export swaps these in while it traces
            now = None if here is None or fake else local(here).detach()
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
                    now = local(parameter).detach()
                    if now.shape == view.tensor.shape:
                        now.copy_(view.tensor)
            # what a forward made anew lies elsewhere until the next one: the next move has to follow there, too
            self._moved = {id(v): True for v in self._known if v.weight.rebuilt and self._moved.get(id(v))}

    def release(self) -> None:
        for each in self.plans:
            each.release()
        self.parameters, self.tensors, self._moved = [], [], {}
        for view in self._known:
            view.parameter = view.tensor = view.rows = None


def parameters_of(weights: "list[AdaptedWeight]") -> "list[Tensor]":
    # a plain lookup for all, as properties cost as much as the rest
    found: list[Any] = [weight.owner._parameters.get(weight.name) for weight in weights]
    for i, parameter in enumerate(found):
        if parameter is None:
            check_lasting(weights[i])  # a parametrization has taken its place, maybe
            found[i] = weights[i].parameter
    return found


def standing(weights: "list[AdaptedWeight]") -> "list[Tensor | None]":
    """What stands in the weights' places, found without running anybody's code: a parametrization would compute."""
    found: list[Tensor | None] = [weight.owner._parameters.get(weight.name) for weight in weights]
    for i, parameter in enumerate(found):
        if parameter is None:
            own, name = weights[i].owner.__dict__, weights[i].name
            found[i] = own.get(name, own["_buffers"].get(name))
    return found


def _same_values(mine: Tensor, other: Tensor) -> bool:
    """Whether ``other`` is ``mine`` after a ``model.to(...)``."""
    if other.device.type == "meta":
        return True  # all values are gone, and were meant to
    return mine.shape == other.shape and torch.allclose(mine.to(other), other, rtol=0, atol=0, equal_nan=True)
