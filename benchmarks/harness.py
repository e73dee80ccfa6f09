"""One way to measure: check each contender first, then time those that are right, beside a copy in the same run.

A speed is recorded only if the contender's results were right in this run; one that raises, is wrong or isn't installed
gets a row with a note and ends nothing. Every row is a line of JSON in `<folder>/<op>.jsonl` the moment it exists, so
that a run which is cut off leaves what it has; at the end `<folder>/<op>.json` is made of them. The command that
measured, versions, commit and date stand in the file, so that a figure can be traced and repeated.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timing
import torch
from facts import default_machine, host_peak_mib, machine_facts
from rows import Row, gather, is_ours, label
from timing import Call
from torch import Tensor

ROOT = Path(__file__).parent
PEERS_SLACK = 4  # a peer rounds where we don't: four times our tolerance
COMPILED = 3  # cases of an op that a GPU's run compiles: each takes seconds, even from the caches
Make = Callable[[], Call]


@dataclass
class Case:
    """Contenders on one input, made one after the other, and what they must give.

    moved: bytes that must be read and written once, by direction ("forward" and "backward", or "both"). exact: outputs
    and gradients in float64, of `pick`'s part of the results. unit: how far off ours may be, as a share of the largest
    exact value. flop: work that can't be left out, by direction. checked: contenders on a smaller input, to check in
    place of those that are timed; who isn't among them is timed unchecked.
    """

    contenders: dict[str, Make]
    moved: dict[str, int]
    exact: Callable[[], Sequence[Tensor]]
    unit: float
    flop: dict[str, float] | None = None
    checked: dict[str, Make] | None = None
    pick: Callable[[list[Tensor]], Sequence[Tensor]] = lambda results: results


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a call gives and "", or None and what went wrong, in a line."""
    try:
        return call(), ""
    except Exception as error:
        return None, complaint(error)


def complaint(error: Exception) -> str:
    """Return an error as a row's note."""
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")


def difference(results: Sequence[Tensor], exact: Sequence[Tensor], unit: float) -> str:
    """Say which result is further than `unit` times the largest value from the exact one; "" if none is."""
    if len(results) != len(exact):
        return f"wrong: {len(results)} results of {len(exact)}"
    for i, (a, b) in enumerate(zip(results, exact, strict=True)):
        if a.shape != b.shape:
            return f"wrong: result {i} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        error, limit = (a.double() - b).abs().max().item(), unit * b.abs().max().item()
        if not error <= limit:
            return f"wrong: error {error:.2g} against {limit:.2g} in result {i}"
    return ""


