"""One way to measure: check first, then time, beside a copy of the same bytes in the same run.

A speed is printed only if the op's correctness check passed in this run. Results go to
`benchmarks/results/<machine>/<op>.json` with versions and the command, so a figure can be traced and
repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import report
import torch

import dbkernels

ROOT = Path(__file__).parent


@dataclass
class Row:
    case: str
    dtype: str
    contender: str
    bytes_moved: int  # what the op must read and write once
    ms_20: float
    ms_50: float
    ms_80: float
    gb_per_s: float
    of_copy: float  # share of the bandwidth of a copy of as many bytes
    peak_mib: float  # above what was allocated before the call
    tflop_per_s: float | None = None  # of the work that can't be left out, where a bench says how much it is


def timed(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of single calls, after warm-up: the contenders take turns, so that what else the machine does falls
    on all of them. About `seconds` for each, at least 10 calls and at most 1000."""
    for call in calls.values():
        for _ in range(3):
            call()
    clock = _timed_cuda if device.type == "cuda" else _timed_cpu
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    for turn in range(1000):
        if turn >= 10 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(clock(call))
    return times


def _timed_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _timed_cuda(call: Callable[[], object]) -> float:
    """By CUDA events, with the L2 cache flushed before, so that each call reads memory."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush().zero_()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")


def percentiles(times: list[float]) -> tuple[float, float, float]:
    cut = statistics.quantiles(times, n=10)
    return cut[1], statistics.median(times), cut[7]


def _copy(bytes_moved: int, device: torch.device) -> Callable[[], object]:
    """A plain copy that reads and writes `bytes_moved` in all."""
    source = torch.zeros(max(1, bytes_moved // 2), dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _peak(call: Callable[[], object], device: torch.device) -> float:
    """MiB above what was allocated before the call, at its highest."""
    if device.type != "cuda":
        return _peak_cpu(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_cpu(call: Callable[[], object]) -> float:
    """By the profiler's record of every allocation, which sees inside compiled ops too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def measure(
    case: str,
    dtype: torch.dtype,
    contenders: dict[str, Callable[[], object]],
    bytes_moved: int,
    device: torch.device,
    seconds: float,
    flop: float | None = None,
) -> list[Row]:
    """Time each contender on one case. Call it only after the case's correctness check has passed."""
    times_of = timed({"copy": _copy(bytes_moved, device), **contenders}, device, seconds)
    copy = bytes_moved / percentiles(times_of.pop("copy"))[1] / 1e6
    rows = []
    for name, times in times_of.items():
        low, middle, high = percentiles(times)
        rate = bytes_moved / middle / 1e6
        peak = _peak(contenders[name], device)
        name_of_dtype = str(dtype).removeprefix("torch.")
        speed = None if flop is None else flop / middle / 1e9
        rows.append(Row(case, name_of_dtype, name, bytes_moved, low, middle, high, rate, rate / copy, peak, speed))
        print(f"{case:<28} {name_of_dtype:<9} {name:<9} {middle:9.3f} ms [{low:.3f}, {high:.3f}] "
              f"{rate:8.1f} GB/s  {rate / copy:5.2f} of copy  {peak:7.1f} MiB"
              + ("" if speed is None else f"  {speed:8.3f} TFLOP/s"), flush=True)  # fmt: skip
    return rows


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def speedups(rows: list[Row], ours: str = "ours") -> dict[str, dict[str, float]]:
    """How many times faster ours is than each other contender: geometric mean and worst case over all
    cases."""
    by_case: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        by_case.setdefault((row.case, row.dtype), {})[row.contender] = row.ms_50
    others = sorted({row.contender for row in rows} - {ours})
    result = {}
    for other in others:
        ratios = [case[other] / case[ours] for case in by_case.values() if other in case]
        result[other] = {"geometric_mean": geometric_mean(ratios), "worst": min(ratios)}
    return result


def options(description: str | None) -> argparse.Namespace:
    """The command line that every bench shares; sets the thread count."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each contender of each case")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: results/<machine>)")
    parser.add_argument("--note", default="", help="anything to record beside the figures")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def machine_facts(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # above the core count, other work shared the machine
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dbkernels": dbkernels.__version__,
        "kernels": dbkernels.kernels(),
        "built": dbkernels.compiled(),
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def default_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"cpu-{os.cpu_count()}core"


def save(op: str, rows: list[Row], device: torch.device, folder: Path | None, note: str = "") -> Path:
    """Write the rows, the machine and the speed-ups as JSON; print the speed-ups."""
    folder = folder or ROOT / "results" / default_machine(device)
    folder.mkdir(parents=True, exist_ok=True)
    gains = speedups(rows)
    for other, gain in gains.items():
        print(f"{op}: {gain['geometric_mean']:.2f}x {other} (geometric mean), {gain['worst']:.2f}x at worst")
    path = folder / f"{op}.json"
    document = {"op": op, "note": note, "machine": machine_facts(device), "speedup": gains}
    document["rows"] = [asdict(row) for row in rows]
    path.write_text(json.dumps(document, indent=1) + "\n")
    report.draw(document, path.with_suffix(".png"))
    print(f"wrote {path} and its picture")
    return path
