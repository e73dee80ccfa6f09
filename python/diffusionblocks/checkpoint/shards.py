"""Model folders in the sharded layout of Hugging Face: one safetensors file per shard, and an index.

    model.safetensors.index.json      maps each tensor to its file; commits the save
    model.block_0.safetensors         shard "block_0"; a save over an older one writes model.block_0.save2.safetensors
    config.json                       the caller's config, for people and other tools

Readers of this layout (transformers, huggingface_hub) follow the index's `weight_map` and load the files as they are.
The index's metadata also holds our manifest: config, and each file's size, SHA-256 and tied tensors. So one rename
replaces a model as a whole (see `atomic`), and `config.json` is a copy: the config that counts is the index's. Nothing
here knows what a model is, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import atomic
from . import manifest as manifests
from .manifest import Manifest, refuse
from .parts import Part, owned, read_part, tensor_sizes, write_part

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_SHARD = re.compile(r"model\.[a-z0-9_]{1,100}(\.save\d+)?\.safetensors")
_TEMPORARY = re.compile(_SHARD.pattern + r"\.tmp|model\.safetensors\.index\.json\.tmp|config\.json\.tmp")
# What other libraries write: readers would take these for the folder's model, or their files for parts of it.
_FOREIGN = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "pytorch_model*.bin", "model_index.json",
            "diffusion_pytorch_model*", "adapter_config.json", "tf_model.h5", "flax_model.msgpack")  # fmt: skip


def save_shards(folder: str | os.PathLike[str], shards: Mapping[str, Part], config: dict[str, Any]) -> None:
    """Replace the model in `folder` by `shards` and `config`.

    A shard is a mapping from names to tensors, or a function of no arguments that returns one: functions are called
    one at a time, so no more than one shard need be in memory. A tensor under two names of one shard (tied) is written
    once, and is one tensor again when loaded; the `weight_map` has its first name.

    Args:
        folder: Made if missing. Files named `model.<shard>.safetensors` that an earlier save wrote are replaced.
        shards: Their names are of lower-case letters, digits and underscores; tensor names are unique over all shards.
        config: Dicts with string keys, lists, strings, integers, finite floats, booleans and None.

    Raises:
        CheckpointError: A bad name, tensor or config; or the folder holds another program's model, which is never
            overwritten.
        OSError: The disk refused (full, read-only); the message names the file and which model loads now.
    """
    folder = Path(folder)
    path = folder / INDEX
    manifests.check_json(config, folder / CONFIG, "config")
    for name in shards:
        manifests.check_part_name(name, path)
    old = _read(folder)[0] if path.exists() else None
    if old is None:
        _refuse_foreign(folder)
    saves = old.saves + 1 if old else 1
    suffix = f".save{saves}" if saves > 1 else ""
    own = owned(_SHARD, _TEMPORARY, saved=old is not None)
    with atomic.saving(path, own, manifests.files(old)):
        parts = {
            name: write_part(folder / f"model.{name}{suffix}.safetensors", shard) for name, shard in shards.items()
        }
        new = Manifest(config, parts, saves, manifests.package_version())
        texts = {INDEX: _index(folder, new), CONFIG: json.dumps(config, indent=2).encode()}
        atomic.commit(folder, texts, own, manifests.files(new), manifests.files(old))


def read_index(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config and the weight map of the model in `folder`. Reads no tensor.

    Returns:
        The config, and each tensor's file; tied tensors under their first name.

    Raises:
        CheckpointError: The index is missing, truncated, corrupt, foreign, or of a newer format.
    """
    manifest, weight_map = _read(Path(folder))
    path = Path(folder) / CONFIG
    if path.exists() and manifests.read_json(path) != manifest.state:
        warnings.warn(f"{path} differs from the config in {INDEX}, which counts: save again to change it", stacklevel=2)
    return manifest.state, weight_map


def load_shards(
    folder: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the shards of the model in `folder` one at a time, in the order of the save, verified.

    Args:
        folder: The model's folder.
        device: Where the tensors go; they come one at a time.

    Yields:
        A shard's name and its tensors, tied ones under all their names.

    Raises:
        CheckpointError: The index or a file is missing, truncated, corrupt or foreign; the message names it.
    """
    folder = Path(folder)
    manifest, weight_map = _read(folder)
    for name, part in manifest.parts.items():
        tensors = read_part(folder / part.file, part, device)
        mapped = {tensor for tensor, file in weight_map.items() if file == part.file}
        if mapped != tensors.keys() - part.tied.keys():
            refuse(folder / INDEX, f"is corrupt: its weight_map isn't that of {part.file}; restore it from a copy")
        yield name, tensors
        del tensors  # so that one shard is in memory while the next is read


def _read(folder: Path) -> tuple[Manifest, dict[str, str]]:
    path = folder / INDEX
    index = manifests.read_json(path)
    try:
        record, weight_map = index["metadata"]["diffusionblocks"], dict(index["weight_map"])
    except (KeyError, TypeError, ValueError):
        refuse(path, "is foreign: diffusionblocks didn't write it; give another folder")
    manifest = manifests.parse(record, path)
    if not all(file in manifests.files(manifest) for file in map(str, weight_map.values())):
        refuse(path, "is corrupt: its weight_map names files that were not saved with it; restore it from a copy")
    return manifest, weight_map


def _index(folder: Path, manifest: Manifest) -> bytes:
    weight_map: dict[str, str] = {}
    total_size = 0
    names: set[str] = set()
    for part in manifest.parts.values():
        sizes = tensor_sizes(folder / part.file)
        if twice := names & (sizes.keys() | part.tied.keys()):
            refuse(folder / part.file, f"can't hold {min(twice)!r}: another shard has a tensor of that name; rename it")
        names |= sizes.keys() | part.tied.keys()
        weight_map |= dict.fromkeys(sizes, part.file)
        total_size += sum(sizes.values())
    metadata = {"total_size": total_size, "diffusionblocks": manifests.to_record(manifest)}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2).encode()


def _refuse_foreign(folder: Path) -> None:
    if found := [path for pattern in _FOREIGN for path in folder.glob(pattern)]:
        refuse(found[0], "belongs to a model that diffusionblocks didn't save; give another folder")
