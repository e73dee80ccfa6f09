"""A progress bar of a training: by rich in a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from ..offload.memory import readable

if TYPE_CHECKING:
    from .trainer import StepOutput, Trainer

EVERY = 10.0  # seconds between lines


class Progress:
    """A trainer's callback and a context manager: steps done of `total`, and the last logged row."""

    def __init__(self, total: int, name: str = "training"):
        self.total, self.name, self.detail = total, name, ""
        self.began, self.first, self.shown = time.monotonic(), -1, 0.0
        self.bar: Any = None

    def __enter__(self) -> Progress:
        with contextlib.suppress(ImportError):
            if sys.stderr.isatty():
                from rich import console, progress

                self.bar = progress.Progress(
                    progress.TextColumn("{task.description}"),
                    progress.BarColumn(bar_width=16),
                    progress.MofNCompleteColumn(),
                    progress.TextColumn("{task.fields[detail]}"),
                    progress.TimeRemainingColumn(compact=True),
                    console=console.Console(stderr=True),
                )
                self.bar.start()
                self.task = self.bar.add_task(self.name, total=self.total, detail="")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        elif self.first >= 0:
            self._line()

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self.detail = f"block {row['block']} loss {row['loss']:.3f} {readable(row['allocated'])}"

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        self.done = trainer.steps_done
        self.first = self.done - 1 if self.first < 0 else self.first
        if self.bar:
            self.bar.update(self.task, completed=self.done, detail=self.detail)
        elif time.monotonic() - self.shown > EVERY:
            self._line()

    def _line(self) -> None:
        self.shown = time.monotonic()
        rate = (self.done - self.first) / max(self.shown - self.began, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        print(
            f"{self.name} {self.done}/{self.total} {self.detail} {rate:.1f} steps/s, {left:.0f} s left",
            file=sys.stderr, flush=True,
        )  # fmt: skip
