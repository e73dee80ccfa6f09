"""Checkpoints of one model's blocks, trained apart, as one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import files
from ..checkpoint.files import CheckpointError, Manifest, PartFile
from ..checkpoint.parts import Stored

# What two checkpoints of one model's blocks have in common, and what to do if not.
SETTINGS = {
    "settings": "train all blocks with the same settings",
    "recipe": "train all blocks of one network with the same settings",
}
PLACE = {
    "partition": "build all models with the same density, blocks and layers, and train with adapt=False",
    "shape": "train all blocks on targets of one shape",
    "positions": "train all blocks on the same batches in the same order",
}


def merge(
    folders: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], *, extra: dict[str, Any] | None = None
) -> None:
    """Join checkpoints of trainers that each trained some of a model's blocks (`train_blocks`).

    The result is the checkpoint that one trainer of all blocks would have written, to the last bit. Its files are hard
    links to the folders' own, or copies on another file system.

    Args:
        folders: Checkpoint folders, whose blocks together are all of the model's, each once, at one step.
        out: A folder that holds nothing yet.
        extra: Values for the result's `extra`; by default those of the folders, which must be equal then.

    Raises:
        TypeError: One folder rather than several.
        CheckpointError: The folders don't belong together, a block is missing or there twice, a file is missing or
            damaged, or `out` holds something; nothing is written then.
        OSError: The disk refused.

    Examples:
        >>> import torch, diffusionblocks as db
        >>> def trainer(*blocks):
        ...     torch.manual_seed(0)
        ...     layers = [torch.nn.Linear(8, 8) for _ in range(2)]
        ...     model = db.from_layers(layers, stem=torch.nn.Linear(4, 8), head=torch.nn.Linear(8, 3), blocks=2,
        ...                            target=db.LabelTarget(3, 8), shared="per_block")
        ...     return db.Trainer(model, train_blocks=blocks or None, adapt=False, visit=1, device="cpu")
        >>> for block in (0, 1):  # on two machines
        ...     part = trainer(block)
        ...     part.fit([(torch.ones(2, 4), torch.tensor([0, 2]))], steps=4, progress=False)
        ...     part.save(f"part{block}")
        >>> db.merge(["part0", "part1"], "whole")
        >>> whole = trainer()
        >>> whole.load("whole"), whole.steps_done
        ({}, 4)
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} holds something already: give a new folder")
    whole = join(folders, extra=extra)
    files.inspect_parts(out, whole, whole.parts)
    files.save(out, {name: partial(_stored, part) for name, part in whole.parts.items()}, whole.state)


def _stored(part: PartFile) -> Stored:
    return Stored(Path(part.file), part.tied)


def join(folders: Iterable[str | os.PathLike[str]], *, extra: dict[str, Any] | None = None) -> Manifest:
    """Return one manifest over the files of several checkpoints, with their absolute paths. Reads no tensor.

    Raises: CheckpointError unless they belong together, as `merge`.
    """
    shares = _read(folders)
    (first, manifest), *others = shares.items()
    place = PLACE if extra is not None else PLACE | {"extra": "give the value of the result, extra=..."}
    for folder, other in others:
        _check_versions(first, manifest, folder, other)
        _check_equal(first, manifest, folder, other, SETTINGS)
        _check_steps(first, manifest, folder, other)
        _check_equal(first, manifest, folder, other, place)
    parts = _parts(shares)
    scalars = {name: value for m in shares.values() for name, value in m.state["scalars"].items()}
    state = manifest.state | {"scalars": scalars, "extra": manifest.state["extra"] if extra is None else extra}
    return Manifest(state, parts, manifest.saves, manifest.package_version)


