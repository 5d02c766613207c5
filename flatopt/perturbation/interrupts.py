"""Signals wait while weights move: an interrupt between a write and its note in the journal could not be undone."""

import signal
import threading

# the module signal's own functions look every handler up in an enum: ten times slower, twice a step
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable
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
        self._waits = False
        if threading.get_ident() != threading.main_thread().ident:
            return
        self._handlers = {number: handler for number in _WAIT if callable(handler := getsignal(number))}
        try:
            for number in self._handlers:
                set_handler(number, self._receive)
            self._waits = True
        except BaseException:  # by a signal, whose own handler has run
            self.__exit__()
            raise

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._waits:
            self._waiting.append((number, frame))
        else:  # not taken off yet, or left where signals came one upon another
            self._put_back(number)
            self._handlers[number](number, frame)

    def _put_back(self, number: int) -> None:
        if getsignal(number) == self._receive:  # nobody has set another meanwhile
            set_handler(number, self._handlers[number])

    def __exit__(self, *exception: object) -> None:
        away = list(self._handlers)
        raised: BaseException | None = None
        try:
            while away or self._waiting:
                try:
                    while away:
                        self._put_back(away[-1])
                        away.pop()
                    self._waits = False
                    while self._waiting:
                        number, frame = self._waiting.pop(0)
                        self._handlers[number](number, frame)
                except BaseException as error:  # by one of the handlers; the others' signals are to reach them all the same
                    if raised is not None:
                        error.__context__ = raised
                    raised = error
        finally:
            self._waits = False
        if raised is not None:
            raise raised
