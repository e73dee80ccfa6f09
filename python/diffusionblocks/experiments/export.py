"""A trained model as one file: averaged weights, config and partition."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..blocks import DiffusionBlocks
from ..sampling.sampler import Walker
from . import snapshots
from .config import from_yaml, to_yaml
from .data.text import TextData
from .tasks import adapter_of
from .tasks.base import Adapter

FORMAT = "diffusionblocks-model-1"


def export(adapter: Adapter, walker: Walker, to: Path) -> None:
    """Write a walker's weights to one safetensors file; config, partition and a text's alphabet inside.

    Raises: ValueError if `to` doesn't end in .safetensors.
    """
    if to.suffix != ".safetensors":
        raise ValueError(f"to must end in .safetensors, got {to}")
    partition = json.dumps(snapshots.partition_to_dict(walker.model.partition))
    metadata = {"format": FORMAT, "config": to_yaml(adapter.config), "partition": partition}
    if isinstance(adapter.data, TextData):
        metadata["alphabet"] = adapter.data.alphabet
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_name(to.name + ".tmp")
    save_file(walker.weights(), aside, metadata=metadata)
    aside.replace(to)


def load_model(path: Path | str) -> DiffusionBlocks:
    """The model that `export` wrote, on the CPU, in evaluation mode.

    Raises: ValueError if the file is damaged or another program's.
    """
    metadata = _metadata(path)
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
    config = from_yaml(metadata["config"])
    model = adapter_of(config).blocks()
    model.partition = snapshots.partition_from_dict(json.loads(metadata["partition"]))
    model.load_state_dict(weights)
    return model.eval()


def load_alphabet(path: Path | str) -> str:
    """What the tokens of an exported language model stand for: token i for character i.

    Raises: ValueError if the file is damaged, another program's, or no language model's.
    """
    metadata = _metadata(path)
    if "alphabet" not in metadata:
        raise ValueError(f"{path} holds no language model, so its targets are no characters")
    return metadata["alphabet"]


def _metadata(path: Path | str) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file ({error}); export the run again") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by `dblocks export`; pass a file that was")
    return metadata
