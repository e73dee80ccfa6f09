"""What quality costs, by FLOPs and by bytes: blocks, all layers end to end, one block's layers alone.

DBKERNELS_BACKEND=reference python benchmarks/flops.py vit-digits    (the counter sees PyTorch's own operators alone)

Quality and memory are those of the study "main"; FLOPs are counted on one step of each block, and on one sample.
"""

from __future__ import annotations

import sys

import tables
import torch
from torch.utils.flop_counter import FlopCounterMode
from variants import lone

from diffusionblocks.blocks import DiffusionBlocks
from diffusionblocks.experiments.baselines.end_to_end import Ordinary
from diffusionblocks.experiments.config import TrainConfig
from diffusionblocks.experiments.presets import RUNS
from diffusionblocks.experiments.tasks import Task, task_of


def training(task: Task, model: DiffusionBlocks, steps: int) -> float:
    """Return the FLOPs of so many steps, which the blocks take in turn."""
    x, y = task.batches(torch.device("cpu")).batch(0)
    counts = []
    for block in range(len(model.blocks)):
        model.activate(block)
        with FlopCounterMode(display=False) as counter:
            model.loss(block, x, y, seed=0, step=0).loss.backward()
        counts.append(counter.get_total_flops())
    return steps * sum(counts) / len(counts)


def inference(task: Task, model: DiffusionBlocks) -> float:
    """Return the FLOPs of a label; of other targets those of one sample at one noise level, by one block."""
    x, y = (t[:1] for t in task.batches(torch.device("cpu")).batch(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(model, Ordinary):
            model.network(x)
        elif task.config.architecture == "vit":
            model.eval()(x)
        else:
            model.loss(0, x, y, seed=0, step=0)
    return counter.get_total_flops()


def models(base: TrainConfig) -> dict[str, tuple[Task, DiffusionBlocks, int]]:
    """Return by variant a task, its model and its steps."""
    (name, alone), task = next(iter(lone(base).items())), task_of(base)
    network, whole = task.network(), type(task)(base.in_one_block())
    ordinary = whole.model() if network is None else Ordinary(network)
    return {
        f"B={base.blocks}": (task, task.model(), base.total_steps),
        "end-to-end": (whole, ordinary, base.end_to_end_steps),
        name: (task_of(alone), task_of(alone).model(), alone.total_steps),
    }


def report(run: str) -> str:
    """Return the table of a run."""
    base = RUNS[run][1]
    groups = tables.gather(tables.RESULTS / f"{run}_main.jsonl".replace("-", "_"))
    quality, column = next(iter(tables.COLUMNS[base.architecture].items()))
    made = [["training", quality, "training, TFLOP", "device, MB", "inference, MFLOP", "weights, millions"]]
    for name, (task, model, steps) in models(base).items():
        rows, weights = groups[name], sum(p.numel() for p in model.parameters()) / 1e6
        costs = [training(task, model, steps) / 1e12, inference(task, model) / 1e6]
        made.append([name, column(rows), f"{costs[0]:.3g}", tables.memory(rows), f"{costs[1]:.3g}", f"{weights:.2f}"])
    lines = ["| " + " | ".join(line) + " |" for line in made]
    return "\n".join([lines[0], "|---" * len(made[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(report(sys.argv[1]))
