"""The device's work of one step: noise, loss, backward pass, clipping, optimizer and averages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import dbkernels

from ..denoiser import BlockLoss
from ..offload import checks
from ..offload.memory import Usage
from .activations import saving
from .optimizer import clipped_step, gradients_of
from .precision import autocast, generators_of

if TYPE_CHECKING:
    from .trainer import Trainer


class StepOutput(NamedTuple):
    """One batch's step: the block trained, its loss (0-dim, on the device, without gradient; in a mesh, of this
    process's rows), and the gradients' norm before clipping, None where the batch was accumulated without an update."""

    block: int
    loss: Tensor
    grad_norm: Tensor | None


class Batch(NamedTuple):
    """Conditioning x, targets y and their noise levels sigma, on the device."""

    x: Tensor
    y: Tensor
    sigma: Tensor


class Numbers(NamedTuple):
    """What else changes from step to step: Python's numbers, or 0-dim tensors that a CUDA graph reads anew.

    step: Updates so far. block: The active one. offset: Batches so far, the offset of the noise.
    key: Stream of the noise, int64, and rates: learning rates of the active optimizers' groups, float64; on the device,
        or None for those of the settings.
    """

    step: float | Tensor
    block: float | Tensor
    offset: int | Tensor
    key: Tensor | None = None
    rates: Sequence[Tensor] | None = None


class Work(NamedTuple):
    """What came of it. norm: of the gradients, None without an update; usage: bytes on the device, if asked for."""

    loss: BlockLoss
    norm: Tensor | None
    usage: Usage | None


def run(
    trainer: Trainer, block: int, batch: Batch, numbers: Numbers, losses: list[BlockLoss], *, counted: bool
) -> Work:
    """Do a batch's work; after the last batch of a step, update.

    Args:
        losses: Of the step's batches so far; this one's is appended.
        counted: Also count the bytes on the device before the update.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("a step needs gradients: call it outside torch.no_grad() and torch.inference_mode()")
    trainer.watch.look(batch.x, batch.y)
    try:
        loss, activations = _forward(trainer, block, batch, numbers, counted)
    except RuntimeError:
        check_trained(trainer, block)  # e.g. a block that was made half: that is said rather than what came of it
        raise
    usage = norm = None
    try:
        loss.loss.backward()
        loss = loss._replace(loss=loss.loss.detach())
        if trainer.meter and loss.error is not None:
            trainer.meter.update(loss.sigma.flatten(), loss.error.flatten())
        losses.append(loss)
        if len(losses) == trainer.config.accumulate:
            usage = trainer.offloader.usage().with_(activations=activations) if counted else None
            norm = _update(trainer, block, numbers, losses)
    except BaseException:  # parts of the gradient may be added: the step begins anew
        trainer.batches_done -= trainer.batches_done % trainer.config.accumulate
        raise
    return Work(loss, norm, usage)


def check_trained(trainer: Trainer, block: int) -> None:
    """Raise RuntimeError if a step of this block has other parameters than its optimizers, or in another dtype."""
    for name in ("shared", f"block_{block}"):
        checks.check_trained(name, trainer.offloader.parts[name])


def pass_over(trainer: Trainer) -> StepOutput:
    """Count a batch of a block that is trained elsewhere."""
    nan = torch.tensor(float("nan"))
    trainer.batches_done += 1
    updates = trainer.batches_done % trainer.config.accumulate == 0
    output = StepOutput(trainer.block, nan, nan if updates else None)
    if updates:
        trainer.steps_done += 1
        trainer.call("on_step_end", output)
    return output


def _forward(trainer: Trainer, block: int, batch: Batch, numbers: Numbers, counted: bool) -> tuple[BlockLoss, int]:
    """Return the loss, and the bytes that it saves for the backward pass if they are counted."""
    model, config = trainer.model, trainer.config
    ranks = trainer.mesh.ranks
    options: dict[str, Any] = {} if numbers.key is None else {"key": numbers.key}
    if ranks > 1:
        options["rows"] = trainer.mesh.rows(len(batch.x))
    with autocast(trainer.device, config.precision), saving(model, block, config, count=counted) as saved:
        loss = model.loss_at(
            block, *batch, seed=config.seed, step=numbers.offset, weight=1 / (config.accumulate * ranks),
            error=trainer.meter is not None, **options,
        )  # fmt: skip
    return loss, saved.bytes if saved else 0


def _update(trainer: Trainer, block: int, numbers: Numbers, losses: Sequence[BlockLoss]) -> Tensor:
    active, given = trainer.active_optimizers(block), iter(numbers.rates or ())
    groups = [group for optimizer in active for group in optimizer.param_groups]
    params = [p for group in groups for p in group["params"]]
    _check_buffers(trainer, block)
    trainer.mesh.sum(params)
    norm = dbkernels.total_norm(gradients_of(params))
    for optimizer in active:
        rates = None if numbers.rates is None else [next(given) for _ in optimizer.param_groups]
        clipped_step(optimizer, norm, trainer.config.clip, rates)
        optimizer.zero_grad(set_to_none=True)
    trainer.watch.update(numbers.step, numbers.block, losses, norm)
    return norm


def _check_buffers(trainer: Trainer, block: int) -> None:
    """Raise ValueError if a block's first step left other buffers on other ranks."""
    visit, rest = divmod(trainer.steps_done, trainer.config.visit)
    if visit < len(trainer.model.blocks) and not rest:
        parts = trainer.offloader.parts
        trainer.mesh.check_buffers({n: parts[n].module for n in ("shared", f"block_{block}")}, trainer.device)


@contextlib.contextmanager
def restored(trainer: Trainer, block: int) -> Iterator[None]:
    """If it raises, put back what half a step has changed: buffers, attributes, optimizer state, generators."""
    parts = [trainer.offloader.parts[name] for name in ("shared", f"block_{block}")]
    modules = [module for part in parts for module in part.module.modules()]
    tables: list[Any] = [table for module in modules for table in (module._buffers, vars(module))]
    tables = [(table, dict(table)) for table in tables]
    states = [part.optimizer.state for part in parts if part.optimizer]
    tables += [(state, {p: dict(entries) for p, entries in state.items()}) for state in states]
    written = [b for module in modules for b in module._buffers.values() if b is not None]
    written += [trainer.watch.first_bad, trainer.watch.bad_batch, *([trainer.meter.sums] if trainer.meter else [])]
    values = [(t, t.data, t.clone()) for t in written]
    drawn = [(generator, generator.get_state()) for generator in generators_of(trainer.device)]
    try:
        yield
    except BaseException:
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for t, data, value in values:
            t.data = data
            t.copy_(value)
        for generator, drawn_before in drawn:
            generator.set_state(drawn_before)
        for optimizer in trainer.active_optimizers(block):
            optimizer.zero_grad(set_to_none=True)
        raise
