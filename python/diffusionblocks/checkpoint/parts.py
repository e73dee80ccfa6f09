"""Write and read one part of a checkpoint: a safetensors file with its size, SHA-256 and tied tensors on record."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import atomic
from .layout import DTYPES, METADATA, Layout, parse
from .manifest import PartFile, refuse

CHUNK = 1 << 24  # bytes read at a time
CORRUPT = "is corrupt: its content doesn't match the recorded SHA-256; restore it from a copy"


class Stored(NamedTuple):
    """A part that lies in a safetensors file already, written whole and never changed; `tied` as in its record."""

    path: Path
    tied: dict[str, str]


Tensors: TypeAlias = Mapping[str, Tensor]
Part: TypeAlias = "Tensors | Callable[[], Tensors | Stored]"


def write_part(path: Path, part: Part) -> PartFile:
    """Write a part to `path`, atomically and durably, and return the file's record.

    Args:
        path: The safetensors file.
        part: Tensors by name, or a function that returns them, or the file that has them: that is linked, or copied.

    Raises:
        CheckpointError: A name or tensor that a safetensors file can't hold; another program's file stands there.
        OSError: The disk refused.
    """
    if path.exists() and not is_ours(path):
        refuse(path, "belongs to somebody else, and a save writes there; move it, or give another folder")
    content = part() if callable(part) else part
    if isinstance(content, Stored):
        sha256 = atomic.link(content.path, path)
        return PartFile(path.name, path.stat().st_size, sha256, content.tied)
    tensors = dict(content)  # all alive at once: no two can have had one address by turns
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that each is aligned to its own
    layout = Layout.of({name: tensors[name] for name in order}, align=1, page=1)
    sha256 = atomic.write(path, itertools.chain([layout.header], layout.content(tensors)))
    return PartFile(path.name, path.stat().st_size, sha256, dict(layout.tied))


def is_ours(path: Path) -> bool:
    """Return whether a file is a safetensors file that this package wrote.

    Its header begins with spaces that safetensors' own writer leaves out.
    """
    with open(path, "rb") as file:
        return file.read(100)[8:].startswith(json.dumps(METADATA)[:-1].encode())


def owned(names: re.Pattern[str], temporary: re.Pattern[str], *, saved: bool) -> atomic.Own:
    """Return what tells the files of earlier saves from those of others: temporary ones by their names, numbered ones
    too where a save lies (`saved`), and the rest by their headers.

    names: Of files; group 1 is their number. temporary: Of files that a killed save leaves.
    """

    def own(path: Path) -> bool:
        if temporary.fullmatch(path.name):
            return True
        name = names.fullmatch(path.name)
        return name is not None and ((saved and name[1] is not None) or is_ours(path))

    return own


class Inspected(NamedTuple):
    """A part's file that was verified but not kept: its path, its safetensors header, and where its tensors lie."""

    path: Path
    head: bytes
    layout: Layout


def inspect_part(path: Path, part: PartFile) -> Inspected:
    """Read a part's file, verify it against its record, and return what is in it but not the tensors.

    Raises: CheckpointError as `read_part`.
    """
    check_size(path, part)
    if atomic.digest(path) != part.sha256:
        refuse(path, CORRUPT)
    with open(path, "rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), part.size))
    layout = _layout(path, head, part)
    return Inspected(path, head, replace(layout, tied=tuple(part.tied.items())))


def read_part(path: Path, part: PartFile, device: str | torch.device) -> dict[str, Tensor]:
    """Read a part's file, once, verified against its record; tied tensors are one tensor again.

    On the host the tensors are views of one buffer.

    Raises:
        CheckpointError: The file is missing, truncated, corrupt or foreign.
    """
    check_size(path, part)
    head, data, sha256 = _read(path, part.size)
    if sha256 != part.sha256:
        refuse(path, CORRUPT)
    # As views they are aligned as ordinary tensors: arithmetic on them after a resume takes the same vector paths, bit
    # for bit, as before.
    tensors = {name: t.to(device) for name, t in _layout(path, head, part).views(data).items()}
    return tensors | {alias: tensors[source] for alias, source in part.tied.items()}


def _layout(path: Path, head: bytes, part: PartFile) -> Layout:
    try:
        layout = parse(head, part.size - len(head))
        names = {span.name for span in layout.spans}
        if unknown := set(part.tied.values()) - names:
            raise KeyError(min(unknown))
        return layout
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse(path, f"is foreign: not the safetensors file that was saved ({error}); restore it from a copy")


def _read(path: Path, size: int) -> tuple[bytes, Tensor, str]:
    """Return a file's safetensors header, the bytes that follow it, and the SHA-256 of both."""
    with open(path, "rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), size))
        sha256 = hashlib.sha256(head)
        data = torch.empty(size - len(head), dtype=torch.uint8)
        view = memoryview(data.numpy())
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            file.readinto(piece)
            sha256.update(piece)
    return head, data, sha256.hexdigest()


def tensor_sizes(path: Path) -> dict[str, int]:
    """Return the names of the tensors in a safetensors file and their sizes in bytes, from its header alone."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - start for name, (start, end) in spans.items()}


def check_size(path: Path, part: PartFile) -> None:
    """Refuse a missing file, or one of another size than recorded. Doesn't read it."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        refuse(path, "is missing; restore it from a copy, or load again if a save just ran")
    if size != part.size:
        kind = "truncated" if size < part.size else "corrupt"
        refuse(path, f"is {kind}: {size} bytes, recorded were {part.size}; restore it from a copy")


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    reserved = name == "__metadata__"
    if not isinstance(name, str) or reserved or name != name.encode("utf-8", "replace").decode():
        refuse(path, f"can't hold a tensor named {name!r}; give it another name")
    if not isinstance(tensor, Tensor):
        refuse(path, f"can't hold {name!r}: a {type(tensor).__name__} isn't a tensor; put it in the state or config")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        refuse(path, f"can't hold {name!r} ({kind}); make it a dense tensor of a usual dtype")
