"""Checkpoint folders: one safetensors file a part, and a manifest that commits them.

    manifest.json                  what the checkpoint is: the state, and each part's file, size and SHA-256
    shared.save12.safetensors      part "shared" as the 12th save wrote it
    block_0.save11.safetensors     part "block_0", which the 12th save kept

A file that a manifest names is never written to again. A save writes new files beside the old ones, then
replaces the manifest in one step, and only then removes what the new manifest doesn't name. So a process
killed (or a machine switched off) at any instant leaves the old checkpoint or the new one, whole, and the
disk never holds more than both. One process saves to a folder at a time. Nothing here knows what a model is, and
nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import manifest as manifests
from .manifest import CheckpointError, Manifest, PartFile, refuse

__all__ = ["CheckpointError", "Manifest", "PartFile", "load_part", "read_state", "save"]

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp"
_DTYPES = {  # by safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip

Part: TypeAlias = "Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]"


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
        folder: made if missing. Files named `<part>.save<number>.safetensors` in it are the checkpoint's own.
        parts: the parts to write; their names are of lower-case letters, digits and underscores.
        state: dicts with string keys, lists, strings, integers, finite floats, booleans and None.
        keep: parts of the present checkpoint to carry over unwritten. All others are removed.

    Returns:
        The manifest now on disk.

    Raises:
        CheckpointError: a bad part name, tensor or state; a part to keep that isn't there; or a
            `manifest.json` that can't be read or isn't ours, which is never overwritten.
        OSError: the disk refused (full, read-only). The checkpoint that was there still loads, or this one, if the
            message says so.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    manifests.check_state(state, path)
    old = read_state(folder) if path.exists() else None
    kept = _kept(path, old, parts, list(keep))
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _sync_folder(folder.parent)
    _sweep(folder, old)
    saves = old.saves + 1 if old else 1
    try:
        written = {name: _write_part(folder, name, saves, part) for name, part in parts.items()}
        new = Manifest(state, kept | written, saves, manifests.package_version())
        text = manifests.dumps(new)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell; the next save sweeps again
            _sweep(folder, old)
        raise
    _write_aside(path, [text.encode()])
    try:
        os.replace(path.with_name(path.name + _TEMPORARY), path)  # the commit
        _sync_folder(folder)
        _sweep(folder, new)
    except OSError as error:
        if path.read_bytes() != text.encode():
            raise
        words = f"{error.strerror}, after the save: the new checkpoint is whole; resume goes on from it"
        raise OSError(error.errno, words, str(error.filename or folder)) from error
    return new


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed save left in a folder, if there is a checkpoint. Not beside a process that saves."""
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        _sweep(folder, read_state(folder))


