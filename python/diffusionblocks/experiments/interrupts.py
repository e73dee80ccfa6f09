"""Ctrl-C and SIGTERM: the first asks a training to stop after its step, a second one stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal stopped a run between two steps or evaluations. kept: What of its work is kept, in words."""

    def __init__(self, number: int, kept: str):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.kept = number, kept


class Interrupts:
    """Whether a signal has come. number: the signal's, None until then."""

    number: int | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[Interrupts]:
        """Within it, a first signal is remembered, and a second one acts as it would without."""
        if threading.current_thread() is not threading.main_thread():  # signals can't be handled there
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self, kept: str) -> None:
        """Raise Stopped if a signal has come. kept: What of the run's work is kept."""
        if self.number is not None:
            raise Stopped(self.number, kept)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(2, b"stopping after this step or evaluation (again: at once)\n")  # print isn't safe in a handler
