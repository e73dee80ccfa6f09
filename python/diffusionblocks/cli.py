"""The `dblocks` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from . import exporting, jobs, plots
from .checkpoint import MANIFEST, CheckpointError
from .config import TrainConfig
from .data import ImageData, load
from .memory import CATEGORIES, parse_bytes, readable
from .planning import plans, smallest_fit
from .prediction import predict as predict_images
from .runs import RUNS
from .training import NonFiniteLoss, Session

if TYPE_CHECKING:
    Run = TrainConfig
else:
    Run = tyro.extras.subcommand_type_from_defaults(
        {name: config for name, (_, config) in RUNS.items()},
        {name: text for name, (text, _) in RUNS.items()},
        prefix_names=False,
    )
FLAGS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
Folder = Annotated[Path, tyro.conf.Positional]
console = Console()


def train(config: Annotated[Run, tyro.conf.arg(name="")]) -> None:
    """Train block by block, and the baselines beside it; results and pictures go into the run folder.

    Args:
        config: the run.
    """
    report(jobs.start(config))


def resume(folder: Folder) -> None:
    """Go on with a run from its last checkpoint, bit for bit.

    Args:
        folder: the run folder.
    """
    report(jobs.resume(folder))


def evaluate(folder: Folder, split: Literal["test", "val"] = "test", steps: int | None = None) -> None:
    """Accuracy along the walk and the information bound of a run's last checkpoint.

    Args:
        folder: the run folder.
        split: which images.
        steps: steps of the walk; the run's own by default.
    """
    session, data = open_run(folder)
    result = jobs.evaluate(session, data, getattr(data, split), steps=steps)
    walk = Table("step", "sigma", "block", "accuracy %", title=f"{split}, {result['images']} images")
    for step in result["walk"]:
        walk.add_row(str(step["step"]), f"{step['sigma']:.4g}", str(step["block"]), f"{step['accuracy']:.2f}")
    console.print(walk)
    regret = ", ".join(f"{bits:+.3f}" for bits in result["regret_bits"])
    console.print(f"information bound {result['bound_bits']:.3f} bits; regret by block {regret}")


def predict(folder: Folder, images: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Labels of image files, one JSON object a line: file, label, probability.

    Args:
        folder: the run folder.
        images: files of the size the model was trained on.
    """
    for line in predict_images(*open_run(folder), images):
        print(json.dumps(line))


def plot(folder: Folder) -> None:
    """Draw a finished run's pictures again.

    Args:
        folder: the run folder.
    """
    for path in plots.draw(folder):
        print(path)


def export(folder: Folder, to: Path) -> None:
    """Write a run's averaged weights as one safetensors file; diffusionblocks.load_model reads it back.

    Args:
        folder: the run folder.
        to: the file to write, ending in .safetensors.
    """
    exporting.export(open_run(folder)[0], to)
    print(to)


def show_plan(config: Annotated[Run, tyro.conf.arg(name="")], memory: str | None = None) -> None:
    """The bytes a run will take on its device, by category, for every number of blocks.

    Args:
        config: the run.
        memory: also name the smallest number of blocks that fits, e.g. 24GiB.
    """
    rows = plans(config, jobs.pick_device(config.device))
    table = Table(
        "B", *CATEGORIES, "total", title=f"{config.data}, batch {config.batch_size}, shared={config.shared!r}"
    )
    for blocks, usage in rows.items():
        table.add_row(str(blocks), *(readable(usage.by_category[c]) for c in CATEGORIES), readable(usage.total))
    console.print(table)
    if memory:
        fit = smallest_fit(rows, parse_bytes(memory))
        least = min(usage.total for usage in rows.values())
        print(f"B = {fit} fits in {memory}" if fit else f"nothing fits in {memory}: the least is {readable(least)}")
        if not fit:
            sys.exit(1)


def open_run(folder: Path) -> tuple[Session, ImageData]:
    """A run's last checkpoint and its data."""
    config = jobs.read_config(folder)
    if not (folder / "checkpoint" / MANIFEST).exists():
        raise CheckpointError(f"{folder} has no checkpoint yet; train it on with `dblocks resume {folder}`")
    session = jobs.open_session(config, jobs.pick_device(config.device))
    return session, load(config.data, folder=config.folder, seed=config.seed)


def report(summary: dict[str, Any]) -> None:
    """Print a run's table."""
    table = Table(
        "training", "test accuracy %", "val %", "seconds", "memory", "plan", title=str(summary["config"]["out"])
    )
    for name, result in summary["results"].items():
        memory = readable(sum(result["memory"].values()))
        planned = readable(sum(result["plan"].values())) if "plan" in result else "-"
        accuracy = [f"{result[split]['accuracy']:.2f}" for split in ("test", "val")]
        table.add_row(name, *accuracy, f"{result['seconds']:.0f}", memory, planned)
    console.print(table)
    test = summary["results"]["block-wise"]["test"]
    console.print("walk: " + " -> ".join(f"{step['accuracy']:.1f} (block {step['block']})" for step in test["walk"]))
    regret = ", ".join(f"{bits:+.3f}" for bits in test["regret_bits"])
    console.print(f"information bound {test['bound_bits']:.3f} bits; regret by block {regret}")


def main() -> None:
    """Parse the command line and run the command; an error a user can mend is one line and exit code 2."""
    commands: dict[str, Callable[..., Any]] = {
        "train": train,
        "resume": resume,
        "eval": evaluate,
        "predict": predict,
        "plot": plot,
        "export": export,
        "plan": show_plan,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="dblocks", description=__doc__, config=FLAGS)
    except (ValueError, TypeError, OSError, ImportError, NonFiniteLoss) as error:
        print(f"dblocks: {error}", file=sys.stderr)
        sys.exit(2)
