"""Rows of the training log, and where they go: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..denoiser import BlockLoss
from ..noise.partition import Range
from ..offload.memory import Usage, allocated
from .config import TrainerConfig

if TYPE_CHECKING:
    from .trainer import Trainer


def row(trainer: Trainer, block: int, losses: Sequence[BlockLoss], norm: Tensor, usage: Usage) -> dict[str, Any]:
    """Return a row about a step that was just made; its loss is the mean over the step's batches."""
    partition, config = trainer.model.partition, trainer.config
    whole = Range(partition.sigma_min, partition.sigma_max)
    low, high = whole if trainer.steps_done <= config.trunk_steps else partition.trained(block)
    peak, reserved = allocated(trainer.device)
    groups = {part: optimizer.param_groups for part, optimizer in trainer.optimizers.items()}
    return {
        "step": trainer.steps_done,
        "block": block,
        "sigma_low": low,
        "sigma_high": high,
        "loss": float(torch.stack([loss.per_sample.mean() for loss in losses]).mean()),
        "grad_norm": float(norm),
        "lr": float(next(g["lr"] for part in (f"block_{block}", "shared") for g in groups.get(part, []))),
        "bytes": usage.by_category,
        "allocated": peak if trainer.device.type == "cuda" else usage.total,
        "reserved": reserved,
    }


def loggers(config: TrainerConfig) -> list[Any]:
    """Return the callbacks that a config asks for: JSON lines wherever there is a log folder, others by name."""
    return [] if config.log_folder is None else named(("jsonl", *config.loggers), Path(config.log_folder))


def named(names: Sequence[str], folder: Path) -> list[Any]:
    """Return the loggers of these names, each once, writing to `folder`. Raises: ImportError without their extras."""
    kinds = {"jsonl": JsonLines, "tensorboard": TensorBoard, "wandb": WandB}
    if names:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"log_folder={str(folder)!r} can't be made: {error.strerror}") from error
    return [kinds[name](folder) for name in dict.fromkeys(names)]


class JsonLines:
    """Appends each row to metrics.jsonl, with the seconds since training began."""

    def __init__(self, folder: Path):
        self.path, self.began = folder / "metrics.jsonl", time.perf_counter()

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row | {"seconds": time.perf_counter() - self.began}) + "\n")


class TensorBoard:
    """Writes each row's numbers for TensorBoard. Raises: ImportError without the extra."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("loggers='tensorboard' needs: pip install 'diffusionblocks[tensorboard]'") from error
        self.writer = SummaryWriter(str(folder))

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()


class WandB:
    """Sends each row's numbers to Weights & Biases (WANDB_MODE=offline keeps them). Raises: ImportError without it."""

    def __init__(self, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("loggers='wandb' needs: pip install 'diffusionblocks[wandb]'") from error
        self.run = wandb.init(dir=str(folder), project="diffusionblocks")

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self.run.log(numbers(row), step=row["step"])


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return a row's numbers, each loss and norm also by its block: "loss/block_0"."""
    flat = {k: float(v) for k, v in row.items() if isinstance(v, (int, float))}
    flat |= {f"bytes/{k}": float(v) for k, v in row.get("bytes", {}).items()}
    return flat | {f"{k}/block_{row['block']}": flat[k] for k in ("loss", "grad_norm") if "block" in row}