def read_state(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint in `folder`: its state, and which parts it has. Reads no tensor.

    Raises:
        CheckpointError: there is no manifest, or it is truncated, corrupt, foreign, or of a newer format.
    """
    path = Path(folder) / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        refuse(path, "is missing: no save was completed there; give the folder of a checkpoint")
    return manifests.loads(text, path)


def load_part(
    folder: str | os.PathLike[str],
    name: str,
    *,
    device: str | torch.device = "cpu",
    manifest: Manifest | None = None,
) -> dict[str, Tensor]:
    """One part's tensors, in memory of their own on `device`, once its file's size and SHA-256 are verified.

    Args:
        folder: the checkpoint's folder.
        name: the part's name.
        device: where the tensors go, one at a time.
        manifest: from `read_state`, to take several parts of one save; None reads it anew.

    Raises:
        CheckpointError: no such part; or its file is missing, truncated, corrupt or foreign.
    """
    folder = Path(folder)
    manifest = read_state(folder) if manifest is None else manifest
    if name not in manifest.parts:
        refuse(folder / MANIFEST, f"has no part {name!r}; it has {sorted(manifest.parts)}")
    part = manifest.parts[name]
    path = folder / part.file
    _check_size(path, part)
    if _digest(path) != part.sha256:
        refuse(path, "is corrupt: its content doesn't match the manifest's SHA-256; restore it from a copy")
    try:
        tensors = _read_tensors(path, device)
        return tensors | {alias: tensors[source] for alias, source in part.tied.items()}
    except (SafetensorError, KeyError) as error:
        refuse(path, f"is foreign: not the safetensors file of {name!r} ({error}); restore it from a copy")


def _kept(path: Path, old: Manifest | None, parts: Iterable[str], keep: list[str]) -> dict[str, PartFile]:
    present = old.parts if old else {}
    for name in parts:
        if not isinstance(name, str) or not manifests.PART_NAME.fullmatch(name):
            refuse(path, f"can't name a part {name!r}; use lower-case letters, digits and underscores")
        if name in keep:
            refuse(path, f"can't both write and keep the part {name!r}; leave it out of one")
    for name in keep:
        if name not in present:
            refuse(path, f"has no part {name!r} to keep; it has {sorted(present)}")
        _check_size(path.parent / present[name].file, present[name])
    return {name: present[name] for name in keep}


def _check_size(path: Path, part: PartFile) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        refuse(path, "is missing; restore it from a copy, or read the manifest again if a save just ran")
    if size != part.size:
        kind = "truncated" if size < part.size else "corrupt"
        refuse(path, f"is {kind}: {size} bytes, and the manifest says {part.size}; restore it from a copy")


def _write_part(folder: Path, name: str, saves: int, part: Part) -> PartFile:
    path = folder / f"{name}.save{saves}.safetensors"
    tensors, tied = _untie(path, part() if callable(part) else part)
    sha256 = _write(path, _safetensors(tensors))
    return PartFile(path.name, path.stat().st_size, sha256, tied)


def _untie(path: Path, part: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The part's tensors, each under its first name only, and for its other names that first one."""
    part = dict(part)  # all alive at once, so that no two can have had one address by turns
    first: dict[Any, str] = {}
    for name, tensor in part.items():
        _check_tensor(path, name, tensor)
        first.setdefault(_identity(name, tensor), name)
    names = {name: first[_identity(name, tensor)] for name, tensor in part.items()}
    tied = {name: source for name, source in names.items() if source != name}
    return {name: part[name] for name in first.values()}, tied


def _identity(name: str, tensor: Tensor) -> Any:
    """Equal for two tensors that are one view of one memory; an empty tensor has no twin."""
    if tensor.numel() == 0:
        return name
    view = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), view


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    reserved = name == "__metadata__"
    if not isinstance(name, str) or reserved or name != name.encode("utf-8", "replace").decode():
        refuse(path, f"can't hold a tensor named {name!r}; give it another name")
    if not isinstance(tensor, Tensor):
        refuse(path, f"can't hold {name!r}: a {type(tensor).__name__} isn't a tensor; put it in the state")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        refuse(path, f"can't hold {name!r} ({kind}); make it a dense tensor of a usual dtype")


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time.

    Not by safetensors' own writer: killed, that leaves a temporary file of a random name (since 0.8), and
    what it finishes only the owner may read.
    """
    # Wide dtypes first, so that every tensor is aligned to its own.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        span = [end, end + tensor.numel() * tensor.element_size()]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": span}
        end = span[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        # contiguous() leaves a lazy conjugation or negation pending, and the bytes don't show it.
        dense = tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous()
        # as_strided, since contiguous and flat still allows any stride to a tensor of one element or none.
        yield dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def _read_tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    # What safe_open gives looks into the mapped file, unaligned. A copy is an ordinary tensor: arithmetic on
    # it after a resume takes the same vector paths, bit for bit, as before.
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}


def _write(path: Path, content: Iterable[bytes | memoryview]) -> str:
    """Write a file aside and rename it, durably: the bytes first, then the name. Its SHA-256."""
    sha256 = _write_aside(path, content)
    os.replace(path.with_name(path.name + _TEMPORARY), path)
    _sync_folder(path.parent)
    return sha256


def _write_aside(path: Path, content: Iterable[bytes | memoryview]) -> str:
    """Write and sync what is to become `path`, under its temporary name. Its SHA-256."""
    digest = hashlib.sha256()
    with open(path.with_name(path.name + _TEMPORARY), "wb") as file:
        for piece in content:
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sweep(folder: Path, manifest: Manifest | None) -> None:
    """Remove the checkpoint's own files that `manifest`, the one on disk, doesn't name."""
    named = {part.file for part in manifest.parts.values()} if manifest else set()
    stale = [path for path in sorted(folder.iterdir()) if _is_ours(path.name) and path.name not in named]
    if stale:
        _sync_folder(folder)  # or a power cut could undo the manifest's renaming and keep the removals
    for path in stale:
        path.unlink()


def _is_ours(name: str) -> bool:
    own = manifests.PART_FILE.fullmatch(name.removesuffix(_TEMPORARY))
    return own is not None or name == MANIFEST + _TEMPORARY


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
