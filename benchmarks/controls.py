"""Machines that never speak: as many runs as there are blocks, each with its share of the steps, and their average."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.experiments.baselines.end_to_end import Rows
from diffusionblocks.experiments.tasks import Task
from diffusionblocks.experiments.tasks.base import Addresses


def soup(task: Task, machines: int) -> dict[str, Any]:
    """Train one network on so many machines from the same weights, each by its own batches and noise, for
    task.config.steps steps; average the weights, and evaluate.

    Source: model soups, Wortsman et al. 2022, arXiv 2203.05482; here of runs that differ in their draws alone.
    """
    began, rows, mean = time.perf_counter(), Rows(), task.model()
    start = {name: t.clone() for name, t in mean.state_dict().items()}
    states = [trained(task, start, task.config.seed + 1000 * i, rows) for i in range(machines)]
    mean.load_state_dict({name: averaged([state[name] for state in states]) for name in start})
    seconds = time.perf_counter() - began
    scores = {split: task.evaluate(mean.eval(), split) for split in ("val", "test")}
    return {
        "seconds": seconds,
        "memory": rows.peak,
        **{split: {k: v for k, v in score.items() if k != "levels"} for split, score in scores.items()},
    }


def trained(task: Task, start: dict[str, Tensor], seed: int, rows: Rows) -> dict[str, Tensor]:
    """Return the averaged weights of a run that begins with the weights `start`."""
    own = type(task)(replace(task.config, seed=seed, offload=None, device="cpu"))
    model = own.model()
    model.load_state_dict(start)
    trainer = own.trainer(model, own.config)
    trainer.callbacks.append(rows)
    trainer.fit(Addresses(), batch=own.batches(trainer.device).batch, progress=False)
    with trainer.averages():
        return {name: t.clone() for name, t in model.state_dict().items()}


def averaged(tensors: list[Tensor]) -> Tensor:
    """Return the mean of floating-point tensors, the first of others."""
    return torch.stack(tensors).mean(0) if tensors[0].is_floating_point() else tensors[0]
