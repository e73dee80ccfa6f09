"""Progress bars of a run: block, its noise, loss, samples per second, memory."""

from __future__ import annotations

from typing import Any

from rich import progress as bars

from ..training.memory import readable
from .config import TrainConfig


class Progress:
    """A bar for each training of a run; a context manager. `show` takes a row of metrics (see docs/architecture.md)."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.tasks: dict[str, bars.TaskID] = {}
        self.bars = bars.Progress(
            bars.TextColumn("{task.description:>15}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[detail]}"),
            bars.TimeRemainingColumn(),
        )

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Bring the bar of row["run"] up to date."""
        run, step = row["run"], row["step"]
        if run not in self.tasks:
            total = self.config.total_steps if run == "block-wise" else self.config.steps
            self.tasks[run] = self.bars.add_task(run, total=total, detail="")
        rate = step * self.config.batch_size * self.config.accumulate / max(row["seconds"], 1e-9)
        place = f"block {row['block']} noise {row['sigma_low']:.2g}-{row['sigma_high']:.2g} " if "block" in row else ""
        memory = f"{readable(row['allocated'])} allocated, {readable(row['reserved'])} reserved"
        detail = f"{place}loss {row['loss']:.3f}  {rate:.0f} samples/s  {memory}"
        self.bars.update(self.tasks[run], completed=step, detail=detail)
