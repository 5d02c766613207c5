"""Two passes over one input in a step, the first without gradients: a cache of gradients must see the same W in both."""

from typing import Any

from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .stack import backwards_so_far, in_transform
from .tensors import storage_of, tensors_in


class FirstPass:
    """What a root read without gradients before a step, in train mode: the first pass of a cache of gradients, maybe."""

    def __init__(self) -> None:
        self.read: dict[int, StorageWeakRef] = {}  # nobody's memory is kept for this
        self._clock = 0

    def note(self, inputs: Any) -> None:
        if len(self.read) < 256 and not in_transform():
            self._clock = backwards_so_far()
            self.read.update((each.cdata, each) for each in _storages(inputs))

    def refuse_second(self, module: nn.Module, inputs: Any) -> None:
        """Raise if the same was read without gradients before, and a backward ran in between: it used what clean W gave."""
        again = any(each.cdata in self.read and not self.read[each.cdata].expired() for each in _storages(inputs))
        since = backwards_so_far() - self._clock
        self.read = {}
        if again and since > 1:
            raise RuntimeError(
                f"{type(module).__name__} read the same input without gradients, a backward ran on the result, and now "
                "it is read with gradients at perturbed weights: a cache of gradients (GradCache), whose two passes "
                "must see the same W. Put both passes inside `with optimizer.perturbed():`, or, if the first was meant "
                "to be clean, run it in eval mode"
            )


def _storages(inputs: Any) -> "list[StorageWeakRef]":
    return [StorageWeakRef(t.untyped_storage()) for t in tensors_in(inputs) if storage_of(t)]
