"""Work that is done whole: blocks change places, and steps update, or nothing has happened."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


@contextlib.contextmanager
def uninterrupted(*, whole: bool = False) -> Iterator[None]:
    """Let what runs within it end before Ctrl-C stops the program. Where it has another handler than Python's own, that
    decides.

    whole: However often it comes; else a second one stops at once.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        if not whole:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def exclusive(method: Method) -> Method:
    """Make a method whole, and alone among the exclusive ones of its object's threads, by its `use`."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.use.lock, uninterrupted(whole=True):
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]
