"""A trained model as a folder of its own: what save_pretrained writes, with the run's config and facts inside."""

from __future__ import annotations

from pathlib import Path

from ..blocks import DiffusionBlocks
from ..card import write_card
from ..checkpoint.files import CheckpointError
from ..checkpoint.shards import INDEX, read_index
from ..convert.pretrained import load
from ..noise.partition import Partition
from ..training.devices import pick_device
from .config import from_dict, to_dict
from .tasks import Task, task_of


def export(task: Task, model: DiffusionBlocks, to: Path) -> None:
    """Write a model's folder, from which `open_exported` takes it and its task; no data are needed.

    Raises: CheckpointError or OSError if the folder can't be used, ValueError if it is a file or holds a run.
    """
    if to.exists() and not to.is_dir():
        raise ValueError(f"{to} is a file: --out needs a folder, a new one or an exported model's to replace")
    if (to / "config.yaml").exists():  # there it would be the run that `dblocks eval` reads, not the model
        raise ValueError(f"{to} already holds a run: give another --out")
    run = {"config": to_dict(task.config) | task.config.resolved(), "facts": task.facts}
    model.save_pretrained(to, extra={"run": run})
    write_card(model, to, run=True)


def is_exported(folder: Path) -> bool:
    """Return whether a folder holds a model, and no run, which counts where both are."""
    return (folder / INDEX).exists() and not (folder / "config.yaml").exists()


def open_exported(folder: Path) -> tuple[Task, DiffusionBlocks]:
    """Return the task and the model that `export` wrote, in evaluation mode, on the device of its config.

    Raises: CheckpointError if the folder holds no such model, or a damaged one.
    """
    config, _ = read_index(folder)
    run = config.get("extra", {}).get("run")
    if run is None:
        raise CheckpointError(f"{folder} holds no model of a run: `dblocks export RUN --out FOLDER` writes one")
    task = task_of(from_dict(run["config"]), run["facts"])
    model = load(folder, task.model(Partition.from_dict(config["facts"]["partition"])))
    return task, model.to(pick_device(task.config.device)).eval()
