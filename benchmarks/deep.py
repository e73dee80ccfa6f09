"""A network of a thousand layers, trained under a cap on memory that all of them at once exceed a hundredfold.

python benchmarks/deep.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest

On the CPU the cap is the kernel's, on all private memory of the process that trains, Python's and PyTorch's own
included (RLIMIT_DATA); blocks wait on disk, and their layers are made on the meta device, so that all of them are never
there. On a GPU the cap is the allocator's, and blocks wait on the host. What all layers at once take is db.plan's for
B = 1, of two shallow networks, extended in a line that a third one must lie on; half as many layers more than should
fit by that are tried under the cap.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import harness
import torch
from rows import Row
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.offload.memory import readable


@dataclass(frozen=True)
class Sizes:
    """A network, its batch, how it is trained, and MiB that it may take."""

    layers: int
    dim: int
    batch: int
    visit: int
    rounds: int
    cap: int


SIZES = {
    "cpu": Sizes(layers=1000, dim=64, batch=20480, visit=1, rounds=2, cap=576),
    "cuda": Sizes(layers=1000, dim=256, batch=65536, visit=5, rounds=2, cap=1024),
    "quick": Sizes(layers=12, dim=16, batch=2048, visit=2, rounds=2, cap=512),
}


class Layer(nn.Module):
    """A residual MLP, scaled by the noise level's conditioning."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(dim), nn.Linear(8, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return h + self.down(nn.functional.gelu(self.up(self.norm(h) * (1 + self.scale(cond)))))


def network(sizes: Sizes, layers: int, blocks: int, where: str) -> db.DiffusionBlocks:
    """Return an untrained network. where: the device that its layers are made on."""
    torch.manual_seed(0)
    with torch.device(where):
        made = [Layer(sizes.dim) for _ in range(layers)]
    return db.from_layers(
        made, stem=nn.Linear(8, sizes.dim), head=nn.Linear(sizes.dim, 4),
        target=db.LabelTarget(num_classes=4, dim=sizes.dim), blocks=blocks, cond=8,
    )  # fmt: skip


def batch(sizes: Sizes, step: int, device: str) -> tuple[Tensor, Tensor]:
    """Return points and their classes, by the signs of two products, which no linear map finds."""
    x = torch.randn(sizes.batch, 8, generator=torch.Generator().manual_seed(step))
    y = 2 * (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] * x[:, 3] > 0).long()
    return x.to(device), y.to(device)


def needed(sizes: Sizes, device: str) -> tuple[float, float, float]:
    """Return bytes that all layers at once take, those of a layer, and how far a third depth is off the line."""
    totals = []
    for layers in (4, 8, 24):
        model = network(sizes, layers, 1, "cpu")
        totals.append(db.plan(model, batch(sizes, 0, "cpu"), device=device, ema=0.0).rows[1].total)
    each = (totals[1] - totals[0]) / 4
    line = totals[0] + each * 20
    return totals[0] + each * (sizes.layers - 4), each, abs(totals[2] - line) / totals[2]


def cap(sizes: Sizes, device: str) -> None:
    """Let this process have no more memory than the cap."""
    if device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (sizes.cap << 20, sizes.cap << 20))
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((sizes.cap << 20) / total, device)


def train(sizes: Sizes, layers: int, blocks: int, device: str) -> dict[str, Any]:
    """Train under the cap. Returns the mean loss of each round's first and last steps of all visits, and the peaks."""
    cap(sizes, device)
    steps, losses = sizes.visit * sizes.rounds * blocks, []
    offload = None if blocks == 1 else "disk" if device == "cpu" else "cpu"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = db.Trainer(
            network(sizes, layers, blocks, "cpu" if blocks == 1 else "meta"), device=device, offload=offload,
            folder=folder if offload == "disk" else None, visit=sizes.visit, lr=1e-2, ema=0.0, log_every=10**9,
        )  # fmt: skip
        for step in range(steps):
            losses.append(trainer.step(*batch(sizes, step, device)).loss.item())
    of_round = sizes.visit * blocks
    rounds = [statistics.mean(losses[i : i + of_round]) for i in range(0, steps, of_round)]
    rate = time.perf_counter() - began
    peaks = {"device": torch.cuda.max_memory_allocated()} if device != "cpu" else {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first": statistics.mean(losses[: sizes.visit]), "rounds": rounds, "seconds": rate, "host": host, **peaks}


def apart(size: str, layers: int, blocks: int, device: str) -> dict[str, Any]:
    """Return `train` of a process of its own, or {"failed": why}."""
    # the allocator keeps nothing that is free: the cap would count it
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    asked = json.dumps([size, layers, blocks, device])
    done = subprocess.run([sys.executable, __file__, "--child", asked], env=env, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row_of(bench: harness.Bench, size: str) -> Row:
    """Train the deep network; try all layers at once under the same cap."""
    sizes, device = SIZES[size], str(bench.device)
    total, each, error = needed(sizes, device)
    times = total / (sizes.cap << 20)
    bench.note(
        f"{sizes.layers} layers at once would take {readable(total)}, {times:.0f} times the cap of {sizes.cap} MiB: "
        f"db.plan of 4 and 8 layers, {readable(each)} each; 24 layers are {error:.2%} off that line"
    )
    if size != "quick":
        many = round(1.5 * (sizes.cap << 20) / each)
        whole = apart(size, many, 1, device)
        outcome = f"fail: {whole['failed'][:120]}" if "failed" in whole else "train"
        bench.note(f"{many} layers at once under the cap {outcome}")
    ours = apart(size, sizes.layers, sizes.layers, device)
    row = Row(f"{sizes.layers} layers under {sizes.cap} MiB", "float32", "ours")
    if "failed" in ours:
        row.note = ours["failed"]
        return row
    row.host_mib = ours["host"] / 2**20
    row.peak_mib = ours["device"] / 2**20 if "device" in ours else None
    row.ms_50 = 1e3 * ours["seconds"] / (sizes.layers * sizes.visit * sizes.rounds)
    rounds = ", ".join(f"{loss:.3f}" for loss in ours["rounds"])
    row.note = f"mean loss of all blocks by round of {sizes.visit} steps each: {rounds}; all at once: {times:.0f} times"
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the row."""
    bench = harness.Bench("deep", harness.options(__doc__, arguments))
    size = "quick" if bench.options.quick else bench.device.type
    bench.record("deep", torch.float32, lambda: row_of(bench, size))
    bench.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, layers, blocks, device = json.loads(sys.argv[2])
        print(json.dumps(train(SIZES[name], layers, blocks, device)))
    else:
        main()
