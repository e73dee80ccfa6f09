"""Settings of a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .settings import take_types


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a Trainer; a step is one update of one block.

    Raises: ValueError on a setting out of range.
    """

    lr: float = 1e-3
    """Peak learning rate."""
    steps: int | None = None
    """Steps in all, at whose end the learning rate has fallen to zero along a cosine; None keeps it constant."""
    warmup: float = 0.0
    """Steps over which the learning rate rises; less than 1: as a share of all steps."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of a block's gradients; 0 doesn't clip."""
    ema: float = 0.99
    """Decay of the weights' moving average, which evaluation uses; 0 keeps none."""
    visit: int = 25
    """Steps that a block stays active before the next one's turn."""
    branch: float = 0.0
    """Share of the steps in which block 0 trains for all noise; then every block begins as its copy."""
    accumulate: int = 1
    """Batches per step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrices in bfloat16 with float32 masters, under autocast."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Of the default optimizer; bfloat16: half the memory, rounded stochastically."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    capture: bool | None = None
    """Run steps as CUDA graphs, where layers repeat the same work on the device: None on a GPU if it can be, True also
    warns if it can't be, False never. The bits are the same."""
    checkpoint_layers: bool = False
    """Keep each layer's input alone for the backward pass and run the layer once more there."""
    adapt: bool = True
    """Cut the noise anew as its information is measured; False: the partition stays (other densities never adapt)."""
    train_blocks: tuple[int, ...] | None = None
    """Train these blocks alone, others elsewhere, bit for bit as one trainer would train all: `merge` joins them."""
    mesh: tuple[int, int] | None = None
    """Under torchrun: groups of processes, each with its share of the blocks, and the processes of a group, which share
    each batch. Every process is given the whole batch."""
    offload: Literal["cpu", "disk", "auto"] | None = None
    """Where waiting blocks are: in host memory, on disk, or (None) on the device; auto: disk if that is the CPU."""
    folder: Path | None = None
    """Folder of waiting blocks' files, for offload="disk"; with others it isn't used."""
    slots: Literal[1, 2] = 1
    """Buffers on the device for blocks; 2: the next block comes, and the one before leaves, while one trains."""
    pin: bool = True
    """Page-lock host memory that a GPU copies from and to; False where the host forbids it."""
    device: str = "auto"
    """A torch device; auto: the GPU if there is one."""
    seed: int = 0
    """Of weights, noise, order and all other draws."""
    log_every: int = 25
    """Steps between rows of the log; each reads values from the device."""
    log_folder: Path | None = None
    """Folder for metrics.jsonl and the other loggers' files."""
    loggers: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Where rows go besides metrics.jsonl: "tensorboard", "wandb" (extras)."""

    def __post_init__(self) -> None:
        take_types(self)
        check_at_least(self, 1, "visit", "accumulate", "log_every", "steps")
        check_at_least(self, 0, "seed", "weight_decay", "clip", "warmup")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not 0 <= self.branch < 1:
            raise ValueError(f"branch must be a share of the steps in [0, 1), got {self.branch}")
        blocks, mesh = self.train_blocks, self.mesh
        if blocks is not None and not 0 < len(blocks) == len(set(blocks)):
            raise ValueError(f"train_blocks must be a tuple of different blocks, e.g. (0, 2), got {blocks!r}")
        if mesh is not None and min(mesh) < 1:
            raise ValueError(f"mesh must be two numbers, groups and processes of a group, e.g. (2, 4), got {mesh!r}")
        if self.slots == 2 and self.offload is None:
            raise ValueError("slots=2 is for blocks that wait elsewhere: set offload, too, or leave slots out")
        if self.total_steps is None and (self.branch or 0 < self.warmup < 1):
            raise ValueError("branch, and warmup as a share, are shares of all steps: set steps, too")

    @property
    def log_to(self) -> Path | None:
        """Folder that loggers write to."""
        return self.log_folder

    @property
    def total_steps(self) -> int | None:
        """Steps in all."""
        return self.steps

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return round(self.warmup * (self.total_steps or 0)) if self.warmup < 1 else int(self.warmup)

    @property
    def trunk_steps(self) -> int:
        """Steps of block 0 for all noise, before the blocks branch."""
        return min(round(self.branch * self.total_steps), self.total_steps - 1) if self.total_steps else 0

    def offload_from(self, device: torch.device) -> str | None:
        """Return where blocks wait that aren't on `device`: `offload`, and what "auto" stands for."""
        if self.offload != "auto":
            return self.offload
        return "disk" if device.type == "cpu" else "cpu"


def check_complete(
    config: TrainerConfig, device: torch.device, optimizer: Any, callbacks: Any, given: Iterable[str]
) -> None:
    """Raise unless a Trainer can be made: folders for what writes files, and a function for an optimizer of one's own.

    given: Names of settings that were given beside it.
    Raises: ValueError or TypeError, naming the argument.
    """
    for name, what in (("lr", "the learning rate"), ("moments", "the moments' dtype")):
        if optimizer is not None and name in given:
            raise ValueError(f"{name} and optimizer both set {what}: give it to the optimizer alone")
    if optimizer is not None and not callable(optimizer):
        raise TypeError(
            "optimizer must be a function that makes one from parameters, e.g. lambda params: "
            f"torch.optim.SGD(params, 0.1), got {str(optimizer)!r:.60}"
        )
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise TypeError(f"callbacks must be a list of objects, e.g. [Log()], got {type(callbacks).__name__}")
    if config.offload_from(device) == "disk" and config.folder is None:
        raise ValueError("offload='disk' needs a folder: folder=, for the files of waiting blocks")
    if config.log_to is None and set(config.loggers) - {"jsonl"}:
        raise ValueError(f"loggers={config.loggers} need log_folder, where they write")


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raise ValueError if one of these fields is less than `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")
