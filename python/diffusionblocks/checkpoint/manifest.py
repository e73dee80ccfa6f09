"""The manifest of a checkpoint, as text: what a save committed. checkpoint.py reads and writes the file.

The text is JSON with a SHA-256 of its own content, so that a flipped byte in it can't pass for another
learning rate. What JSON would change on the way (tuples, NaN, integer keys) is refused instead of bent.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

FORMAT = "diffusionblocks-checkpoint"
FORMAT_VERSION = 1

# Lower case, so that two parts never meet in one file where the file system ignores case.
PART_NAME = re.compile(r"[a-z0-9_]{1,100}")
PART_FILE = re.compile(r"[a-z0-9_]{1,100}\.save\d+\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint can't be read or written as asked; the message names the file and what to do."""


@dataclass(frozen=True)
class PartFile:
    """The file of one part. `tied`: names of tensors that are the same as another, and that other's name."""

    file: str
    size: int
    sha256: str
    tied: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What one save committed: the caller's state, each part's file, and how many saves there were."""

    state: dict[str, Any]
    parts: dict[str, PartFile]
    saves: int
    package_version: str


def refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path} {why}")


def dumps(manifest: Manifest) -> str:
    """The manifest as the text that `loads` reads."""
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "package_version": manifest.package_version,
        "saves": manifest.saves,
        "parts": {name: vars(part) for name, part in manifest.parts.items()},
        "state": manifest.state,
    }
    return json.dumps({**record, "sha256": _digest(record)}, indent=1)


def loads(text: bytes, path: Path) -> Manifest:
    """The manifest in `text`, which was read from `path`.

    Raises:
        CheckpointError: it is truncated, corrupt, foreign, or of a newer format.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        refuse(path, "is truncated, corrupt, or no manifest at all; restore it from a copy")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        refuse(path, f"is foreign: its format isn't {FORMAT!r}; give a folder that diffusionblocks wrote")
    _check_version(record, path)
    _check_json(record, path, "manifest")
    if record.pop("sha256", None) != _digest(record):
        refuse(path, "is corrupt: its content doesn't match its SHA-256; restore it from a copy")
    try:
        parts = {name: _part(part) for name, part in record["parts"].items()}
        return Manifest(dict(record["state"]), parts, int(record["saves"]), str(record["package_version"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        refuse(path, f"is foreign ({error!r}); give a folder that diffusionblocks wrote")


def check_state(state: object, path: Path) -> None:
    """Raise CheckpointError unless `state` is a dict that comes back from JSON as it went in."""
    if not isinstance(state, dict):
        refuse(path, f"can't hold a state that is a {type(state).__name__}; make it a dict")
    _check_json(state, path, "state")


def _check_json(value: object, path: Path, where: str) -> None:
    try:
        _walk(value, path, where)
    except RecursionError:
        refuse(path, f"can't hold {where}: nested too deeply; flatten it")


def package_version() -> str:
    try:
        return metadata.version("diffusionblocks")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _part(record: dict[str, Any]) -> PartFile:
    part = PartFile(**record)
    if not PART_FILE.fullmatch(part.file):  # a name with a slash would reach outside the folder
        raise ValueError(f"no name for a part's file: {part.file!r}")
    return PartFile(part.file, int(part.size), str(part.sha256), dict(part.tied))


def _check_version(record: dict[str, Any], path: Path) -> None:
    version = record.get("version")
    if type(version) is not int or version < 1:
        refuse(path, f"is corrupt: {version!r} is no format version; restore it from a copy")
    if version > FORMAT_VERSION:
        newer = f"is of the newer format {version} (diffusionblocks {record.get('package_version')})"
        refuse(path, f"{newer}, and this one reads up to {FORMAT_VERSION}: upgrade diffusionblocks")


def _walk(value: object, path: Path, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                refuse(path, f"can't hold {where}: the key {key!r} isn't a string; make it one")
            _walk(item, path, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _walk(item, path, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        refuse(path, f"can't hold {where} = {value}; make it a finite number or None")
    elif value is not None and not isinstance(value, (str, int, float)):
        kind = type(value).__name__
        refuse(path, f"can't hold {where}: a {kind} isn't JSON; use a dict, list, str or number")


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode("ascii")).hexdigest()