def release() -> None:
    """Give back what a contender left, before the next one needs the room."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class Bench:
    """One op's run: its file, and the rows that it writes there."""

    def __init__(self, op: str, options: argparse.Namespace):
        self.op, self.options, self.device = op, options, options.device
        self.count, self.on_host, self.ours_failed = 0, False, False
        self.folder: Path = options.out or ROOT / "results" / default_machine(options.device)
        self.path = self.folder / f"{op}.jsonl"
        if options.lock:
            import torch._inductor.compile_fx  # noqa: F401  (takes seconds: while another process measures)

            self.lock = options.lock.open("w")
            fcntl.flock(self.lock, fcntl.LOCK_EX)  # until the process ends
        signal.alarm(options.limit)  # ends the process, whatever it hangs in
        if not options.compile:
            self.folder.mkdir(parents=True, exist_ok=True)
            header = {"op": op, "note": options.note, "machine": machine_facts(self.device)}
            self.path.write_text(json.dumps(header) + "\n")

    def pick(self, *, cpu: Any, gpu: Any, quick: Any) -> Any:
        """Return the cases for this device and length of run."""
        return quick if self.options.quick else gpu if self.device.type == "cuda" else cpu

    def compiled(self, plain: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """Return it under torch.compile; on a GPU for the first cases and the host's, in the first one also tuned."""
        on_gpu = self.device.type == "cuda"
        if self.options.quick or (on_gpu and self.count > COMPILED and not self.on_host):
            return {}
        found = {"compile": torch.compile(plain, dynamic=False)}
        if on_gpu and self.count == 1:
            found["compile, tuned"] = torch.compile(plain, dynamic=False, mode="max-autotune-no-cudagraphs")
        return found

    def kernels(self, name: str, dtype: torch.dtype, build: Callable[[], Case]) -> None:
        """Measure kernel time and peak memory of a case; `build` makes it."""
        self._measure(name, dtype, build, self._kernel_rows)

    def host(self, name: str, dtype: torch.dtype, build: Callable[[], Case]) -> None:
        """Measure the host's time of a case: one of tiny tensors. After all cases of kernels."""
        self.on_host = True
        self._measure(name, dtype, build, self._host_rows)

    def record(self, name: str, dtype: torch.dtype, run: Callable[[], Row]) -> None:
        """Write the row of something that measures itself."""
        if self._mine(name):
            row, note = attempt(run)
            release()
            self.write(Row(name, label(dtype), "ours", note=note) if note else row)
            self.ours_failed |= bool(note)

    def _measure(
        self, name: str, dtype: torch.dtype, build: Callable[[], Case],
        write: Callable[[str, torch.dtype, Case, dict[str, Call]], None],
    ) -> None:  # fmt: skip
        if not self._mine(name):
            return
        release()
        torch._dynamo.reset()
        torch.manual_seed(0)
        case, note = attempt(build)
        if not note:
            calls, note = attempt(lambda: self._sound(name, dtype, case))
        if not note and calls and not self.options.compile:
            _, note = attempt(lambda: write(name, dtype, case, calls))
        if note:
            self._fail(name, dtype, "case", note)

    def _kernel_rows(self, name: str, dtype: torch.dtype, case: Case, calls: dict[str, Call]) -> None:
        copy, copied = timing.copy(sum(case.moved.values()), self.device)
        length = (3, 0.0) if self.options.quick else (10, self.options.seconds)
        times, errors = timing.kernel_times({"copy": copy, **calls}, self.device, *length)
        copy_rate = copied / timing.percentiles(times["copy", "both"])[1] / 1e6
        for contender, call in calls.items():
            peaks, note = attempt(lambda call=call: timing.peaks(call, self.device))
            if contender in errors or note:
                self._fail(name, dtype, contender, note or complaint(errors[contender]))
                continue
            for direction in call.directions:
                row = self._row(name, dtype, contender, direction, case, times[contender, direction], copy_rate)
                row.peak_mib, row.reserved_mib = peaks[direction]
                self.write(row)

    def _host_rows(self, name: str, dtype: torch.dtype, case: Case, calls: dict[str, Call]) -> None:
        times, errors = timing.host_times(calls, self.device, 10 if self.options.quick else 300)
        for contender, call in calls.items():
            if contender in errors:
                self._fail(name, dtype, contender, complaint(errors[contender]))
                continue
            for direction in call.directions:
                middle = 1e3 * timing.percentiles(times[contender, direction])[1]
                self.write(Row(name, label(dtype), contender, direction, host_us=middle))

    def note(self, text: str) -> None:
        """Record a remark beside the figures."""
        print(text, flush=True)
        self._append({"note": text})

    def finish(self) -> None:
        """Make the JSON of the lines. Raises: SystemExit if ours was wrong or failed anywhere."""
        if self.options.compile:
            return
        self._append({"machine": {"host_peak_mib": host_peak_mib()}})
        path = self.path.with_suffix(".json")
        path.write_text(json.dumps(gather(self.path), indent=1) + "\n")
        self.path.unlink()
        print(f"wrote {path}")
        if self.ours_failed:
            raise SystemExit(f"{self.op}: ours failed, see the notes above")

    def _sound(self, name: str, dtype: torch.dtype, case: Case) -> dict[str, Call]:
        """Make and check the contenders, one at a time: those that are right."""
        exact = [] if self.options.compile else case.exact()
        calls: dict[str, Call] = {}
        for contender, make in case.contenders.items():
            if self.options.compile and contender == "eager":
                continue  # nothing to compile, and the most memory
            call, note = self._checked(case, contender, make, exact)
            if note:
                self._fail(name, dtype, contender, note)
            else:
                calls[contender] = call
            release()
        return calls

    def _mine(self, name: str) -> bool:
        """Whether this process has the case: --only, --part."""
        self.count += 1
        part, parts = self.options.part
        return self.options.only in name and (self.count - 1) % parts == part - 1

    def _checked(self, case: Case, contender: str, make: Make, exact: Sequence[Tensor]) -> tuple[Call | None, str]:
        call, note = attempt(make)
        if note:
            return None, note
        if self.options.compile:  # fill the caches, forward and backward
            return call, attempt(call.results)[1]
        if case.checked is not None:
            if contender not in case.checked:
                return call, ""
            smaller, note = attempt(case.checked[contender])
            if note:
                return None, note
        else:
            smaller = call
        results, note = attempt(lambda: case.pick(smaller.results()))
        slack = 1 if is_ours(contender) else PEERS_SLACK
        return call, note or difference(results, exact, slack * case.unit)

    def _row(
        self, name: str, dtype: torch.dtype, contender: str, direction: str, case: Case, times: list[float],
        copy_rate: float,
    ) -> Row:  # fmt: skip
        low, middle, high = timing.percentiles(times)
        moved = case.moved.get(direction, 0)
        rate = moved / middle / 1e6 if moved and middle else None
        flop = (case.flop or {}).get(direction)
        return Row(
            name, label(dtype), contender, direction, moved, low, middle, high, rate,
            None if rate is None else rate / copy_rate, None if flop is None else flop / middle / 1e9,
        )  # fmt: skip

    def _fail(self, name: str, dtype: torch.dtype, contender: str, note: str) -> None:
        self.ours_failed |= is_ours(contender) or contender == "case"
        self.write(Row(name, label(dtype), contender, note=note))

    def write(self, row: Row) -> None:
        """Print a row and append it to the file."""
        print(row, flush=True)
        self._append(row.known())

    def _append(self, line: dict[str, Any]) -> None:
        if not self.options.compile:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def options(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line that every bench shares; set the thread count."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each contender of each case")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: results/<machine>)")
    parser.add_argument("--note", default="", help="anything to record beside the figures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one dtype, nothing compiled: does it run?")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument(
        "--compile", action="store_true", help="run every contender once, to fill the compilers' caches"
    )
    parser.add_argument("--part", default=(1, 1), type=part, metavar="I/N", help="every N-th case, from the I-th")
    parser.add_argument("--lock", type=Path, help="measure when no other process holds this file")
    parser.add_argument("--limit", type=int, default=0, help="seconds of measuring after which the process is ended")
    chosen = parser.parse_args(arguments)
    # more threads than free cores wait for one another, and tiny sizes have work for one
    torch.set_num_threads(1 if chosen.quick else chosen.threads)
    return chosen


def part(text: str) -> tuple[int, int]:
    """Return (1, 4) for "1/4"."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError(f"part {text} must be I/N with 1 <= I <= N")
    return i, n
