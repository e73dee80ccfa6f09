"""A run folder's files: config.yaml, results, metrics; each written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import CheckpointError
from ..checkpoint.lock import LOCK
from ..checkpoint.manifest import package_version, read_json
from .config import TrainConfig, from_yaml, to_dict
from .data.text import EMBEDDED
from .results import BLOCKWISE, read_rows

# Settings that don't decide the weights: places, evaluation, and how a run is watched.
FREE = (
    "out", "train_blocks", "data_folder", "resize",  # of data: their digests are compared
    "text", "device", "offload", "folder", "compile", "capture", "checkpoint_layers", "checkpoint_every", "baseline",
    "sampling_steps",
    "guidance", "sampler", "draws", "evaluated", "levels", "log_every", "log_folder", "loggers", "checkpoint_minutes",
)  # fmt: skip
# Settings that `dblocks resume` may change.
CHANGEABLE = ("lr", "steps", "warmup", "clip")
# Names of what a run writes.
OWN = (
    "config.yaml", "facts.json", "changes.jsonl", "metrics.jsonl", "summary.json", "results", "checkpoint", "waiting",
    "logs",
)  # fmt: skip


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return the config fields that determine the weights: excludes paths, device and evaluation settings."""
    values = to_dict(config) | config.resolved()
    return {
        name: value
        for name, value in values.items()
        if name not in (*FREE, *CHANGEABLE) and not name.startswith("tune_")
    }


def read_config(folder: Path) -> TrainConfig:
    """Return the config of a run folder, with `out` where it is now. Raises: CheckpointError if it holds no run."""
    path = folder / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{path} is missing: {folder} is not a run folder; start one with `dblocks train`")
    try:
        return dataclasses.replace(from_yaml(path.read_text()), out=folder)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return the facts that a run stored; None if it stored none. Raises: CheckpointError on a damaged file."""
    path = folder / "facts.json"
    facts: dict[str, Any] | None = read_json(path) if path.exists() else None
    return facts


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the config with its data's paths absolute, so that the run works from any folder."""
    changes: dict[str, Any] = {}
    for name in ("data_folder", "text"):
        value = getattr(config, name, None)
        if value is not None and value != EMBEDDED and Path(value).expanduser().exists():
            changes[name] = type(value)(Path(value).expanduser().resolve())
    return dataclasses.replace(config, **changes)


def write(path: Path, text: str) -> None:
    """Write a whole file or nothing: aside, synced, renamed. Raises: OSError, naming the file and what was kept."""
    kept = "the old file is kept" if path.exists() else "nothing was written"
    aside = path.with_name(path.name + ".tmp")
    with naming(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming(path: Path, kept: str) -> Iterator[None]:
    """Name the file in the OSError of a disk that is full or read-only, and what is left."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"can't write {path} ({error.strerror}); {kept}") from error


def clear(folder: Path) -> None:
    """Remove a run's files from its folder, and the folder if nothing else is in it."""
    for name in OWN:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for picture in folder.glob("*.png"):
        picture.unlink()
    for samples in folder.glob("samples*"):
        shutil.rmtree(samples)
    (folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def result_file(config: TrainConfig, name: str) -> Path:
    """Return the file of one training's result."""
    return config.out / "results" / f"{name}.json"


def trim_metrics(log: Path, step: int, finished: Iterable[str]) -> None:
    """Drop the metrics of steps that will be run again."""
    if not log.exists():
        return
    kept = [r for r in read_rows(log) if r["run"] in finished or (r["run"] == BLOCKWISE and r["step"] <= step)]
    write(log, "".join(json.dumps(row) + "\n" for row in kept))


def peak_memory(config: TrainConfig) -> dict[str, int]:
    """Return the most bytes by category in the run's metrics."""
    own = [row["bytes"] for row in read_rows(config.out / "metrics.jsonl") if row["run"] == BLOCKWISE]
    return max(own, key=lambda bytes_: sum(bytes_.values()), default={})


def new_folder(folder: Path) -> Path:
    """Return `folder`, or with -2, -3, ... added to its name the first that holds nothing yet."""
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
    raise AssertionError


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a figure was measured on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusionblocks": package_version(),
        "device": gpu or device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
