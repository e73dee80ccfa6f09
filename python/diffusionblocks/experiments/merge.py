"""Run folders that each trained some of the blocks, as one run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import files
from ..checkpoint.files import CheckpointError
from ..training.merge import merge
from .config import TrainConfig, to_yaml
from .run_folder import identity, read_config, read_facts, write


def merge_runs(folders: Sequence[Path], out: Path) -> bool:
    """Join runs, whose result `commands.resume` goes on with, or a Trainer's checkpoints; return whether it were runs.

    Raises: CheckpointError unless the folders are of one run and have all its blocks once, or if `out` holds something.
    """
    if folders and all((folder / files.MANIFEST).exists() for folder in folders):
        merge(folders, out)
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} holds something already: give a new folder")
    config = _check_alike(folders)
    states = [files.read_state(folder / "checkpoint").state for folder in folders]
    extra = {"run": identity(config), "seconds": sum(state["extra"]["seconds"] for state in states)}
    merge([folder / "checkpoint" for folder in folders], out / "checkpoint", extra=extra)
    rows = [line for folder in folders for line in _lines(folder / "metrics.jsonl")]
    write(out / "facts.json", json.dumps(read_facts(folders[0]), indent=1))
    write(out / "metrics.jsonl", "".join(sorted(rows, key=lambda line: json.loads(line)["step"])))
    if changes := _lines(folders[0] / "changes.jsonl"):
        write(out / "changes.jsonl", "".join(changes))
    write(out / "config.yaml", to_yaml(dataclasses.replace(config, out=out)))  # the last: now it is a run
    return True


def _check_alike(folders: Sequence[Path]) -> TrainConfig:
    """Return the config that runs have in common, of all blocks."""
    if not folders:
        raise CheckpointError("no folders to merge: give those of the runs")
    first, *others = folders
    config = read_config(first)
    for folder in others:
        one, other = identity(config), identity(read_config(folder))
        if names := [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]:
            raise CheckpointError(
                f"{first} and {folder} are of different runs, by {', '.join(sorted(names))} in their config.yaml: "
                "train all blocks with one config"
            )
        if read_facts(first) != read_facts(folder):
            raise CheckpointError(f"{first} and {folder} were trained on other data: compare their facts.json")
        if _lines(first / "changes.jsonl") != _lines(folder / "changes.jsonl"):
            raise CheckpointError(
                f"{first} and {folder} were resumed with other settings: compare their changes.jsonl, and train the "
                "blocks of one of them anew"
            )
    return dataclasses.replace(config, train_blocks=None)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []
