"""The manifest of a save: the caller's state and the record of each part's file, as JSON.

The JSON holds a SHA-256 of its own content, so that a flipped byte in it can't pass for another learning rate. Values
that JSON would change (tuples, NaN, integer keys) are refused.
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

_PART_NAME = re.compile(r"[a-z0-9_]{1,100}")
_PART_FILE = re.compile(r"[a-z0-9_.]{1,200}\.safetensors")  # without a slash, which would reach outside the folder


class CheckpointError(ValueError):
    """A checkpoint can't be read or written as asked; the message names the file and what to do."""


@dataclass(frozen=True)
class PartFile:
    """The file of one part.

    Attributes:
        file: Its name in the folder.
        size: Its size in bytes.
        sha256: The SHA-256 of its content, in hexadecimal.
        tied: Further names of tensors in it, each with the name that the tensor is stored under.
    """

    file: str
    size: int
    sha256: str
    tied: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A committed save: the caller's state, each part's file, and the number of saves so far."""

    state: dict[str, Any]
    parts: dict[str, PartFile]
    saves: int
    package_version: str


def refuse(path: Path, why: str) -> NoReturn:
    """Raise CheckpointError: the path, what is wrong with it, and what to do."""
    raise CheckpointError(f"{path} {why}")


def files(manifest: Manifest | None) -> set[str]:
    """Return the names of the files that a manifest names."""
    return {part.file for part in manifest.parts.values()} if manifest else set()


def to_record(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as a dict for JSON, with its SHA-256; `parse` reads it."""
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "package_version": manifest.package_version,
        "saves": manifest.saves,
        "parts": {name: vars(part) for name, part in manifest.parts.items()},
        "state": manifest.state,
    }
    return {**record, "sha256": digest(record)}


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raise CheckpointError if it is missing, truncated or corrupt."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        refuse(path, "is missing: no save was completed there; give the folder of a save")
    except IsADirectoryError:
        refuse(path, "is a folder, where a save has a file; restore it from a copy")
    except (ValueError, RecursionError):
        refuse(path, "is truncated, corrupt, or no JSON at all; restore it from a copy")


def parse(record: Any, path: Path) -> Manifest:
    """Return the manifest in `record`, which was read from `path`.

    Raises:
        CheckpointError: It is corrupt, foreign, or of a newer format.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        refuse(path, f"is foreign: its format isn't {FORMAT!r}; give a folder that diffusionblocks wrote")
    _check_version(record, path)
    check_json(record, path, "manifest")
    content = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("sha256") != digest(content):
        refuse(path, "is corrupt: its content doesn't match its SHA-256; restore it from a copy")
    try:
        parts = {name: _part(part) for name, part in record["parts"].items()}
        return Manifest(dict(record["state"]), parts, int(record["saves"]), str(record["package_version"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        refuse(path, f"is foreign ({error!r}); give a folder that diffusionblocks wrote")


def check_json(value: object, path: Path, where: str) -> None:
    """Raise CheckpointError unless `value`, called `where`, is a dict that comes back from JSON as it went in."""
    if not isinstance(value, dict):
        refuse(path, f"can't hold a {where} that is a {type(value).__name__}; make it a dict")
    try:
        _check_value(value, path, where)
    except RecursionError:
        refuse(path, f"can't hold {where}: nested too deeply; flatten it")


def check_part_name(name: object, path: Path) -> None:
    """Raise CheckpointError unless `name` can be part of a file's name.

    Lower case only, so that two parts never meet in one file where the file system ignores case.
    """
    if not isinstance(name, str) or not _PART_NAME.fullmatch(name):
        refuse(path, f"can't name a part {name!r}; use lower-case letters, digits and underscores")


def package_version() -> str:
    """Return the version of the installed diffusionblocks, or "unknown"."""
    try:
        return metadata.version("diffusionblocks")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _part(record: dict[str, Any]) -> PartFile:
    part = PartFile(**record)
    if not _PART_FILE.fullmatch(part.file):
        raise ValueError(f"no name for a part's file: {part.file!r}")
    return PartFile(part.file, int(part.size), str(part.sha256), dict(part.tied))


def _check_version(record: dict[str, Any], path: Path) -> None:
    version = record.get("version")
    if type(version) is not int or version < 1:
        refuse(path, f"is corrupt: {version!r} is no format version; restore it from a copy")
    if version > FORMAT_VERSION:
        newer = f"is of the newer format {version} (diffusionblocks {record.get('package_version')})"
        refuse(path, f"{newer}, and this one reads up to {FORMAT_VERSION}: upgrade diffusionblocks")


def _check_value(value: object, path: Path, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                refuse(path, f"can't hold {where}: the key {key!r} isn't a string; make it one")
            _check_value(item, path, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, path, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        refuse(path, f"can't hold {where} = {value}; make it a finite number or None")
    elif value is not None and not isinstance(value, (str, int, float)):
        kind = type(value).__name__
        refuse(path, f"can't hold {where}: a {kind} isn't JSON; use a dict, list, str or number")


def digest(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a dict's JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode("ascii")).hexdigest()
