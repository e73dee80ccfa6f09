"""Results as tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ..offload.memory import readable
from .config import TrainConfig
from .results import BLOCKWISE, signed
from .tasks import task_of
from .tasks.base import Metric

console = Console()
LABELS = {  # of the numbers beside a task's own that are printed; results/*.json have all
    "standard_error": "standard error",
    "exact": "whole answers right %",
    "class_accuracy": "images of the class asked for %",
    "floor": "training images' distance",
    "unigram": "by the frequency of tokens alone",
    "first_bits": "after the first step",
    "mixture_bits": "mean of several draws",
}


def report(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Print a run's table."""
    if config.train_blocks is not None:
        blocks = ", ".join(map(str, config.train_blocks))
        print(f"trained blocks {blocks}; join them with the others by: dblocks merge {config.out} OTHERS --out NEW")
        return
    metric = task_of(config).metric
    title = f"{config.out}; test and val: {metric.label}"
    table = Table("training", "test", "val", "seconds", "memory", "plan", title=title)
    for name, result in summary["results"].items():
        memory = readable(sum(result["memory"].values()))
        planned = readable(sum(result["plan"].values())) if "plan" in result else "-"
        values = [f"{result[split][metric.key]:.4g}" for split in ("test", "val")]
        table.add_row(name, *values, f"{result['seconds']:.0f}", memory, planned)
    console.print(table)
    show(metric, summary["results"][BLOCKWISE]["test"])
    if pictures := [path.name for path in sorted(config.out.glob("*.png"))]:
        print(f"pictures in {config.out}: {', '.join(pictures)}")


def show(metric: Metric, result: dict[str, Any]) -> None:
    """Print an evaluation: its numbers, the trajectory, the information bound."""
    numbers = [f"{label} {result[key]:.4g}" for key, label in LABELS.items() if key in result]
    console.print(f"{metric.label} {result[metric.key]:.4g}", *numbers, sep="; ")
    if "trajectory" in result:
        steps = Table("step", "sigma", "block", metric.label, title="along the trajectory")
        for step in result["trajectory"]:
            steps.add_row(str(step["step"]), f"{step['sigma']:.4g}", str(step["block"]), f"{step[metric.key]:.2f}")
        console.print(steps)
    if "bound_bits" in result:
        regret = ", ".join(map(signed, result["regret_bits"]))
        known = "what a block loses of what those before it know; 0 or less: none"
        console.print(f"information bound {result['bound_bits']:.3f} bits; regret by block {regret} bits ({known})")
