"""Signals wait while weights move: an interrupt between a write and its note in the journal could not be undone."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# those whose handlers, where a program sets any in Python, tend to raise
_WAIT = [
    getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "ALRM", "USR1", "USR2") if hasattr(signal, f"SIG{name}")
]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Python's signal handlers run after the block, also where it raises. Other threads than the main one get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _WAIT}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    waiting: list[tuple[int, FrameType | None]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda *received: waiting.append(received))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting:
            handlers[signal.Signals(number)](number, frame)  # type: ignore[operator,misc]
