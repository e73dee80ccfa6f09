"""A training session on disk and back: which tensors and numbers make it bit-exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import checkpoint, density
from .checkpoint import CheckpointError, Manifest
from .config import TrainConfig, to_yaml
from .partition import Partition
from .training import Session


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
        "optimizer_steps": {part: optimizer.steps for part, optimizer in session.optimizers.items()},
        "partition": partition_to_dict(session.model.partition),
    }
    checkpoint.save(folder, parts, state, keep=set(session.residency.parts) - session.changed)
    session.changed.clear()


def restore(session: Session, folder: Path) -> float:
    """Bring a new session to where `folder` was saved; returns the seconds it had trained.

    Raises: CheckpointError if the files are damaged, or belong to another config.
    """
    manifest = checkpoint.read_state(folder)
    state = manifest.state
    if state.get("config") != identity(session.config):
        raise CheckpointError(
            f"{folder}: this checkpoint was written by a run with another config; resume it with its own config.yaml"
        )
    _load_parts(session, folder, manifest)
    for part, optimizer in session.optimizers.items():
        optimizer.steps = state["optimizer_steps"][part]
    session.model.partition = partition_from_dict(state["partition"])
    session.step = state["step"]
    session.changed.clear()
    return float(state["seconds"])


def _load_parts(session: Session, folder: Path, manifest: Manifest) -> None:
    for part in session.residency.parts:
        tensors = checkpoint.load_part(folder, part, manifest=manifest)
        try:
            session.residency.load(part, tensors)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    if session.meter:
        session.meter.sums.copy_(checkpoint.load_part(folder, "noise", manifest=manifest)["sums"])


def identity(config: TrainConfig) -> str:
    """What of a config the weights depend on: all but where it runs and where it writes."""
    lines = to_yaml(config).splitlines()
    free = ("out:", "folder:", "device:", "store:", "compile:", "checkpoint_every:", "baseline:", "tune_")
    kept, skipping = [], False
    for line in lines:
        skipping = line.startswith(free) or (skipping and line.startswith("- "))
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


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
