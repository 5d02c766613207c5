"""Steps that no hook sees: the trained parameters move while one step's noise stands."""

from torch import Tensor

from ..core.warn import warn_user


class UnseenSteps:
    """Watches one trained parameter from the opening of a step on, at each training forward in it."""

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._version = self._changes = 0
        self._told = False

    def watch(self, parameter: "Tensor | None") -> None:
        """A step opens, in which ``parameter`` should stay as it is; None: it may move."""
        self._parameter, self._changes = parameter, 0
        self._version = 0 if parameter is None else parameter._version

    def look(self) -> None:
        """Say so, once, when the parameter has moved three times: an average swapped in and out moves it twice."""
        if self._parameter is None or self._parameter._version == self._version:
            return
        self._version, self._changes = self._parameter._version, self._changes + 1
        if self._changes == 3 and not self._told:
            self._told = True
            warn_user(
                "the parameters that are trained move from forward to forward, but no step of the optimizer that "
                "FlatPerturbOptimizer wraps is seen: the base weights stay perturbed by the same noise, and the schedule "
                "stands still. Wrap the optimizer that is stepped; where the update is written by hand, call "
                "optimizer.restore() after it and count optimizer.step_count up"
            )
