"""A training step as one CUDA graph: recorded once for a place, replayed for every block that comes there.

A place is where the block's tensors are, and what its layers do: blocks alike that take turns in one slot of the
offloader share a graph. A place's first step runs as ever, the second with the numbers that a graph reads (`Tensors`),
the third is recorded. All are training steps; a graph changes no bit of them.
"""

from __future__ import annotations

import struct
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from ..blocks import DiffusionBlocks
from ..denoiser import BlockLoss
from ..noise.rng import stream
from ..offload.part import Part
from .cuda_graphs import Graphs, graphs_of
from .optimizer import BlockAdamW
from .place import Same, hooked, place_of
from .step import Batch, Numbers, Work, restored, run

if TYPE_CHECKING:
    from .trainer import Trainer

Key: TypeAlias = tuple[Hashable, ...]  # the number of a place, the kinds of a batch's tensors

SHAPES = 4  # of batches, that a place is recorded for
WARM_UP = 2  # steps of a place and a shape before one is recorded
MOST_PLACES = 8  # per block: two slots, before and after its optimizer's state is made, and again after a load


class Tensors:
    """The numbers of a step on the device, refreshed by one copy that the host doesn't wait for.

    Args:
        rates: The most learning rates that a step takes.
    """

    def __init__(self, rates: int, device: torch.device):
        self.table = torch.zeros(4 + rates, 2, dtype=torch.int64, device=device)  # 16 bytes each, as kernels like it
        self._format = "Q8xq8xd8xd8x" + "d8x" * rates
        (key, offset, *_), (_, _, step, block, *rate) = self.table[:, 0], self.table.view(torch.float64)[:, 0]
        self.numbers = Numbers(step, block, offset, key, rate)

    def fill(self, key: int, offset: int, step: int, block: int, rates: list[float]) -> None:
        """Replace the numbers."""
        unused = [0.0] * (len(self.table) - 4 - len(rates))
        packed = bytearray(struct.pack(self._format, key, offset, step, block, *rates, *unused))
        host = torch.frombuffer(packed, dtype=torch.int64).view_as(self.table)
        self.table.copy_(host.pin_memory() if self.table.is_cuda else host, non_blocking=True)


class Recording(NamedTuple):
    """A step's graph, the batch that it reads, and what it writes."""

    replay: Callable[[], None]
    batch: Batch
    work: Work


