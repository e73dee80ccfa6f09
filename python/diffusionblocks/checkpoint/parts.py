"""Write and read one part of a checkpoint: a safetensors file with its size, SHA-256 and tied tensors on record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import atomic
from .manifest import PartFile, refuse

Part: TypeAlias = "Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]"

DTYPES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip


def write_part(path: Path, part: Part) -> PartFile:
    """Write a part to `path`, atomically and durably, and return the file's record.

    Args:
        path: The safetensors file.
        part: Tensors by name, or a function that returns them.

    Raises:
        CheckpointError: A name or tensor that a safetensors file can't hold.
        OSError: The disk refused.
    """
    tensors, tied = _untie(path, part() if callable(part) else part)
    sha256 = atomic.write(path, _safetensors(tensors))
    return PartFile(path.name, path.stat().st_size, sha256, tied)


def read_part(path: Path, part: PartFile, device: str | torch.device) -> dict[str, Tensor]:
    """Read a part's file, verified against its record; tied tensors are one tensor again.

    Raises:
        CheckpointError: The file is missing, truncated, corrupt or foreign.
    """
    check_size(path, part)
    if atomic.digest(path) != part.sha256:
        refuse(path, "is corrupt: its content doesn't match the recorded SHA-256; restore it from a copy")
    try:
        # Tensors of safe_open look into the mapped file, unaligned. A copy is an ordinary tensor: arithmetic on
        # it after a resume takes the same vector paths, bit for bit, as before.
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}
        return tensors | {alias: tensors[source] for alias, source in part.tied.items()}
    except (SafetensorError, KeyError) as error:
        refuse(path, f"is foreign: not the safetensors file that was saved ({error}); restore it from a copy")


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


def _untie(path: Path, part: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a part's tensors, each under its first name only, and a map from its other names to that one."""
    part = dict(part)  # all alive at once: no two can have had one address by turns
    first: dict[Any, str] = {}
    for name, tensor in part.items():
        _check_tensor(path, name, tensor)
        first.setdefault(_identity(name, tensor), name)
    names = {name: first[_identity(name, tensor)] for name, tensor in part.items()}
    tied = {name: source for name, source in names.items() if source != name}
    return {name: part[name] for name in first.values()}, tied


def _identity(name: str, tensor: Tensor) -> Any:
    """Return a key that is equal for two tensors that are one view of one memory; empty tensors have no twin."""
    if tensor.numel() == 0:
        return name
    view = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), view


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    reserved = name == "__metadata__"
    if not isinstance(name, str) or reserved or name != name.encode("utf-8", "replace").decode():
        refuse(path, f"can't hold a tensor named {name!r}; give it another name")
    if not isinstance(tensor, Tensor):
        refuse(path, f"can't hold {name!r}: a {type(tensor).__name__} isn't a tensor; put it in the state or config")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        refuse(path, f"can't hold {name!r} ({kind}); make it a dense tensor of a usual dtype")


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, a tensor at a time.

    safetensors' own writer, killed, leaves a temporary file of a random name (since 0.8), and only the owner may
    read what it finishes.
    """
    # Wide dtypes first, so that every tensor is aligned to its own.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    # The metadata is that of safetensors' own writer for torch; some readers require it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        span = [end, end + tensor.numel() * tensor.element_size()]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": span}
        end = span[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        # contiguous() leaves a lazy conjugation or negation pending, and the bytes don't show it.
        dense = tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous()
        # as_strided, since contiguous and flat still allows any stride to a tensor of one element or none.
        yield dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data
