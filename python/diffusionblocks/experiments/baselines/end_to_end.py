"""The baselines of block-wise training: the same network end to end, tuned, and with activation checkpointing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...blocks import DiffusionBlocks
from ...denoiser import BlockLoss, StemHead
from ...noise.density import LogNormal
from ...noise.partition import make_partition
from ...offload.memory import SavedTensors
from ...targets.base import Target
from ...training.config import TrainerConfig
from ...training.finite import NonFiniteLoss
from ...training.progress import Progress, stage
from ...training.trainer import Trainer
from ..config import TrainConfig
from ..tasks.base import Addresses, Batches, Row, Task

Score = Callable[[str], Row]  # a split's scores


@dataclass(frozen=True)
class Result:
    """A baseline's scores, seconds of the chosen run, its peak bytes by category, the choice, and all choices tried."""

    name: str
    val: Row
    test: Row
    seconds: float
    memory: dict[str, int]
    choice: dict[str, float]
    tried: list[dict[str, float]]


class Ordinary(DiffusionBlocks):
    """An ordinary network as the one block of a Trainer: trained by its own loss(x, y, seed=, step=), at no noise."""

    def __init__(self, network: nn.Module):
        partition = make_partition(LogNormal(), 1)
        super().__init__(StemHead(nn.Identity(), nn.Identity()), [network], Target(1.0), partition)

    @property
    def network(self) -> Any:
        """The network."""
        return self.blocks[0].layers[0]

    def draw_sigma(self, block: int | None, shape: tuple[int, ...], *, device: torch.device, **_: Any) -> Tensor:
        """Return no noise."""
        return torch.zeros(1, device=device)

    def check(self, block: int, x: Tensor, y: Tensor) -> None:
        """Leave the batch to the network."""

    def loss_at(
        self, block: int, x: Tensor, y: Tensor, sigma: Tensor, *, seed: int, step: int, weight: float = 1.0, **_: Any
    ) -> BlockLoss:
        """Return the network's loss, a mean over the batch."""
        loss = self.network.loss(x, y, seed=seed, step=step)
        return BlockLoss(loss * weight, sigma, loss.detach(), None)


class Checkpointed(nn.Module):
    """A layer whose activations are recomputed in the backward pass."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.layer, *args, use_reentrant=False)


class Rows:
    """A trainer's callback that corrects the log's rows for a baseline and keeps their peak of bytes.

    recomputed: Bytes of activations that aren't saved but recomputed in the backward pass.
    """

    def __init__(self, recomputed: int = 0):
        self.recomputed, self.peak = recomputed, dict[str, int]()

    def on_log(self, trainer: Trainer, row: Row) -> None:
        if isinstance(trainer.model, Ordinary):
            del row["sigma_low"], row["sigma_high"]
        row["bytes"]["activations"] += self.recomputed
        if trainer.device.type != "cuda":  # where it is the sum of `bytes`
            row["allocated"] += self.recomputed
        self.peak = max(self.peak, row["bytes"], key=lambda bytes_: sum(bytes_.values()))


@dataclass(frozen=True)
class Attempt:
    """One training. score: evaluates its averaged weights on a split; val: on the validation split."""

    trainer: Trainer
    score: Score
    val: Row
    seconds: float
    memory: dict[str, int]


def end_to_end(
    task: Task,
    device: torch.device,
    *callbacks: Any,
    name: str = "end-to-end",
    choice: dict[str, float] | None = None,
) -> Result:
    """Train the task's network, all layers at once, for config.steps steps; tuned on the validation split.

    Args:
        callbacks: Of every Trainer.
        name: "checkpointing" recomputes activations in the backward pass; "shallow" is a network of one block's depth.
        choice: A learning rate and a warm-up, to skip the search.

    Raises: NonFiniteLoss if no choice gives a finite loss.
    """
    task = shallow(task) if name == "shallow" else task
    rates, warmups = task.config.tune_lr, task.config.tune_warmup
    if choice is not None:
        rates, warmups = (choice["lr"],), (choice["warmup"],)
    return tuned(name, task, lambda lr, warmup: attempt(name, task, device, lr, warmup, *callbacks), rates, warmups)


def shallow(task: Task) -> Task:
    """Return the same architecture with one block's layers."""
    return type(task)(task.config.in_one_block(max(task.config.layer_counts)))


