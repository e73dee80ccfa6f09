"""Block-wise training, written out: one step is noise, one block's loss, that block's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

import dbkernels

from ..blocks import BlockLoss, DiffusionBlocks
from ..noise.density import Tabulated
from ..noise.information import InformationMeter
from ..noise.partition import Range
from ..noise.rng import stream
from ..training.memory import SavedTensors, Usage, allocated, reset_peak
from ..training.offload import Residency, handed
from ..training.optimizer import PartOptimizer, clip_gradients, learning_rate
from .config import TrainConfig

LOG_EVERY = 25


class Batches(Protocol):
    """Where training data comes from: batch number `step`, on the device."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]: ...


class NonFiniteLoss(RuntimeError):
    """Training met a loss or gradient that isn't a number; no checkpoint was written after it."""


class Session:
    """All that block-wise training holds: model, optimizers, residency, noise meter, and how far it has come.

    device: where the active block trains. store, folder: where the others wait (see Residency).
    """

    def __init__(self, model: DiffusionBlocks, config: TrainConfig, *, device: torch.device, folder: Any = None):
        self.model, self.config, self.device = model, config, device
        self.step, self.seconds = 0, 0.0
        self.optimizers = {
            part: PartOptimizer(module.named_parameters(), weight_decay=config.weight_decay, ema_decay=config.ema)
            for part, module in model.parts().items()
        }
        where = store(config, device)
        self.residency = Residency(model, self.optimizers, device=device, store=where, folder=folder)
        density = model.partition.density
        self.meter = InformationMeter(density, device=device) if isinstance(density, Tabulated) else None
        self.changed = set(self.residency.parts)  # since the last checkpoint
        self.first_bad = torch.full((4,), -1.0, dtype=torch.float64, device=device)  # step, block, its sigmas' ends
        if config.compile:
            for block in model.blocks:
                block.compile()

    def watch(self, step: int, block: int, losses: list[BlockLoss], norm: Tensor) -> None:
        """Remember the first step whose loss or gradient isn't finite, without waiting for the device; of its
        micro-batches, the first whose loss isn't, or the levels of all."""
        low, high = (
            torch.stack(ends) for ends in zip(*(loss.sigma.double().aminmax() for loss in losses), strict=True)
        )
        bad = ~torch.stack([loss.loss for loss in losses]).isfinite()
        first, some = bad.int().argmax(), bad.any()
        low, high = torch.where(some, low.take(first), low.min()), torch.where(some, high.take(first), high.max())
        seen = torch.stack([torch.full_like(low, step), torch.full_like(low, block), low, high])
        self.first_bad = torch.where((some | ~norm.isfinite()) & (self.first_bad[0] < 0), seen, self.first_bad)

    def check(self) -> None:
        """Raise NonFiniteLoss if `watch` saw one. Waits for the device."""
        step, block, low, high = self.first_bad.tolist()
        level = self.model.target.level
        if step >= 0:
            raise NonFiniteLoss(
                f"the loss or gradient of block {block:.0f} is not finite at step {step:.0f} ({level} from {low:.4g} "
                f"to {high:.4g}); the last checkpoint is intact. Lower lr, raise warmup, or use precision='float32', "
                "and start again"
            )


def store(config: TrainConfig, device: torch.device) -> str:
    """Where waiting blocks are: where nothing else would free memory, on disk."""
    return ("disk" if device.type == "cpu" else "host") if config.store == "auto" else config.store