class Capture:
    """Does a trainer's steps, by graphs where that can be; if not, one warning says why."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.graphs = graphs_of(trainer.device) if trainer.config.capture is not False else None
        self._visit: tuple[object, int] = None, -1
        self._places: dict[Hashable, int] = {}
        self._tries: Counter[Key] = Counter()
        self._recordings: dict[Key, Recording] = {}
        if trainer.config.capture is not False and (reason := _obstacle(trainer, self.graphs)):
            self.graphs = None
            if trainer.config.capture:
                self._refuse(reason)
        elif self.graphs:
            self._tensors = Tensors(_most_rates(trainer), trainer.device)

    def run(self, block: int, batch: Batch, losses: list[BlockLoss], *, counted: bool) -> Work:
        """Do a batch's work, as `step.run` does."""
        trainer = self.trainer
        rates, key = trainer.set_rates(block), self._key(block, batch) if self.graphs else None
        step, offset = trainer.steps_done, trainer.batches_done
        if key is not None:
            self._tensors.fill(stream(trainer.config.seed, "eps", block), offset, step, block, rates)
            by_tensors = self._rehearse if self._tries[key] == WARM_UP else self._replay
            if (work := by_tensors(key, block, batch, losses, counted)) is not None:
                return work
        return run(trainer, block, batch, Numbers(step, block, offset), losses, counted=counted)

    def _key(self, block: int, batch: Batch) -> Key | None:
        """Return what a step's graph is known by; None if this step is to be made without one."""
        if (place := self._place(block)) is None:
            return None
        key = place, *((t.dtype, t.shape, t.stride()) for t in batch)
        if key in self._recordings:
            return key
        if self._known(place) == SHAPES:
            return None  # a step of another shape now and then costs less than ever more graphs
        self._tries[key] += 1
        return key if self._tries[key] >= WARM_UP else None

    def _known(self, place: Hashable) -> int:
        """Return how many recordings a place has."""
        return sum(known[0] == place for known in self._recordings)

    def _place(self, block: int) -> int | None:
        """Return the number of the place where a block's tensors are; None if its steps can't be recorded.

        What it depends on is looked at when a visit begins, when tensors were replaced, and before a recording: that
        takes as long as a small step.
        """
        now = self._token(block)
        if self._visit[0] != now or not self._known(self._visit[1]):
            reason = hooked(self._parts(block))
            place = self._look(block)
            if not reason and place > MOST_PLACES * len(self.trainer.model.blocks):
                reason = "blocks come to new addresses, or with new settings, again and again"
            if reason:
                self._refuse(reason)
                return None
            self._visit = now, place
        return self._visit[1]

    def _look(self, block: int) -> int:
        """Return a place's number by all that it depends on."""
        meter, model = self.trainer.meter, self.trainer.model
        stock = type(model).loss_at is DiffusionBlocks.loss_at
        own = None if stock else (block, Same(model.partition))  # a loss of one's own may look at both
        key = place_of(self._parts(block)), meter and meter.sums.data_ptr(), own
        return self._places.setdefault(key, len(self._places))

    def _token(self, block: int) -> object:
        """Return what changes whenever a block comes or its tensors are replaced."""
        parts = self._parts(block)
        firsts = [next(part.module.parameters(), None) for part in parts]
        states = [next(iter(part.optimizer.state.values()), None) if part.optimizer else None for part in parts]
        others = *states, self.trainer.meter, self.trainer.model.partition
        return block, [p is not None and p.data_ptr() for p in firsts], [Same(thing) for thing in others]

    def _parts(self, block: int) -> list[Part]:
        parts = self.trainer.offloader.parts
        return [parts["shared"], parts[f"block_{block}"]]

    def _rehearse(self, _: Key, block: int, batch: Batch, losses: list[BlockLoss], counted: bool) -> Work | None:
        """Do the work by the device's numbers, without a graph; None if it can't be done so."""
        assert self.graphs is not None
        try:
            with restored(self.trainer, block), self.graphs.watch() as found:
                work = run(self.trainer, block, batch, self._tensors.numbers, losses, counted=counted)
        except Exception as error:  # the caller's step by Python's numbers shows whether that was the reason
            losses.clear()
            self._refuse(_first_line(error))
            return None
        if found:
            self._refuse(found[0])
        return work

    def _replay(self, key: Key, block: int, batch: Batch, losses: list[BlockLoss], counted: bool) -> Work | None:
        """Do the work by its graph, which is recorded first if need be; None if it can't be."""
        if key not in self._recordings:
            try:
                with restored(self.trainer, block):
                    self._recordings[key] = self._record(block, batch)
            except Exception as error:
                self._refuse(_first_line(error))
                return None
        recording = self._recordings[key]
        for own, given in zip(recording.batch, batch, strict=True):
            own.copy_(given)
        recording.replay()
        work, usage = recording.work, None
        assert work.norm is not None and work.usage is not None
        losses.append(work.loss)
        if counted:
            usage = self.trainer.offloader.usage()
            counts = work.usage.by_category
            usage = usage.with_(activations=counts["activations"], gradients=counts["gradients"])
        return Work(work.loss, work.norm.clone(), usage)

    def _record(self, block: int, batch: Batch) -> Recording:
        assert self.graphs is not None
        own, numbers = Batch(*(torch.empty_like(t).copy_(t) for t in batch)), self._tensors.numbers
        replay, work = self.graphs.record(lambda: run(self.trainer, block, own, numbers, [], counted=True))
        if self._look(block) != self._visit[1]:
            raise RuntimeError("a step puts new tensors in place of a block's")
        return Recording(replay, own, work)

    def _refuse(self, reason: str) -> None:
        self.graphs = None
        self._recordings.clear()
        warnings.warn(f"training steps run without CUDA graphs: {reason} (capture=False silences this)", stacklevel=2)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _obstacle(trainer: Trainer, graphs: Graphs | None) -> str | None:
    """Return what of a trainer's settings forbids graphs."""
    if graphs is None:
        return f"the device is {trainer.device}"
    if trainer.mesh.ranks > 1:
        return "gradients are summed over processes"
    if trainer.config.accumulate > 1:
        return "accumulate > 1 makes a step of several batches"
    if trainer.config.checkpoint_layers:
        return "checkpoint_layers runs layers again, for which PyTorch reads the generator's state"
    kinds = {type(optimizer) for optimizer in trainer.optimizers.values()}
    if others := kinds - {BlockAdamW}:
        return f"{others.pop().__name__} takes its numbers from the host; BlockAdamW doesn't"
    return None


def _most_rates(trainer: Trainer) -> int:
    counts = {part: len(optimizer.param_groups) for part, optimizer in trainer.optimizers.items()}
    return counts.pop("shared", 0) + max(counts.values(), default=0)
