"""A small run for scale.py's check: steps of a block, alone or in a mesh under torchrun, and sums of its gradients.

python benchmarks/scale_run.py GROUPS RANKS BATCH; prints JSON: ms of a step of each own block, ms of such a sum
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

import diffusionblocks as db

DIM, LAYERS, BLOCKS, STEPS = 768, 4, 2, 40


def model() -> db.DiffusionBlocks:
    """Return two blocks of two residual layers each."""
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(DIM, DIM), torch.nn.GELU()) for _ in range(LAYERS)]
    stem, head, target = torch.nn.Linear(64, DIM), torch.nn.Linear(DIM, 10), db.LabelTarget(10, 64)
    return db.from_layers(layers, stem=stem, head=head, target=target, blocks=BLOCKS, shared="per_block")


def main(groups: int, ranks: int, batch: int) -> None:
    """Time the steps of this process's blocks."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # else gradients near zero make a step up to four times slower, one block's alone
    mesh = (groups, ranks) if groups * ranks > 1 else None
    trainer = db.Trainer(model(), mesh=mesh, adapt=False, visit=10, seed=0, device="cpu", ema=0.0, log_every=10**6)
    x, y = torch.randn(batch, 64), torch.randint(10, (batch,))
    seconds: dict[int, list[float]] = {block: [] for block in sorted(trainer.own)}
    for _ in range(STEPS * BLOCKS):
        block, began = trainer.block, time.perf_counter()
        trainer.step(x, y)
        if block in trainer.own:
            seconds[block].append(time.perf_counter() - began)
    summed = 0.0
    if ranks > 1:
        gradients = torch.ones(sum(p.numel() for p in trainer.model.parts()["block_0"].parameters()))
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            dist.all_reduce(gradients)
            times.append(time.perf_counter() - began)
        summed = statistics.median(times)
    if int(os.environ.get("RANK", 0)) == 0:
        steps = [1e3 * statistics.median(times[STEPS // 4 :]) for times in seconds.values()]  # blocks may differ
        print(json.dumps({"steps": steps, "sum": 1e3 * summed}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
