"""Machines that never speak: as many runs as there are blocks, each with its share of the steps, and their average."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusionblocks import DiffusionBlocks
from diffusionblocks.denoiser import Block, StemHead
from diffusionblocks.experiments.baselines.end_to_end import Rows
from diffusionblocks.experiments.tasks import Task
from diffusionblocks.experiments.tasks.base import Addresses
from diffusionblocks.targets.base import Features

Weights = dict[str, Tensor]


def soup(task: Task, machines: int) -> dict[str, Any]:
    """Train one network on so many machines; average the weights, and evaluate.

    Source: model soups, Wortsman et al. 2022, arXiv 2203.05482; here of runs that differ in their draws alone.
    """

    def mixed(states: list[Weights]) -> DiffusionBlocks:
        return loaded(task, {name: averaged([state[name] for state in states]) for name in states[0]})

    return judged(task, machines, mixed)


def ensemble(task: Task, machines: int) -> dict[str, Any]:
    """Train one network on so many machines; average their outputs at every level of noise, and evaluate.

    Raises: ValueError if the codebook is learnt: the machines' z would be points of different spaces.
    """
    if any(p.requires_grad for p in task.model().target.parameters()):
        raise ValueError("machines that are asked together need a fixed codebook, and this recipe learns it")

    def asked(states: list[Weights]) -> DiffusionBlocks:
        model = loaded(task, states[0])
        model.blocks[0] = Together([loaded(task, state) for state in states])
        return model

    row = judged(task, machines, asked)
    for split in ("val", "test"):
        if "layer_evaluations" in row[split]:  # which the task counts for one network
            row[split]["layer_evaluations"] *= machines
    return row


def judged(task: Task, machines: int, join: Any) -> dict[str, Any]:
    """Train so many machines from the same weights, each by its own batches and noise, for task.config.steps steps;
    evaluate the model that `join` makes of their weights."""
    began, rows = time.perf_counter(), Rows()
    start = {name: t.clone() for name, t in task.model().state_dict().items()}
    model = join([trained(task, start, task.config.seed + 1000 * i, rows) for i in range(machines)])
    seconds = time.perf_counter() - began
    scores = {split: task.evaluate(model.eval(), split) for split in ("val", "test")}
    return {
        "seconds": seconds,
        "memory": rows.peak,
        **{split: {k: v for k, v in score.items() if k != "levels"} for split, score in scores.items()},
    }


def trained(task: Task, start: Weights, seed: int, rows: Rows) -> Weights:
    """Return the averaged weights of a run that begins with the weights `start`."""
    own = type(task)(replace(task.config, seed=seed, offload=None, device="cpu"))
    own.__dict__["data"] = task.data  # a seed of its own would draw a validation split of its own
    model = own.model()
    model.load_state_dict(start)
    trainer = own.trainer(model, own.config)
    trainer.callbacks.append(rows)
    trainer.fit(Addresses(), batch=own.batches(trainer.device).batch, progress=False)
    with trainer.averages():
        return {name: t.clone() for name, t in model.state_dict().items()}


def loaded(task: Task, weights: Weights) -> DiffusionBlocks:
    """Return the task's model with these weights."""
    model = task.model()
    model.load_state_dict(weights)
    return model


def averaged(tensors: list[Tensor]) -> Tensor:
    """Return the mean of floating-point tensors, the first of others."""
    return torch.stack(tensors).mean(0) if tensors[0].is_floating_point() else tensors[0]


class Together(Block):
    """The only blocks of several models as one: their logits, or F, are averaged."""

    def __init__(self, models: list[DiffusionBlocks]):
        super().__init__(itertools.chain(*(model.blocks[0].layers for model in models)))
        self.models = torch.nn.ModuleList(models)

    def forward(self, x: Tensor, scaled: Tensor, c_noise: Tensor, shared: StemHead | None) -> Features:
        return Features(mean_output, [m.blocks[0](x, scaled, c_noise, m.stem_head) for m in self.models], None)


def mean_output(told: list[Features], cond: None) -> Tensor:
    """Return the mean of what the heads of several models say."""
    return torch.stack([head(h, own) for head, h, own in told]).mean(0)
