"""A tiny run of every task: trained by the library's tests on a GPU, and on the CPU beside."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tiny
import tiny_dit
import tiny_lm
from diffusionblocks.blocks import DiffusionBlocks
from diffusionblocks.experiments.config import TrainConfig
from diffusionblocks.experiments.models.masked_lm import MaskedLMConfig
from diffusionblocks.experiments.models.recurrent import RecurrentConfig
from diffusionblocks.experiments.tasks import TASKS, Task, task_of
from diffusionblocks.experiments.tasks.masked_lm import MaskedLMRun
from diffusionblocks.experiments.tasks.recurrent import RecurrentRun
from diffusionblocks.training.trainer import Trainer

SYMBOLS = 64  # of the embedded text
COMMON = dict(batch_size=8, baseline=(), visit=3, checkpoint_every=7, ema=0.9, lr=2e-3, warmup=0.2, offload="cpu")
CONFIGS: dict[str, TrainConfig] = {
    "vit": tiny.CONFIG,
    "dit": tiny_dit.CONFIG,
    "masked_lm": MaskedLMRun(model=MaskedLMConfig(dim=16, layers=3, mlp=24, cond=8), length=12, levels=3),
    # two streams: the noisy one's groups attend to the clean one
    "causal_lm": tiny_lm.config(
        replace(tiny_lm.KINDS["groups of 4"], vocab_size=SYMBOLS), combine="none", evaluated=384
    ),
    "recurrent": RecurrentRun(
        model=RecurrentConfig(dim=16, layers=2, heads=2, mlp=24, prelude=1, coda=1), size=6, evaluated=32
    ),
}
assert CONFIGS.keys() == TASKS.keys()


def config(name: str, out: Path, **changes: Any) -> TrainConfig:
    """Return the tiny run of a task, writing to `out`; blocks wait in host memory."""
    return replace(CONFIGS[name], **(COMMON | {"out": out} | changes))


def task(config_: TrainConfig) -> Task:
    """Return the task of a run; the data, which are the same for all, are loaded once."""
    made = task_of(config_)
    if isinstance(vars(type(made)).get("data"), functools.cached_property):
        vars(made)["data"] = _data(config_.architecture)
    return made


@functools.cache
def _data(name: str) -> Any:
    return task_of(CONFIGS[name]).data


def trainer(config_: TrainConfig, device: torch.device) -> Trainer:
    """Return a fresh trainer of a run, with the same weights on every device."""
    made = task(config_)
    return made.trainer(made.model(), replace(config_, device=str(device), folder=config_.out / "waiting"))


def run(trainer_: Trainer, *, until: int) -> list[float]:
    """Train up to step `until`; return the loss of every step, in order."""
    batches = task(trainer_.config).batches(trainer_.device)
    losses = []
    while trainer_.steps_done < until:
        losses.append(trainer_.step(*batches.batch(trainer_.batches_done)).loss)
    return [float(loss) for loss in losses]


def tensors(trainer_: Trainer) -> dict[str, torch.Tensor]:
    """Return everything that a trainer has learnt, copied to the host: weights, optimizer state, averages by name."""
    offloader = trainer_.offloader
    return {
        f"{part}/{name}": t.detach().to("cpu", copy=True)
        for part in offloader.parts
        for name, t in offloader.tensors(part).items()
    }


def resident(model: DiffusionBlocks) -> list[int]:
    """Return the blocks whose weights are in memory; one that waits on disk has an element per tensor."""
    sizes = [[p.untyped_storage().nbytes() >= p.nbytes for p in block.parameters()] for block in model.blocks]
    return [b for b, whole in enumerate(sizes) if all(whole)]
