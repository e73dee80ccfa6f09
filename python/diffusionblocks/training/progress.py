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
        self.began, self.shown, self.last = time.monotonic(), 0.0, 0.0
        self.done, self.trained, self.lined, self.share = 0, 0, 0, 1.0
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
        elif self.lined < self.done:
            self._line()

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        block = f"block {row['block']} " if len(trainer.model.blocks) > 1 else ""
        self.detail = f"{block}loss {row['loss']:.3f} {readable(row['allocated'])}"

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        self.done, now = trainer.steps_done, time.monotonic()
        if output.block in trainer.own:  # the others' steps pass at once
            self.trained, self.share = self.trained + 1, len(trainer.own) / len(trainer.model.blocks)
            if self.trained == 2:  # the first also loads, compiles and measures: it tells nothing of others
                self.began = self.last
            self.last = now
        if self.bar:
            self.bar.update(self.task, completed=self.done, detail=self.detail, left=self._left())
        elif now - self.shown > EVERY:
            self._line()

    def _seconds(self) -> float:
        """Return the seconds of a step."""
        return max(self.last - self.began, 1e-9) / max(1, self.trained - 1)

    def _left(self) -> str:
        """Return the time left, "" where no step has told how long one takes."""
        seconds = (self.total - self.done) * self.share * self._seconds()
        return f"{_clock(seconds)} left" if self.trained else ""

    def _line(self) -> None:
        self.shown, self.lined = time.monotonic(), self.done
        seconds, line = self._seconds(), f"{self.name} {self.done}/{self.total} {self.detail}"
        if self.trained:
            speed = f"{1 / seconds:.1f} steps/s" if seconds <= 1 else f"{seconds:.1f} s a step"
            line = f"{line} {speed}, {self._left()}"
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Show that something is at work which has no steps, e.g. "evaluating on test": a spinner with the time in a
    terminal, else a line at its beginning and one every half minute; then a line of what it took."""
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
                spinner = progress.Progress(*columns, console=terminal, transient=True)
                shown.enter_context(spinner).add_task(name, total=None)
                spinning = True
        if not spinning:
            print(f"{name} ...", file=sys.stderr, flush=True)
            shown.callback(_repeated(name, began))
        yield
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
