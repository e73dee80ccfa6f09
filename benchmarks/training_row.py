"""One row of bench_training.py, in a process of its own, which has its own peaks: a Spec as JSON in, a Row out."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import training_networks
import training_peers
from harness import complaint
from rows import Row
from training_rows import EACH, Network, Spec, spec_of

import diffusionblocks as db

VISIT = 25
STEPS = {"warm": 3, "timed": 10}
RATE = 1e-4


class Clock:
    """Times steps. On a GPU by events in its own order of work, so that nothing waits for the clock."""

    def __init__(self, device: torch.device):
        self.cuda, self.at = device.type == "cuda", list[Any]()

    def on_step_end(self, *_: Any) -> None:
        """Note the end of a step."""
        if not self.cuda:
            self.at.append(time.perf_counter())
            return
        self.at.append(torch.cuda.Event(enable_timing=True))
        self.at[-1].record()

    def ms(self, first: int) -> list[float]:
        """Return milliseconds of each step after the first ones."""
        marks = self.at[first - 1 :]
        if not self.cuda:
            return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def plain(spec: Spec, row: Row) -> None:
    """Measure training all layers at once, by a technique of others."""
    device, settings = torch.device(spec.device), spec.technique.settings
    network = training_networks.whole(spec.network, checkpoint=settings.get("checkpoint", False))
    batch = training_networks.batch(spec.network, device)
    with started(spec):
        optimizer = training_peers.place(network, device, settings, lr=RATE, visit=VISIT)
        clock = Clock(device)
        warm, timed = (1, 1) if spec.quick else (STEPS["warm"], STEPS["timed"])
        for step in range(warm + timed):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = network(*batch, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.on_step_end()
        row.ms_50 = row.equal_ms = statistics.median(clock.ms(warm))


def ours(spec: Spec, row: Row) -> None:
    """Measure training in blocks: two visits to warm up, then two that are timed, with the moves between them."""
    blocks, visit = spec.technique.settings["blocks"], 2 if spec.quick else VISIT
    with trained(spec, spec.network, visit=visit) as (trainer, batch):
        clock = Clock(trainer.device)
        trainer.callbacks.append(clock)
        visits = (1, 1) if spec.quick else (2, 2)
        for _ in range(sum(visits) * visit):
            trainer.step(*batch)
        times = clock.ms(visits[0] * visit)
        steady = statistics.median(times)
        row.ms_50, row.equal_ms = steady, blocks * sum(times) / len(times)
        row.waited = max(0.0, 1 - steady * len(times) / sum(times)) if blocks > 1 else None


def depth(spec: Spec, row: Row) -> None:
    """Measure the peaks of a network of some depth, over visits of a few of its blocks."""
    sizes = spec.network.sizes | {"layers": spec.technique.settings["layers"]}
    with trained(spec, dataclasses.replace(spec.network, sizes=sizes), visit=2) as (trainer, batch):
        for _ in range(4 if spec.quick else 16):
            trainer.step(*batch)


def kernels(spec: Spec, row: Row) -> None:
    """Measure a step of a small block against the sum of its kernels' time."""
    steps, layers = 10, spec.network.sizes["layers"]
    settings = {"blocks": layers // EACH, "offload": "cpu", "slots": 1}
    technique = dataclasses.replace(spec.technique, settings=settings)
    with trained(dataclasses.replace(spec, technique=technique), spec.network, visit=1000) as (trainer, batch):
        clock = Clock(trainer.device)
        for _ in range(20):
            trainer.step(*batch)
        trainer.callbacks.append(clock)
        for _ in range(2 * steps):
            trainer.step(*batch)
        row.ms_50 = statistics.median(clock.ms(1))
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                trainer.step(*batch)
            torch.cuda.synchronize()
        busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e3 / steps
        row.of_kernels = row.ms_50 / busy


def move(spec: Spec, row: Row) -> None:
    """Measure an exchange of blocks, each way, against copies of as many bytes each way at once."""
    with trained(spec, spec.network, visit=2) as (trainer, batch):
        for _ in range(6):
            trainer.step(*batch)
        offloader, seconds = trainer.offloader, []
        for _ in range(7):
            wait(trainer.device)
            began = time.perf_counter()
            offloader.activate((offloader.active + 1) % len(trainer.model.blocks))
            wait(trainer.device)
            seconds.append(time.perf_counter() - began)
        row.bytes_moved = sum(t.nbytes for t in offloader.parts["block_0"].moving().values())
        row.ms_50 = 1e3 * statistics.median(seconds[1:])
        row.gb_per_s = row.bytes_moved / row.ms_50 / 1e6
        row.of_copy = row.gb_per_s / copied(min(row.bytes_moved, 1 << 30), trainer.device)


def copied(count: int, device: torch.device) -> float:
    """Return GB/s each way of copies between page-locked memory and the device, both ways at once."""
    cuda = device.type == "cuda"
    hosts = [torch.ones(count, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
    devices = [torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) if cuda else None for _ in range(2)]
    seconds = []
    for _ in range(4):
        wait(device)
        began = time.perf_counter()
        with torch.cuda.stream(streams[0]) if cuda else contextlib.nullcontext():
            devices[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(streams[1]) if cuda else contextlib.nullcontext():
            hosts[1].copy_(devices[1], non_blocking=True)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return count / min(seconds) / 1e9


def wait(device: torch.device) -> None:
    """Wait for a GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def trained(spec: Spec, network: Network, *, visit: int) -> Iterator[tuple[db.Trainer, tuple[Any, Any]]]:
    """Return a trainer of a network by the spec's settings, and a batch; its files go with the context."""
    settings = {name: value for name, value in spec.technique.settings.items() if name not in ("blocks", "layers")}
    device = torch.device(spec.device)
    where = "meta" if spec.technique.kind == "depth" else "cpu"
    model = training_networks.in_blocks(network, spec.technique.settings["blocks"], where)
    batch = training_networks.batch(network, device)
    precision = "bfloat16" if device.type == "cuda" else "float32"
    common = {"visit": visit, "ema": 0.0, "lr": RATE, "log_every": 10**6, "precision": precision}
    with tempfile.TemporaryDirectory() as folder, started(spec):
        if settings["offload"] == "disk":
            settings["folder"] = Path(folder)
        yield db.Trainer(model, device=spec.device, **common, **settings), batch


@contextlib.contextmanager
def started(spec: Spec) -> Iterator[None]:
    """Return the context of the work on the device: when no other row works there, and for its limit at most."""
    with contextlib.ExitStack() as stack:
        if spec.lock:
            file = stack.enter_context(open(spec.lock, "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        signal.alarm(spec.limit)
        yield


def warm_up() -> None:
    """Import what a first step imports."""
    layer = torch.nn.Linear(4, 4)
    layer(torch.ones(4, 4)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def resident(name: str) -> float:
    """Return MiB of this process: "VmRSS", resident now, or "VmHWM", its peak."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) / 1024


def measure(spec: Spec) -> Row:
    """Return the row of a spec; a note in it if it failed."""
    device, kind = torch.device(spec.device), spec.technique.kind
    measures: dict[str, Callable[[Spec, Row], None]] = {
        "plain": plain, "ours": ours, "depth": depth, "kernels": kernels, "move": move,
    }  # fmt: skip
    row = Row(spec.case, "bfloat16" if device.type == "cuda" else "float32", spec.technique.name)
    warm_up()
    before = resident("VmRSS")
    try:
        measures[kind](spec, row)
    except ModuleNotFoundError as error:
        row.note = f"{error.name} isn't installed"
    except Exception as error:
        traceback.print_exc()
        row.note = complaint(error)
    if row.note:
        return row
    row.host_mib = resident("VmHWM") - before
    if device.type == "cuda":
        row.peak_mib, row.reserved_mib = (
            count / 2**20 for count in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        )
    return row


if __name__ == "__main__":
    print(json.dumps(measure(spec_of(json.loads(sys.argv[1]))).known()))
