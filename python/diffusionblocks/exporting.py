"""A trained model as one file: averaged weights, config and partition."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import snapshots
from .adapters import adapter_of
from .blocks import DiffusionBlocks
from .config import from_yaml, to_yaml
from .training import Session

FORMAT = "diffusionblocks-model-1"


def export(session: Session, to: Path) -> None:
    """Write a session's averaged weights to one safetensors file, config and partition inside.

    Raises: ValueError if `to` doesn't end in .safetensors.
    """
    if to.suffix != ".safetensors":
        raise ValueError(f"to must end in .safetensors, got {to}")
    with session.residency.averages():
        weights = session.residency.weights()
    partition = json.dumps(snapshots.partition_to_dict(session.model.partition))
    metadata = {"format": FORMAT, "config": to_yaml(session.config), "partition": partition}
    aside = to.with_name(to.name + ".tmp")
    save_file(weights, aside, metadata=metadata)
    aside.replace(to)


def load_model(path: Path | str) -> DiffusionBlocks:
    """The model that `export` wrote, on the CPU, in evaluation mode.

    Raises: ValueError if the file is damaged or another program's.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file ({error}); export the run again") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by `dblocks export`; pass a file that was")
    config = from_yaml(metadata["config"])
    model = adapter_of(config).blocks()
    model.partition = snapshots.partition_from_dict(json.loads(metadata["partition"]))
    model.load_state_dict(weights)
    return model.eval()
