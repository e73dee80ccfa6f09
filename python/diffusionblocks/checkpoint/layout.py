"""Where named tensors lie in one flat buffer, and the safetensors header that says so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

ALIGN = 64  # as torch's allocator on the host: arithmetic takes the same vector paths, to the same bits
PAGE = 4096  # what direct file access is aligned to
PAD = "pad/"  # names of the gaps, since a safetensors file may have none
METADATA = {"__metadata__": {"format": "pt"}}  # that of safetensors' own writer for torch; some readers require it

DTYPES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Span:
    """One tensor's place: its first byte and, row-major, its dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor as a view of a flat uint8 buffer; a copy where the place isn't aligned to `ALIGN`."""
        data = buffer[self.start : self.end]
        if self.start % ALIGN:
            data = data.clone()
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """The places of tensors in a buffer.

    Attributes:
        spans: Each tensor's place.
        nbytes: Size of the buffer, a multiple of `page`.
        tied: Further names of tensors in it, each with the name that the tensor lies under.
        page: What the buffer is aligned to in a file.
    """

    spans: tuple[Span, ...]
    nbytes: int
    tied: tuple[tuple[str, str], ...] = ()
    page: int = PAGE

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, align: int = ALIGN, page: int = PAGE) -> Layout:
        """Return a layout of tensors in their order; those that are one view of one memory get one place.

        Args:
            tensors: By name; dense, of dtypes in DTYPES.
            align: Of each tensor's first byte. page: Of the size of all.
        """
        first: dict[Any, str] = {}
        spans, tied, end = [], [], 0
        for name, t in tensors.items():
            twin = first.setdefault(identity(name, t), name)
            if twin != name:
                tied.append((name, twin))
                continue
            start = -(-end // align) * align
            end = start + t.numel() * t.element_size()
            spans.append(Span(name, t.dtype, tuple(t.shape), start, end))
        return cls(tuple(spans), -(-end // page) * page, tuple(tied), page)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return all tensors by name, tied ones under each of theirs, as views of a flat uint8 buffer."""
        found = {span.name: span.view(buffer) for span in self.spans}
        return found | {name: found[twin] for name, twin in self.tied}

    def fill(self, buffer: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of this layout into a buffer."""
        for span in self.spans:
            span.view(buffer).copy_(tensors[span.name].detach())

    @cached_property
    def header(self) -> bytes:
        """The safetensors header, padded so that what follows is aligned."""
        record: dict[str, Any] = {**METADATA}
        end = 0
        for span in self.spans:
            record |= _gap(end, span.start)
            offsets = [span.start, span.end]
            record[span.name] = {"dtype": DTYPES[span.dtype], "shape": [*span.shape], "data_offsets": offsets}
            end = span.end
        record |= _gap(end, self.nbytes)
        text = json.dumps(record, ensure_ascii=False).encode()
        text += b" " * (-(len(text) + 8) % max(self.page, 8))
        return len(text).to_bytes(8, "little") + text

    def content(self, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
        """Yield the bytes that follow the header, a tensor at a time."""
        end = 0
        for span in self.spans:
            yield bytes(span.start - end)
            # contiguous() leaves a lazy conjugation or negation pending, and the bytes don't show it.
            dense = tensors[span.name].detach().resolve_conj().resolve_neg().cpu().contiguous()
            # as_strided, since contiguous and flat still allows any stride to a tensor of one element or none.
            yield dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data
            end = span.end
        yield bytes(self.nbytes - end)


def parse(head: bytes, nbytes: int) -> Layout:
    """Return the layout that a safetensors header describes, without gaps. nbytes: of what follows the header.

    Raises: ValueError, KeyError, TypeError or AttributeError if it isn't such a header.
    """
    record = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
    record.pop("__metadata__", None)
    spans = []
    for name, entry in record.items():
        dtype, shape, (start, end) = _BY_NAME[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"{name} has a wrong shape")
        if not 0 <= start <= end <= nbytes or end - start != torch.Size(shape).numel() * dtype.itemsize:
            raise ValueError(f"{name} has a wrong place")
        spans.append(Span(name, dtype, shape, start, end))
    return Layout(tuple(span for span in spans if not span.name.startswith(PAD)), nbytes, page=1)


def identity(name: str, tensor: Tensor) -> Any:
    """Return a key that is equal for two tensors that are one view of one memory; empty tensors have no twin."""
    if tensor.numel() == 0:
        return name
    view = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), view  # not its address: a fake tensor has none


def _gap(start: int, end: int) -> dict[str, Any]:
    size = end - start
    return {f"{PAD}{start}": {"dtype": "U8", "shape": [size], "data_offsets": [start, end]}} if size else {}