def tuned(
    name: str, task: Task, run: Callable[[float, float], Attempt], rates: Sequence[float], warmups: Sequence[float]
) -> Result:
    """Return the result of the run(lr, warmup) that is best on the validation split.

    Every rate is tried at the first warm-up, then the other warm-ups at the best rate; ties go to the earlier one. The
    test split is evaluated once, for the best.
    Raises: NonFiniteLoss if no loss is finite.
    """
    tried: list[dict[str, float]] = []
    best: Attempt | None = None
    choice: dict[str, float] = {"lr": rates[0]}

    def look(lr: float, warmup: float) -> None:
        nonlocal best, choice
        tried.append({"lr": lr, "warmup": warmup, "val": float("nan")})
        try:
            new = run(lr, warmup)
        except NonFiniteLoss:
            if len(rates) * len(warmups) == 1:
                raise
            return
        value = tried[-1]["val"] = new.val[task.metric.key]
        if best is None or task.metric.better(value, best.val[task.metric.key]):
            best, choice = new, {"lr": lr, "warmup": warmup}

    for lr in rates:
        look(lr, warmups[0])
    for warmup in warmups[1:]:
        look(choice["lr"], warmup)
    if best is None:
        raise NonFiniteLoss(f"{name}: no learning rate of {rates} gave a finite loss; use lower ones")
    return Result(name, best.val, best.score("test"), best.seconds, best.memory, choice, tried)


def attempt(name: str, task: Task, device: torch.device, lr: float, warmup: float, *callbacks: Any) -> Attempt:
    """Train the task's network once: where there is no ordinary one, all layers as one block, for all noise."""
    network, whole = task.network(), type(task)(task.config.in_one_block())
    model = (whole.model() if network is None else Ordinary(network)).to(device)
    layers: Any = model.blocks[0].layers if network is None else network.layers
    batches, recomputed = task.batches(device), 0
    if name == "checkpointing":
        recomputed = saved_by_a_layer(model, layers[0], *batches.batch(0))
        for i, layer in enumerate(layers):
            layers[i] = Checkpointed(layer)

    def score(split: str) -> Row:
        return whole.evaluate(model, split) if network is None else task.score(network, split, device)

    settings = settings_of(task.config, device, steps=task.config.end_to_end_steps, lr=lr, warmup=warmup)
    return train(name, model, settings, batches, score, Rows(recomputed), *callbacks)


def settings_of(
    config: TrainConfig, device: torch.device, *, steps: int, warmup: float, **changes: Any
) -> TrainerConfig:
    """Return the Trainer's settings of a baseline, which keeps no files. warmup: a share of the steps."""
    values = {f.name: getattr(config, f.name) for f in fields(TrainerConfig)}
    own: Row = {"device": str(device), "branch": 0.0, "compile": False, "checkpoint_layers": False, "offload": "cpu"}
    own |= {"folder": None, "log_folder": None, "loggers": ()}
    return TrainerConfig(**values | own | {"steps": steps, "warmup": max(1, round(warmup * steps))} | changes)


def train(
    name: str,
    model: DiffusionBlocks,
    settings: TrainerConfig,
    batches: Batches,
    score: Score,
    rows: Rows,
    *callbacks: Any,
) -> Attempt:
    """Train a model to the end and evaluate its averages. Raises: NonFiniteLoss, naming the baseline."""
    named = f"{name}, lr {settings.lr:g}, warm-up {settings.warmup:g}"
    with Progress(settings.total_steps or 0, named) as bar:
        trainer, began = Trainer(model, settings, callbacks=[rows, *callbacks, bar]), time.perf_counter()
        try:
            trainer.fit(Addresses(), batch=batches.batch, progress=False)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{name}: {error}") from error
    seconds = time.perf_counter() - began

    def averaged(split: str) -> Row:
        with stage(f"{named}: evaluating on {split}"), trainer.averages():
            model.eval().activate(0)
            result = score(split)
        trainer.offloader.retire()  # the next attempt needs the device
        return result

    val = averaged("val")
    trainer.call("on_evaluated")
    return Attempt(trainer, averaged, val, seconds, rows.peak)


def saved_by_a_layer(model: DiffusionBlocks, layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return bytes that one layer saves: checkpointing recomputes them, a layer at a time."""
    inputs: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args))
    with torch.no_grad():
        model.loss(0, x, y, seed=0, step=0)
    hook.remove()
    with SavedTensors(model.parameters()).count() as saved:
        layer(*inputs[0])
    return saved.bytes