def _read(folders: Iterable[str | os.PathLike[str]]) -> dict[Path, Manifest]:
    if isinstance(folders, (str, bytes, os.PathLike)):
        raise TypeError(f"folders must be several, e.g. ['a', 'b'], got the one {str(folders)!r}")
    shares: dict[Path, Manifest] = {}
    for folder in (Path(folder).resolve() for folder in folders):
        if folder in shares:
            raise CheckpointError(f"{folder} is given twice: give the folder of each part once")
        inner = folder / "checkpoint"
        if not (folder / files.MANIFEST).exists() and (inner / files.MANIFEST).exists():
            raise CheckpointError(f"{folder} is a run folder: use `dblocks merge`, or give {inner}")
        shares[folder] = files.read_state(folder)
    if not shares:
        raise CheckpointError("no folders to merge: give those that the parts were saved in")
    return shares


def _check_versions(first: Path, manifest: Manifest, folder: Path, other: Manifest) -> None:
    if manifest.package_version != other.package_version:
        raise CheckpointError(
            f"{first} was saved by diffusionblocks {manifest.package_version}, {folder} by {other.package_version}: "
            "train all blocks with one version"
        )


def _check_equal(first: Path, manifest: Manifest, folder: Path, other: Manifest, wanted: dict[str, str]) -> None:
    for name, advice in wanted.items():
        one, two = manifest.state.get(name), other.state.get(name)
        if wanted is SETTINGS and one and two:  # older ones don't know all, and each knows its own blocks' optimizers
            known = [key for key in one if key in two]
            one, two = {key: one[key] for key in known}, {key: two[key] for key in known}
        if difference := _difference(one, two):
            raise CheckpointError(f"{first} and {folder} differ in their {name}: {difference}; {advice}")


def _check_steps(first: Path, manifest: Manifest, folder: Path, other: Manifest) -> None:
    done, others = ((m.state["step"], m.state["batches"]) for m in (manifest, other))
    if done != others:
        behind, step = (first, others[0]) if done < others else (folder, done[0])
        raise CheckpointError(
            f"{first} is at step {done[0]}, {folder} at step {others[0]}: train {behind} on to step {step}"
        )


def _parts(shares: dict[Path, Manifest]) -> dict[str, PartFile]:
    """Return every part's file, blocks from the one folder that has them; what blocks share is equal in all."""
    parts: dict[str, PartFile] = {}
    owners: dict[str, Path] = {}
    for folder, manifest in shares.items():
        for name, part in manifest.parts.items():
            if name in owners and name.startswith("block_"):
                raise CheckpointError(f"{owners[name]} and {folder} both trained {name}: leave one of them out")
            if name in owners and part.sha256 != parts[name].sha256:
                raise CheckpointError(
                    f"{owners[name]} and {folder} differ in {name!r} ({_unequal_tensors(owners[name], folder, name)}), "
                    "which all blocks have in common: build both models by the same code from the same seed"
                )
            owners.setdefault(name, folder)
            parts.setdefault(name, PartFile(str(folder / part.file), part.size, part.sha256, part.tied))
    count = len(next(iter(shares.values())).state["partition"]["layers"])
    wanted = ["shared", *(f"block_{b}" for b in range(count))]
    if missing := [name for name in wanted if name not in parts]:
        given = ", ".join(str(folder) for folder in shares)
        raise CheckpointError(f"{given}: none has {', '.join(missing)} of the model's {count} blocks: add its folder")
    extra = [name for name in parts if name not in wanted]
    return {name: parts[name] for name in (*wanted, *extra)}


def _unequal_tensors(first: Path, second: Path, part: str) -> str:
    one, other = (files.load_part(folder, part) for folder in (first, second))
    names = sorted(
        n for n in one.keys() | other.keys() if n not in one or n not in other or not _same(one[n], other[n])
    )
    return ", ".join(names[:3])


def _same(one: Any, other: Any) -> bool:
    return bool(one.shape == other.shape and one.dtype == other.dtype and (one == other).all())


def _difference(one: Any, other: Any) -> str:
    """Return the first difference of two JSON values, "" if they are equal."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next((text for pair in zip(one, other, strict=True) if (text := _difference(*pair))), "")
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            if difference := _difference(one.get(key), other.get(key)):
                return f"{key} {difference}"
        return ""
    return "" if one == other else f"{_short(one)} and {_short(other)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
