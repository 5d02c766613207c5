"""Signals wait while weights move: an interrupt between a write and its note in the journal could not be undone."""

import signal
import threading

# the module signal's own functions look every handler up in an enum: ten times slower, twice a step
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

# those whose handlers, where a program sets any in Python, tend to raise
_WAIT = [
    int(getattr(signal, f"SIG{name}"))
    for name in ("INT", "TERM", "HUP", "ALRM", "USR1", "USR2")
    if hasattr(signal, f"SIG{name}")
]


class uninterrupted:  # a class, as a generator's context manager takes half as long again, twice a step
    """Python's signal handlers run after the block, also where it raises. Other threads than the main one get no signals."""

    def __enter__(self) -> None:
        self._handlers: dict[int, Callable[..., Any]] = {}
        self._waiting: list[tuple[int, FrameType | None]] = []
        if threading.get_ident() != threading.main_thread().ident:
            return
        self._handlers = {number: handler for number in _WAIT if callable(handler := getsignal(number))}
        try:
            for number in self._handlers:
                set_handler(number, self._receive)
        except BaseException:  # by a signal that still had its own handler
            self.__exit__()
            raise

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._waiting.append((number, frame))

    def __exit__(self, *exception: object) -> None:
        away = list(self._handlers.items())
        raised: BaseException | None = None
        try:
            while away:
                try:
                    while away:
                        number, handler = away[-1]
                        if getsignal(number) is not handler:
                            set_handler(number, handler)
                        away.pop()
                except BaseException as error:  # by a signal whose handler is back already
                    raised = error
            if raised is not None:
                raise raised
        finally:
            _each([partial(self._handlers[number], number, frame) for number, frame in self._waiting])


def _each(calls: list[Callable[[], Any]]) -> None:
    """Each of them, whichever raises."""
    if calls:
        try:
            calls[0]()
        finally:
            _each(calls[1:])
