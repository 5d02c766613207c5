"""The low-rank layers of other libraries than PEFT, by the name of their class: none of them has to be installed."""

from collections.abc import Callable
from typing import Any

# class -> (base, delta, layout, merged) as in ``custom.LowRank``
LIBRARIES: dict[str, tuple[Callable[[Any], Any], ...]] = {}
