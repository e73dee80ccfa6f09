"""Load IDX files, the format of MNIST: a magic number, big-endian sizes, then the elements."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

GZIP_MAGIC = b"\x1f\x8b"
TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


def load(path: Path) -> Tensor:
    """Load an IDX file, plain or gzipped, as a uint8 tensor of the shape in its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: broken gzip, or a fault that `parse` names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no IDX file {path}")
    return parse(_unzipped(path), str(path))


def parse(content: bytes, name: str) -> Tensor:
    """Parse the bytes of an uncompressed IDX file into a uint8 tensor of the shape in its header.

    Args:
        content: the file's bytes.
        name: the file's name in error messages.

    Raises:
        ValueError: a wrong magic number, an element type other than uint8, or more or fewer elements than announced.
    """
    shape = _shape(content, name)
    start, size = 4 + 4 * len(shape), math.prod(shape)
    if len(content) != start + size:
        kind = "truncated" if len(content) < start + size else "too long"
        raise ValueError(
            f"{name} is {kind}: its header announces shape {shape}, {start + size} bytes in all, "
            f"but it has {len(content)}; fetch the file again"
        )
    if not size:  # torch.frombuffer refuses an empty buffer
        return torch.empty(shape, dtype=torch.uint8)
    # bytearray: writing to a tensor over immutable bytes is undefined
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def _shape(content: bytes, name: str) -> tuple[int, ...]:
    """Return the sizes in the header after checking the magic number: two zero bytes, type, number of axes."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES or not content[3]:
        raise ValueError(
            f"{name} is not an IDX file: it starts with {content[:4].hex(' ') or 'nothing'}, "
            "not with 00 00, a type and a number of axes; give the file its own name or fetch it again"
        )
    kind, axes = content[2], content[3]
    if TYPES[kind] != "uint8":
        raise ValueError(f"{name} holds {TYPES[kind]}; only IDX files of uint8 are read, so convert it")
    if len(content) < 4 + 4 * axes:
        raise ValueError(f"{name} is truncated in its {4 + 4 * axes} bytes of header; fetch the file again")
    return struct.unpack_from(f">{axes}I", content, 4)


def _unzipped(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or broken gzip ({error}); fetch the file again") from error
