"""Clocks: the time that kernels take, the time that the host takes to enqueue a call, and the memory at its peak.

Contenders take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDS = 1000  # at most
COPIED = 2**29  # bytes that a GPU's copy moves: past every cache


@dataclass(frozen=True)
class Call:
    """One contender on one case.

    forward: returns a tensor or several. leaves: gradients are taken of them, given `upstream` for the first outputs
    (none for a loss). Without leaves the call is clocked as a whole, in the direction "both".
    """

    forward: Callable[[], Any]
    leaves: Sequence[Tensor] = ()
    upstream: Sequence[Tensor] | None = None

    def outputs(self) -> tuple[Tensor, ...]:
        """Run forward."""
        outs = self.forward()
        return outs if isinstance(outs, tuple) else (outs,)

    def backward(self, outs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves, and free the graph."""
        count = 1 if self.upstream is None else len(self.upstream)
        return torch.autograd.grad(outs[:count], self.leaves, self.upstream)

    def results(self) -> list[Tensor]:
        """Return outputs, then gradients."""
        outs = self.outputs()
        grads = self.backward(outs) if self.leaves else ()
        return [t.detach() for t in (*outs, *grads) if isinstance(t, Tensor)]

    @property
    def directions(self) -> tuple[str, ...]:
        """What is clocked apart."""
        return ("forward", "backward") if self.leaves else ("both",)


Clocked = dict[tuple[str, str], list[float]]  # by contender and direction
Errors = dict[str, Exception]


def parts(call: Call, clock: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
    """Run a call with each direction in a clock of its own."""
    with clock(call.directions[0]):
        outs = call.outputs()
    if call.leaves:
        with clock("backward"):
            call.backward(outs)


def in_turns(calls: dict[str, Call], least: int, seconds: float, run: Callable[[str, Call], None]) -> Errors:
    """Run the calls in rounds, `least` of them or for about `seconds` a call. A call that raises is out."""
    errors: Errors = {}
    end = time.perf_counter() + seconds * len(calls)
    for turn in range(ROUNDS):
        if turn >= least and time.perf_counter() > end:
            break
        for name in [name for name in calls if name not in errors]:
            try:
                run(name, calls[name])
            except Exception as error:
                errors[name] = error.with_traceback(None)  # whose frames hold tensors
    return errors


def kernel_times(calls: dict[str, Call], device: torch.device, least: int, seconds: float) -> tuple[Clocked, Errors]:
    """Milliseconds of each call: on a GPU the sum of its kernels' device time, on a CPU wall time."""
    in_turns(calls, 3, 0.0, lambda name, call: parts(call, lambda direction: contextlib.nullcontext()))
    if device.type == "cuda":
        return _device_times(calls, least, seconds)
    return _wall_times(calls, least, seconds, lambda: None)


def host_times(calls: dict[str, Call], device: torch.device, repeats: int) -> tuple[Clocked, Errors]:
    """Milliseconds that the host takes to enqueue each call behind an empty queue; on a CPU the whole call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    in_turns(calls, 10, 0.0, lambda name, call: parts(call, lambda direction: contextlib.nullcontext()))
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _wall_times(calls, repeats, 0.0, wait)
    finally:
        if collecting:
            gc.enable()


def _wall_times(calls: dict[str, Call], least: int, seconds: float, wait: Callable[[], None]) -> tuple[Clocked, Errors]:
    times: Clocked = {(name, direction): [] for name, call in calls.items() for direction in call.directions}

    @contextlib.contextmanager
    def clock(name: str, direction: str) -> Iterator[None]:
        wait()
        start = time.perf_counter()
        yield
        times[name, direction].append(1e3 * (time.perf_counter() - start))

    errors = in_turns(calls, least, seconds, lambda name, call: parts(call, functools.partial(clock, name)))
    return times, errors


def _device_times(calls: dict[str, Call], least: int, seconds: float) -> tuple[Clocked, Errors]:
    """By torch.profiler. A spinning kernel before and after each part marks where its kernels begin and end, which
    needs no common clock of host and device."""
    labels: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def clock(name: str, direction: str) -> Iterator[None]:
        _flush().zero_()  # the L2 cache holds nothing of the call before
        torch.cuda._sleep(1)
        try:
            yield
        finally:  # a call that raises leaves its marks in pairs
            torch.cuda._sleep(1)
            labels.append((name, direction))

    def run(name: str, call: Call) -> None:
        parts(call, functools.partial(clock, name))
        torch.cuda.synchronize()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        errors = in_turns(calls, min(least, 50), seconds, run)
        torch.cuda.synchronize()
    sums = between_marks([(e.start_ns(), e.duration_ns(), e.name()) for e in _on_device(profile)])
    if len(sums) != len(labels):
        raise RuntimeError(f"the profiler saw {len(sums)} marked parts of {len(labels)}: no timing")
    times: Clocked = {(name, direction): [] for name, call in calls.items() for direction in call.directions}
    for label, nanoseconds in zip(labels, sums, strict=True):
        times[label].append(nanoseconds / 1e6)
    return times, errors


def _on_device(profile: Any) -> list[Any]:
    """Return the profiler's events of kernels, copies and fills."""
    events = profile.profiler.kineto_results.events()
    return [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()]


def between_marks(events: Sequence[tuple[int, int, str]]) -> list[int]:
    """Sum the durations of (start, duration, name) between the first mark and the second, the third and the fourth."""
    sums: list[int] = []
    inside = False
    for _, duration, name in sorted(events):
        if "spin_kernel" in name:
            inside = not inside
            if inside:
                sums.append(0)
        elif inside:
            sums[-1] += duration
    return sums


@functools.cache
def _flush() -> Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")


def copy(bytes_moved: int, device: torch.device) -> tuple[Call, int]:
    """Return a plain copy and the bytes that it reads and writes: on a CPU as many as the op's, on a GPU enough that
    its start doesn't count."""
    half = max(1, (COPIED if device.type == "cuda" else bytes_moved) // 2)
    source = torch.zeros(half, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return Call(lambda: target.copy_(source)), 2 * half


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th."""
    cut = statistics.quantiles(times, n=10)
    return cut[1], statistics.median(times), cut[7]


def peaks(call: Call, device: torch.device) -> dict[str, tuple[float, float | None]]:
    """Return MiB allocated, and on a GPU reserved, above what was there before the call, by direction."""
    found = {}
    tracker = _peak_cuda if device.type == "cuda" else _peak_cpu
    with tracker() as so_far:
        outs = call.outputs()
        found[call.directions[0]] = so_far()
        if call.leaves:
            call.backward(outs)
            found["backward"] = so_far()
    return found


Peak = Callable[[], tuple[float, "float | None"]]


@contextlib.contextmanager
def _peak_cuda() -> Iterator[Peak]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()

    def so_far() -> tuple[float, float | None]:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved
        torch.cuda.reset_peak_memory_stats()
        return peak[0] / 2**20, peak[1] / 2**20

    yield so_far


@contextlib.contextmanager
def _peak_cpu() -> Iterator[Peak]:
    """By the profiler's record of every allocation, which sees inside compiled ops too."""
    held = 0

    def start() -> Any:
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        profile.start()
        return profile

    profile = start()

    def so_far() -> tuple[float, float | None]:
        nonlocal held, profile
        profile.stop()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        peak = held
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        profile = start()
        return peak / 2**20, None

    try:
        yield so_far
    finally:
        profile.stop()
