"""The study of forks: one network trained for all noise, then arms that go on from it, at equal extra compute.

Each arm trains on the same batches with the same noise, at two learning rates, of which the validation split chooses.
They are judged by their loss on the test split, at the same levels of noise with the same noise, as differences from
the lone network's (with the standard error of the mean difference over samples), and by the task's own measure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fork_arms import ARMS, LONE, Weights
from fork_training import Setting, setting_of, states, trained, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionblocks import DiffusionBlocks
from diffusionblocks.experiments.config import to_dict
from diffusionblocks.experiments.data.batches import prepare
from diffusionblocks.experiments.metrics.masked_diffusion import given
from diffusionblocks.experiments.tasks import Task
from diffusionblocks.experiments.tasks.masked_lm import MaskedLMTask

Row = dict[str, Any]
LEVELS = 12  # of noise, each for the same share of the training noise, at which losses are compared
SAMPLES = 2000  # of a split, at most


def samples(task: Any, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (x, y) of SAMPLES of a split, in an order of their own."""
    if isinstance(task, MaskedLMTask):
        y = task.windows(split)
        x = given(y)
    else:
        images = getattr(task.data, split)
        x, y = images.labels, prepare(images.images, task.data.mean, task.data.std, device=device)
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    return x[chosen].to(device), y[chosen].to(device)


@torch.no_grad()
def losses(setting: Setting, model: DiffusionBlocks, weights: list[Weights], split: str) -> Tensor:
    """Return the losses of a split's samples at LEVELS levels of noise, (N, LEVELS), float64; the noise is the same for
    all weights, which are those of the model's ranges."""
    x, y = samples(setting.task, split, setting.device)
    columns = []
    for i, sigma in enumerate(model.partition.draw_any((torch.arange(LEVELS) + 0.5) / LEVELS).tolist()):
        own, parts = weights[model.partition.owner(sigma)], []
        for k, (x_, y_) in enumerate(zip(x.split(500), y.split(500), strict=True)):
            level = torch.full(model.target.level_shape(y_), sigma, device=setting.device)
            parts.append(setting.loss(own, x_, y_, level, 10**9 + i + LEVELS * k)[0].double().cpu())
        columns.append(torch.cat(parts))
    return torch.stack(columns, 1)


def mean_and_error(values: Tensor) -> dict[str, Any]:
    """Return the mean over samples (dimension 0), and its standard error."""
    return {"mean": values.mean(0).tolist(), "error": (values.std(0) / math.sqrt(len(values))).tolist()}


def ranged(task: Task, finer: int) -> Task:
    """Return the task in blocks that share nothing, `finer` of them for each of its own, all of one size."""
    config, depth = task.config, max(task.config.layer_counts)
    blocks = config.blocks * finer
    sizes = dataclasses.replace(config.model, layers=depth * blocks)
    made = type(task)(config.in_blocks(blocks, model=sizes, shared="per_block", split=()))
    made.__dict__["data"] = task.data  # read once
    return made


def measured(task: Task, weights: list[Weights], device: torch.device) -> Row:
    """Return the task's own measure on the test split, of a model with these weights in its blocks."""
    model = task.model()
    names = dict(model.named_parameters())
    with torch.no_grad():
        for b, own in enumerate(weights):
            for name, t in own.items():
                inner = name.replace("blocks.0.", "", 1)
                names[f"blocks.{b}.{inner}"].copy_(t)
    row = task.evaluate(model.to(device).eval(), "test")
    return {name: value for name, value in row.items() if name not in ("levels", "loss")}


def fork(arm_name: str, task: Task, folder: Path, device: torch.device) -> Row:
    """Train an arm from the task's base, and judge it. folder: of the bases' states.

    Raises: ValueError if the lone network, which the others are compared with, wasn't trained first.
    """
    arm, setting = ARMS[arm_name], setting_of(task, device)
    ranges = ranged(task, arm.finer)
    model = ranges.model().to(device)
    key = hashlib.sha256(json.dumps(to_dict(replace(setting.task.config, out=Path()))).encode()).hexdigest()[:12]
    warm, cooled = states(key, setting, folder)
    began = time.perf_counter()
    tried = [
        (rate, made) for rate in arm.rates for made in trained(setting, model, arm, warm if arm.early else cooled, rate)
    ]
    seconds = (time.perf_counter() - began) / len(arm.rates)
    val = [float(losses(setting, model, weights, "val").mean()) for _, weights in tried]
    chosen = val.index(min(val))
    found = losses(setting, model, tried[chosen][1], "test")
    if arm_name == LONE:
        save_file({"losses": found}, folder / f"{key}_lone.safetensors")
    if not (folder / f"{key}_lone.safetensors").exists():
        raise ValueError(f"the arm {LONE!r} comes first: the others are compared with it")
    apart = found - load_file(folder / f"{key}_lone.safetensors")["losses"]
    return {
        "seconds": seconds,
        "rate": tried[chosen][0],
        "tried": val,
        "base": float(losses(setting, model, [weights_of(cooled)] * len(model.blocks), "test").mean()),
        "val": {"loss": min(val)},
        "test": {
            "loss": float(found.mean()),
            "against lone": mean_and_error(apart.mean(1)),
            "against lone by level": mean_and_error(apart),
            **measured(ranges, tried[chosen][1], device),
        },
    }
