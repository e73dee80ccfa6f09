"""A training session on disk and back: which tensors and numbers make it bit-exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import files as checkpoint
from ..checkpoint.files import CheckpointError, Manifest
from ..noise import density
from ..noise.partition import Partition
from ..training.offload import Residency
from ..training.optimizer import PartOptimizer
from .config import TrainConfig, to_dict
from .session import Session

PLACES = ("out", "folder", "device", "store", "compile", "checkpoint_every", "baseline")
READING = ("walk_steps", "guidance", "sampler", "draws", "evaluated", "levels")
FREE = (*PLACES, *READING)


def save(session: Session, folder: Path, *, seconds: float) -> None:
    """Write the parts that changed since the last save, one at a time, and commit. Raises: NonFiniteLoss, first."""
    session.check()
    parts: dict[str, Any] = {part: lambda part=part: session.residency.tensors(part) for part in session.changed}
    if session.meter:
        parts["noise"] = {"sums": session.meter.sums}
    state = {
        "step": session.step,
        "seconds": seconds,
        "config": identity(session.config),
        "optimizer_steps": {part: counted(optimizer) for part, optimizer in session.optimizers.items()},
        "partition": partition_to_dict(session.model.partition),
    }
    checkpoint.save(folder, parts, state, keep=set(session.residency.parts) - session.changed)
    session.changed.clear()


def restore(session: Session, folder: Path) -> float:
    """Bring a new session to where `folder` was saved; returns the seconds it had trained.

    Raises: CheckpointError if the files are damaged, or belong to another config.
    """
    manifest = read(folder, session.config)
    state = manifest.state
    for part in session.residency.parts:
        _load(session.residency, part, checkpoint.load_part(folder, part, manifest=manifest), folder)
    if session.meter:
        session.meter.sums.copy_(checkpoint.load_part(folder, "noise", manifest=manifest)["sums"])
    for part, optimizer in session.optimizers.items():
        stored = state["optimizer_steps"][part]
        optimizer.counts = stored if isinstance(stored, dict) else dict.fromkeys(optimizer.names, stored)
    session.model.partition = partition_from_dict(state["partition"])
    session.step = state["step"]
    session.changed.clear()
    return float(state["seconds"])


def counted(optimizer: PartOptimizer) -> int | dict[str, int]:
    """Return how many updates a part has had: one number where its parameters agree, else one for each by name."""
    counts = optimizer.counts
    return counts if len(set(counts.values())) > 1 else optimizer.steps


def restore_averages(residency: Residency, config: TrainConfig, folder: Path) -> Partition:
    """Bring a model that waits without optimizers to the averaged weights of `folder`; returns their partition. A
    process that trains may save meanwhile: then the newer checkpoint is read.

    Raises: CheckpointError as `restore`.
    """
    while True:
        manifest = read(folder, config)
        try:
            return _restore_averages(residency, folder, manifest)
        except CheckpointError:
            if read(folder, config).saves == manifest.saves:
                raise


def _restore_averages(residency: Residency, folder: Path, manifest: Manifest) -> Partition:
    for part in residency.parts:
        stored = checkpoint.load_part(folder, part, manifest=manifest)
        names = [name.removeprefix("weight/") for name in stored if name.startswith("weight/")]
        averages = {f"weight/{name}": stored.get(f"ema/{name}", stored[f"weight/{name}"]) for name in names}
        _load(residency, part, averages, folder)
    return partition_from_dict(manifest.state["partition"])


def read(folder: Path, config: TrainConfig) -> Manifest:
    """The manifest of a checkpoint of this config. Raises: CheckpointError if there is none, or it is another's."""
    manifest = checkpoint.read_state(folder)
    if manifest.state.get("config") != identity(config):
        raise CheckpointError(
            f"{folder}: this checkpoint was written by a run with another config; resume it with its own config.yaml"
        )
    return manifest


def _load(residency: Residency, part: str, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        residency.load(part, tensors)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def identity(config: TrainConfig) -> dict[str, Any]:
    """What of a config the weights depend on: all but where it runs, where it writes, and how it is read."""
    values = to_dict(config) | config.resolved()
    return {name: value for name, value in values.items() if name not in FREE and not name.startswith("tune_")}


def partition_to_dict(partition: Partition) -> dict[str, Any]:
    """`partition` as plain JSON values."""
    noise = {k: list(v) if isinstance(v, tuple) else v for k, v in density.to_dict(partition.density).items()}
    return {
        "density": noise,
        "edges": list(partition.edges),
        "layers": list(partition.layers),
        "overlap": partition.overlap,
    }


def partition_from_dict(values: dict[str, Any]) -> Partition:
    """The partition that `partition_to_dict` wrote."""
    noise = density.from_dict(values["density"])
    return Partition(noise, tuple(values["edges"]), tuple(values["layers"]), values["overlap"])
