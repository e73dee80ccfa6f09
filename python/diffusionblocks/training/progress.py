"""Progress of a training and of what comes after it: by rich in a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..offload.memory import readable

if TYPE_CHECKING:
    from .trainer import StepOutput, Trainer

EVERY, STILL = 10.0, 30.0  # seconds between lines of steps, and of what has none
BAR, ROOM = 16, 80  # columns of the bar, where there are more than a usual terminal's


class Progress:
    """A trainer's callback and a context manager: steps done of `total`, and the last logged row."""

    def __init__(self, total: int, name: str = "training"):
        self.total, self.name, self.detail = total, name, ""
        self.began, self.first, self.shown, self.last = time.monotonic(), -1, 0.0, 0.0
        self.lined = -1
        self.bar: Any = None

    def __enter__(self) -> Progress:
        with contextlib.suppress(ImportError):
            if _in_terminal():
                from rich import console, progress

                terminal = console.Console(stderr=True)
                bar = [progress.BarColumn(min(BAR, terminal.width - ROOM))] if terminal.width > ROOM + 4 else []
                self.bar = progress.Progress(
                    progress.TextColumn("{task.description}"),
                    *bar,
                    progress.TextColumn("{task.completed}/{task.total} {task.fields[detail]} {task.fields[left]}"),
                    console=terminal,
                )
                self.bar.start()
                self.task = self.bar.add_task(self.name, total=self.total, detail="", left="")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        elif self.first >= 0 and self.lined < self.done:
            self._line()

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self.detail = f"block {row['block']} loss {row['loss']:.3f} {readable(row['allocated'])}"

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        self.done, now = trainer.steps_done, time.monotonic()
        if self.first < 0:
            self.first = self.done - 1
        elif (
            self.done == self.first + 2
        ):  # the first step also loads, compiles and measures: it tells nothing of others
            self.began, self.first = self.last, self.first + 1
        self.last = now
        if self.bar:
            left = f"{_clock((self.total - self.done) / self._rate(now))} left"
            self.bar.update(self.task, completed=self.done, detail=self.detail, left=left)
        elif now - self.shown > EVERY:
            self._line()

    def _rate(self, now: float) -> float:
        return max((self.done - self.first) / max(now - self.began, 1e-9), 1e-9)

    def _line(self) -> None:
        self.shown, self.lined = time.monotonic(), self.done
        rate = self._rate(self.shown)
        speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s a step"
        left = _clock((self.total - self.done) / rate)
        print(f"{self.name} {self.done}/{self.total} {self.detail} {speed}, {left} left", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Show that something is at work which has no steps, e.g. "evaluating on test": a spinner with the time in a
    terminal, else a line at its beginning, one at its end, and one every half minute between them."""
    began = time.monotonic()
    with contextlib.ExitStack() as shown:
        spinning = False
        with contextlib.suppress(ImportError):
            if _in_terminal():
                from rich import console, progress

                terminal = console.Console(stderr=True)
                columns = (
                    progress.SpinnerColumn(),
                    progress.TextColumn("{task.description}"),
                    progress.TimeElapsedColumn(),
                )
                shown.enter_context(progress.Progress(*columns, console=terminal)).add_task(name, total=None)
                spinning = True
        if not spinning:
            print(f"{name} ...", file=sys.stderr, flush=True)
            shown.callback(_repeated(name, began))
        yield
    if not spinning:
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def _repeated(name: str, began: float) -> Callable[[], None]:
    """Print now and then how long a stage has been at work; return what ends that."""
    ended = threading.Event()

    def lines() -> None:
        while not ended.wait(STILL):
            print(f"{name}: {_clock(time.monotonic() - began)} so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join()

    return end


def _in_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _clock(seconds: float) -> str:
    """Return a duration: "70 s", "3:20", "1:02:03"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