def train(
    session: Session, batches: Batches, *, on_log: Callable[[dict[str, Any]], None], on_step: Callable[[], None]
) -> None:
    """Train from `session.step` to the end of the config's steps.

    on_log gets a row of metrics every LOG_EVERY steps of a block; on_step is called after every step (checkpoints).
    Raises: NonFiniteLoss, naming block, step and sigma.
    """
    config, model, meter = session.config, session.model, session.meter
    warmup = max(1, round(config.warmup * config.total_steps))
    model.train()
    reset_peak(session.device)
    while session.step < config.total_steps:
        step = session.step
        block = 0 if step < config.trunk_steps else block_at(step, config)
        if step == config.trunk_steps > 0:
            branch(session)
        if meter and step % (config.visit * config.blocks) == 0:
            session.check()
            model.repartition(meter.density())
        session.residency.activate(block)
        torch.manual_seed(stream(config.seed, "layers", step) % 2**63)  # for dropout, if the layers have any

        logs, losses = step % LOG_EVERY == LOG_EVERY - 1 or step + 1 == config.total_steps, []
        for micro in range(step * config.accumulate, (step + 1) * config.accumulate):
            x, y = batches.batch(micro)
            voted, sigma = choose(model, block, y, config, micro)
            if voted != block:
                block = voted
                session.residency.activate(block)
            with autocast(config, x.device):
                made = handed(model, session.residency, block, x)
            with saved_tensors(model, block) if logs else nullcontext() as saved, autocast(config, x.device):
                share = 1 / config.accumulate
                loss = model.loss(block, x, y, seed=config.seed, step=micro, sigma=sigma, handed=made, weight=share)
            loss.loss.backward()
            losses.append(loss._replace(loss=loss.loss.detach()))
            if meter:
                meter.update(loss.sigma.flatten(), loss.error.flatten())
        usage = session.residency.usage().with_(activations=saved.bytes) if saved else None

        active = [session.optimizers[part] for part in ("shared", f"block_{block}")]
        norm = clip_gradients(active, config.clip)
        rate = learning_rate(step, steps=config.total_steps, peak=config.lr, warmup=warmup)
        for optimizer in active:
            optimizer.step(rate)
        session.watch(step, block, losses, norm)
        session.changed |= {"shared", f"block_{block}"}
        session.step += 1
        if usage:
            session.check()
            on_log(row(session, block, losses, norm, usage) | {"lr": rate})
        on_step()
    session.check()


def branch(session: Session) -> None:
    """Make every block a copy of block 0: weights, moments, average, count of updates; of its layers, if it has fewer.

    What block 0 lacks stays as it is. Source: Balaji et al. 2022 (eDiff-I), arXiv 2211.01324, section 4.1.
    """
    residency, optimizers = session.residency, session.optimizers
    for part in residency.parts.keys() - {"shared", "block_0"}:
        trunk = residency.tensors("block_0")
        own = residency.tensors(part).items()
        residency.load(part, {name: trunk.get(name, t).detach().to("cpu", copy=True) for name, t in own})
        optimizers[part].counts |= {
            n: c for n, c in optimizers["block_0"].counts.items() if n in optimizers[part].names
        }
        session.changed.add(part)


def block_at(step: int, config: TrainConfig) -> int:
    """Whose turn it is: every block once a round of visits, in an order drawn for the round. Depends on step alone."""
    turn = step // config.visit
    generator = torch.Generator().manual_seed(stream(config.seed, "round", turn // config.blocks))
    return int(torch.randperm(config.blocks, generator=generator)[turn % config.blocks])


def choose(model: DiffusionBlocks, block: int, y: Tensor, config: TrainConfig, step: int) -> tuple[int, Tensor]:
    """The block to train and its noise levels: before they branch, all levels.

    By "vote" (published) noise comes first and most of it decides.
    """
    shape = model.target.level_shape(y)
    if step < config.trunk_steps * config.accumulate:
        return block, model.draw_sigma(None, shape, seed=config.seed, step=step, device=y.device)
    if not config.votes:
        return block, model.draw_sigma(block, shape, seed=config.seed, step=step, device=y.device)
    u = dbkernels.philox_uniform(shape, seed=stream(config.seed, "vote"), offset=step, device=y.device)
    sigma = model.partition.draw_any(u)
    block = int(model.partition.block_of(sigma).mode().values)
    return block, model.give_context(sigma, seed=config.seed, step=step)


def row(session: Session, block: int, losses: list[BlockLoss], norm: Tensor, usage: Usage) -> dict[str, Any]:
    """Return a row of metrics for one step; its loss is the mean over the step's micro-batches."""
    partition = session.model.partition
    whole = Range(partition.sigma_min, partition.sigma_max)
    low, high = whole if session.step <= session.config.trunk_steps else partition.trained(block)
    peak, reserved = allocated(session.device)
    return {
        "step": session.step,
        "block": block,
        "sigma_low": low,
        "sigma_high": high,
        "loss": float(torch.stack([loss.per_sample.mean() for loss in losses]).mean()),
        "grad_norm": float(norm),
        "bytes": usage.by_category,
        "allocated": peak if session.device.type == "cuda" else usage.total,
        "reserved": reserved,
    }


def saved_tensors(model: DiffusionBlocks, block: int) -> Any:
    """Count what this step saves for its backward pass."""
    return SavedTensors([*model.blocks[block].parameters(), *model.parts()["shared"].parameters()]).count()


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """bfloat16 autocast where the config asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")
