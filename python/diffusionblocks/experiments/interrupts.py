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
    """A signal stopped the training after a step. saved: whether a checkpoint was written."""

    def __init__(self, number: int, saved: bool):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.saved = number, saved


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

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(2, b"stopping after this step (again: at once)\n")  # print isn't safe in a handler
