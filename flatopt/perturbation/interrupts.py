"""Signals wait while weights move: an interrupt between a write and its note in the journal could not be undone."""

import signal
import threading

# the module signal's own functions look every handler up in an enum: ten times slower, twice a step
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

# those whose handlers, where a program sets any in Python, tend to raise
_WAIT = [
    int(getattr(signal, f"SIG{name}"))
    for name in ("INT", "TERM", "HUP", "ALRM", "USR1", "USR2")
    if hasattr(signal, f"SIG{name}")
]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Python's signal handlers run after the block, also where it raises. Other threads than the main one get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in _WAIT if callable(handler := getsignal(number))}
    waiting: list[tuple[int, FrameType | None]] = []
    waits = True

    def receive(number: int, frame: FrameType | None) -> None:
        if waits:
            waiting.append((number, frame))
        else:  # not taken off yet
            handlers[number](number, frame)

    try:
        for number in handlers:
            set_handler(number, receive)
        yield
    finally:
        waits = False
        put_back = [partial(set_handler, number, handler) for number, handler in handlers.items()]
        _run([*put_back, *(partial(receive, number, frame) for number, frame in waiting)])


def _run(calls: list[Callable[[], Any]]) -> None:
    """Each of them, whichever raises."""
    if calls:
        try:
            calls[0]()
        finally:
            _run(calls[1:])
