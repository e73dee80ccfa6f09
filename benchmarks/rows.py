"""Rows of figures, and the files that hold them: lines of JSON while a bench runs, one JSON document afterwards."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Document = dict[str, Any]


@dataclass
class Row:
    """One contender in one direction on one case: a kernel's figures, the host's, or a note on why there are none."""

    case: str
    dtype: str
    contender: str
    direction: str = "both"  # "forward", "backward", or "both" where they are clocked together
    bytes_moved: int | None = None  # what must be read and written once
    ms_20: float | None = None  # on a GPU device time, on a CPU wall time: 20th percentile, median, 80th
    ms_50: float | None = None
    ms_80: float | None = None
    gb_per_s: float | None = None
    of_copy: float | None = None  # share of a copy's bandwidth in the same run
    tflop_per_s: float | None = None  # of the work that can't be left out, where a bench says how much it is
    peak_mib: float | None = None  # allocated above what was there before the call
    reserved_mib: float | None = None  # the same, as the allocator holds it
    host_us: float | None = None  # time to enqueue the call, behind an empty queue
    host_mib: float | None = None  # of trainings: the process's peak, above what its imports take
    equal_ms: float | None = None  # of as many layer evaluations as one step of all layers
    waited: float | None = None  # share of it in which a block was waited for
    of_kernels: float | None = None  # a step, as a multiple of its kernels' time
    note: str = ""

    def __str__(self) -> str:
        figures = [
            (self.ms_50, "{:9.3f} ms"),
            (self.of_copy, " {:5.2f} of copy"),
            (self.tflop_per_s, " {:8.3f} TFLOP/s"),
            (self.peak_mib, " {:8.1f} MiB"),
            (self.host_us, "{:9.1f} us of the host"),
            (self.host_mib, " {:8.1f} MiB of the host"),
            (self.equal_ms, "{:9.1f} ms for all layers"),
            (self.waited, ", {:.1%} waiting"),
            (self.of_kernels, "{:8.2f} of its kernels"),
        ]
        written = "".join(form.format(value) for value, form in figures if value is not None)
        return (
            f"{self.case:<34} {self.dtype:<9} {self.contender:<15} {self.direction:<9}{written}  {self.note}".rstrip()
        )

    def known(self) -> dict[str, Any]:
        """Return what is known, for the file."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def label(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def is_ours(contender: str) -> bool:
    """Whether a contender is this package's: "ours", "ours, 7 rounds"."""
    return contender.split(",")[0] == "ours"


def gather(path: Path) -> Document:
    """Return an op's document from its lines: the first says what ran where, others are rows, remarks or facts.

    A last line that was cut off is left out.
    """
    lines = [line for text in path.read_text().splitlines() if (line := _parsed(text)) is not None]
    document: Document = {**lines[0], "rows": []}
    remarks = [document["note"]] if document["note"] else []
    for line in lines[1:]:
        if "case" in line:
            document["rows"].append(line)
        elif "machine" in line:
            document["machine"] |= line["machine"]
        else:
            remarks.append(line["note"])
    return document | {"note": "; ".join(remarks), "rows": document.pop("rows")}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def documents(folder: Path) -> list[Document]:
    """Return what was measured in a machine's folder, by op; of runs that were cut off, the rows they left."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for path in folder.glob("*.jsonl"):
        first = _parsed(path.read_text().split("\n", 1)[0])
        if isinstance(first, dict) and "op" in first and "machine" in first:  # not a study's rows
            found[path.stem] = gather(path)
    return [document for _, document in sorted(found.items()) if "rows" in document]
