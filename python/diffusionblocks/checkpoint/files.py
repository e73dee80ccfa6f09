"""Checkpoint folders: one safetensors file per part, and a manifest that commits them.

    manifest.json                  the state, and each part's file, size and SHA-256
    shared.save12.safetensors      part "shared" as the 12th save wrote it
    block_0.save11.safetensors     part "block_0", which the 12th save kept

Any interruption leaves the old checkpoint or the new one, whole (see `atomic`). Nothing here knows what a model is,
and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import atomic
from . import manifest as manifests
from .manifest import CheckpointError, Manifest, PartFile, refuse
from .parts import Inspected, Part, check_size, inspect_part, owned, read_part, write_part

__all__ = ["CheckpointError", "Manifest", "PartFile", "load_part", "read_state", "save", "sweep"]

MANIFEST = "manifest.json"
_PART = re.compile(r"[a-z0-9_]{1,100}(\.save\d+)\.safetensors")
_TEMPORARY = re.compile(_PART.pattern + r"\.tmp|manifest\.json\.tmp")


def save(
    folder: str | os.PathLike[str],
    parts: Mapping[str, Part],
    state: dict[str, Any],
    *,
    keep: Iterable[str] = (),
) -> Manifest:
    """Replace the checkpoint in `folder` by `parts`, the parts to `keep` as they are on disk, and `state`.

    A part is a mapping from names to tensors, or a function of no arguments that returns one: functions are called one
    at a time, so no more than one part need be in memory. Tensors may be on any device, strided, or tied: one tensor
    under two names is written once and is one tensor again when loaded. Tensors that overlap otherwise become copies.

    Args:
        folder: Made if missing. Files named `<part>.save<number>.safetensors` that an earlier save wrote are
            replaced.
        parts: The parts to write; their names are of lower-case letters, digits and underscores.
        state: Dicts with string keys, lists, strings, integers, finite floats, booleans and None.
        keep: Parts of the present checkpoint to carry over unwritten. All others are removed.

    Returns:
        The manifest now on disk.

    Raises:
        CheckpointError: A bad part name, tensor or state; a part to keep that the checkpoint doesn't have; or a
            `manifest.json` that is corrupt or foreign, which is never overwritten.
        OSError: The disk refused (full, read-only); the message names the file and which checkpoint loads now.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    manifests.check_json(state, path, "state")
    old = read_state(folder) if path.exists() else None
    kept = _kept(path, old, parts, list(keep))
    saves = old.saves + 1 if old else 1
    own = owned(_PART, _TEMPORARY, saved=old is not None)
    with atomic.saving(path, own, manifests.files(old)):
        written = {name: write_part(folder / f"{name}.save{saves}.safetensors", part) for name, part in parts.items()}
        new = Manifest(state, kept | written, saves, manifests.package_version())
        text = json.dumps(manifests.to_record(new), indent=1).encode()
        atomic.commit(folder, {MANIFEST: text}, own, manifests.files(new), manifests.files(old))
    return new


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed save left beside a checkpoint. Not safe while another process saves there."""
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        atomic.sweep(folder, owned(_PART, _TEMPORARY, saved=True), manifests.files(read_state(folder)))


def read_state(folder: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of the checkpoint in `folder`: its state and its parts. Reads no tensor.

    Raises:
        CheckpointError: The manifest is missing, truncated, corrupt, foreign, or of a newer format.
    """
    path = Path(folder) / MANIFEST
    return manifests.parse(manifests.read_json(path), path)


def load_part(
    folder: str | os.PathLike[str],
    name: str,
    *,
    device: str | torch.device = "cpu",
    manifest: Manifest | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of one part of the checkpoint in `folder`, verified.

    Args:
        folder: The checkpoint's folder.
        name: The part.
        device: Where the tensors go; they come one at a time.
        manifest: What `read_state` returned, so that all parts come from one save. Without it, it is read anew.

    Raises:
        CheckpointError: There is no such part, or its file is missing, truncated, corrupt or foreign.
    """
    folder = Path(folder)
    manifest = read_state(folder) if manifest is None else manifest
    if name not in manifest.parts:
        refuse(folder / MANIFEST, f"has no part {name!r}; it has {sorted(manifest.parts)}")
    part = manifest.parts[name]
    return read_part(folder / part.file, part, device)


def inspect_parts(folder: str | os.PathLike[str], manifest: Manifest, names: Iterable[str]) -> dict[str, Inspected]:
    """Verify parts of the checkpoint in `folder`, and return what is in their files but not the tensors.

    Raises:
        CheckpointError: As `load_part`.
    """
    found = {}
    for name in names:
        if name not in manifest.parts:
            refuse(Path(folder) / MANIFEST, f"has no part {name!r}; it has {sorted(manifest.parts)}")
        found[name] = inspect_part(Path(folder) / manifest.parts[name].file, manifest.parts[name])
    return found


def _kept(path: Path, old: Manifest | None, parts: Iterable[str], keep: list[str]) -> dict[str, PartFile]:
    present = old.parts if old else {}
    for name in parts:
        manifests.check_part_name(name, path)
        if name in keep:
            refuse(path, f"can't both write and keep the part {name!r}; leave it out of one")
    for name in keep:
        if name not in present:
            refuse(path, f"has no part {name!r} to keep; it has {sorted(present)}")
        check_size(path.parent / present[name].file, present[name])
    return {name: present[name] for name in keep}
