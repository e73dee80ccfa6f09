"""What training will take, before it runs: bytes by category for every number of blocks, without allocating them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from ..blocks import DiffusionBlocks
from ..noise.density import LogNormal
from ..noise.partition import make_partition, spread_layers
from ..offload.bandwidth import measured_bandwidth
from ..offload.lanes import CHUNK
from ..offload.memory import CATEGORIES, Usage, compact
from .config import TrainerConfig
from .devices import known_device
from .footprint import Cut, FakeNetwork, Unread
from .optimizer import MakeOptimizer, adamw_of
from .settings import settings_from

WAITING = 0.02  # share of a visit that a move may take


@dataclass(frozen=True)
class Choice:
    """A configuration that fits.

    Attributes:
        blocks: Number of blocks.
        offload, slots: The Trainer's settings.
        usage: Bytes on the device. host, disk: Bytes there.
        seconds: Of a move per visit; None where no bandwidth is known.
        least_visit: Seconds that a visit should last for moves to take at most 2 % of it: with two slots a move hides
            behind the visit.
    """

    blocks: int
    offload: str | None
    slots: int
    usage: Usage
    host: int
    disk: int
    seconds: float | None

    @property
    def least_visit(self) -> float | None:
        return None if self.seconds is None else self.seconds if self.slots == 2 else self.seconds / WAITING

    def visit(self, step_seconds: float) -> int:
        """Return the steps per visit for steps of this length. Raises: ValueError if no bandwidth is known."""
        _check_positive("step_seconds", step_seconds, "seconds")
        if self.least_visit is None:
            raise ValueError("the time of a move is unknown: give plan a bandwidth, or a folder to measure it in")
        return max(1, math.ceil(self.least_visit / step_seconds))

    def __str__(self) -> str:
        where = {None: "all blocks on the device", "cpu": "blocks wait on the host", "disk": "blocks wait on disk"}
        text = f"B = {self.blocks}, {where[self.offload]}"
        if self.offload:
            text += f", slots = {self.slots}"
        if self.seconds:
            text += f"; a move takes {self.seconds:.3g} s: let visits last {self.least_visit:.3g} s or more"
        return text


@dataclass(frozen=True)
class Plan:
    """Bytes for every number of blocks that a network can be cut into; print it for a table.

    Attributes:
        cuts: The bytes of all parts by B.
        device: Where the active block is.
        offload: Where the others wait, if that is elsewhere: "cpu", "disk" or None.
        slots: Buffers on the device.
        bandwidth: Bytes per second of a move, each way, by where blocks wait, as far as known.
    """

    cuts: dict[int, Cut]
    device: torch.device
    offload: str | None
    slots: int
    bandwidth: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def rows(self) -> dict[int, Usage]:
        """Peak bytes on the device by B: of the largest block, and of what is there beside it."""
        return {b: self.choice(b).usage for b in self.cuts}

    def choice(self, blocks: int, offload: str | None = "", slots: int = 0) -> Choice:
        """Return what a number of blocks takes, by default as planned. Raises: ValueError if it isn't in the plan."""
        if blocks not in self.cuts:
            raise ValueError(f"blocks={blocks!r} is not among the plan's: {', '.join(map(str, self.cuts))}")
        offload, slots = (self.offload if offload == "" else offload), slots or self.slots
        offload = offload if blocks > 1 else None  # a lone block never waits
        cut, on_host = self.cuts[blocks], self.device.type == "cpu"
        usage = cut.on_device(offload, slots, host=on_host)
        ring = 2 * CHUNK if offload == "disk" and not on_host else 0
        host = cut.waiting if offload == "cpu" else ring
        speed = self.bandwidth.get(offload or "")
        seconds = 0.0 if offload is None else cut.slot / speed if speed else None
        return Choice(blocks, offload, slots, usage, host, cut.waiting if offload == "disk" else 0, seconds)

    def smallest(self, memory_bytes: int) -> int | None:
        """Return the smallest B that fits into so many bytes on the device; None if none does."""
        _check_positive("memory_bytes", memory_bytes, "bytes")
        return next((b for b, usage in sorted(self.rows.items()) if usage.total <= memory_bytes), None)

    def fit(self, memory_bytes: int, host_bytes: int | None = None) -> Choice | None:
        """Return the configuration with the fewest blocks that fits; of those the one that moves least.

        Args:
            memory_bytes: On the device. host_bytes: On the host, for waiting blocks of a GPU; None: any number.

        Raises: TypeError or ValueError if one isn't a positive number, or host_bytes is given where the device is the
            host itself.
        """
        _check_positive("memory_bytes", memory_bytes, "bytes")
        if host_bytes is not None:
            _check_positive("host_bytes", host_bytes, "bytes")
            if self.device.type == "cpu":
                raise ValueError("host_bytes: the device is the host itself, and memory_bytes counts all: leave it out")
        places = [(None, 1), ("cpu", 2), ("cpu", 1), ("disk", 2), ("disk", 1)]
        if self.device.type == "cpu":  # there a block that waits in memory frees none
            places = [place for place in places if place[0] != "cpu"]
        for blocks in sorted(self.cuts):
            for offload, slots in places:
                choice = self.choice(blocks, offload, slots)
                fits = host_bytes is None or choice.host <= host_bytes
                if fits and choice.usage.total <= memory_bytes:
                    return choice
        return None

    def __str__(self) -> str:
        counts = {b: self.choice(b) for b in self.cuts}
        columns = [c for c in CATEGORIES if c != "buffers" or self.offload]
        lines = [["B", *columns, str(self.device), *(p for p in ("host", "disk") if self._is_used(p, counts))]]
        timed = any(choice.seconds for choice in counts.values())
        lines[0] += ["move"] * timed
        for b, choice in counts.items():
            cells = [choice.usage.by_category[c] for c in columns] + [choice.usage.total]
            cells += [getattr(choice, p) for p in ("host", "disk") if self._is_used(p, counts)]
            times = [f"{choice.seconds:.2g}s" if choice.seconds else "-"] * timed
            lines.append([str(b), *map(compact, cells), *times])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(" ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)

    def _is_used(self, place: str, counts: dict[int, Choice]) -> bool:
        here = place == "host" and self.device.type == "cpu"  # counted as the device's
        return not here and any(getattr(choice, place) for choice in counts.values())


def plan(
    model: DiffusionBlocks,
    batch: tuple[Tensor, Tensor],
    *,
    config: TrainerConfig | None = None,
    optimizer: MakeOptimizer | None = None,
    bandwidth: float | None = None,
    **settings: Any,
) -> Plan:
    """Return the bytes that a Trainer will take, by category, for every number of blocks; nothing is allocated.

    Weights, gradients, moments (optimizer state and float32 masters), averages, what one step saves for its backward
    pass (activations), and what slots hold beside the active block (buffers). What kernels need for a moment, and the
    allocator's rounding, come on top. Without a GPU, the activations of a plan for one are those of the CPU's kernels.

    Args:
        model: The network, in any number of blocks, wherever they are; it stays as it is.
        batch: (x, y) of the batch size to train with; only shapes and dtypes matter.
        config: The Trainer's settings; `settings` override its fields.
        optimizer: As for the Trainer.
        bandwidth: Bytes per second that a block moves at, in and out at once; by default measured, with 64 MiB, where
            the device is here and, for the disk, a `folder` is set.
        settings: TrainerConfig's fields, e.g. device="cuda", precision="bfloat16", offload="cpu", ema=0.

    Raises: TypeError or ValueError if a setting is wrong, or the batch doesn't fit the model.

    Examples:
        >>> import torch, diffusionblocks as db
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU()) for _ in range(3)]
        >>> model = db.from_layers(layers, stem=torch.nn.Linear(8, 256), head=torch.nn.Linear(256, 3),
        ...                        target=db.LabelTarget(num_classes=3, dim=16), blocks=3)
        >>> batch = torch.randn(64, 8), torch.randint(3, (64,))
        >>> plan = db.plan(model, batch, device="cpu", offload="disk")
        >>> list(plan.rows), plan.smallest(memory_bytes=4 * 2**20)
        ([1, 2, 3], 3)
        >>> plan.fit(memory_bytes=4 * 2**20).offload
        'disk'
    """
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(f"model must be DiffusionBlocks, from from_layers or convert, got {type(model).__name__}")
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise TypeError(f"batch must be two tensors (x, y), got {type(batch).__name__}")
    if bandwidth is not None:
        _check_positive("bandwidth", bandwidth, "bytes per second")
    config = settings_from(TrainerConfig, config, settings, "bandwidth", "optimizer")
    device = known_device(config.device)
    offload = config.offload_from(device)
    cuts = _cuts(model, batch, config, optimizer or adamw_of(config))
    known = dict.fromkeys(("cpu", "disk"), bandwidth) if bandwidth else {}
    if not known and offload:
        known = measured_bandwidth(device, offload, config.folder, pin=config.pin)
    return Plan(cuts, device, offload, config.slots, known)


def _check_positive(name: str, value: Any, unit: str) -> None:
    """Raise TypeError or ValueError unless a value is a positive number; infinity is more than any."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number of {unit}, got {value!r}")
    if not float(value) > 0:
        raise ValueError(f"{name} must be positive {unit}, got {value}")


def _cuts(
    model: DiffusionBlocks, batch: tuple[Tensor, Tensor], config: TrainerConfig, make: MakeOptimizer
) -> dict[int, Cut]:
    device = known_device(config.device)
    counted_on = device if torch.cuda.is_available() else torch.device("cpu")  # autograd needs the device's runtime
    mode = detect_fake_mode([*model.parameters(), *batch]) or FakeTensorMode()
    layers, own = sum(model.partition.layers), model.partition
    counts = {b: own.layers if b == own.blocks else spread_layers(layers, b) for b in range(1, layers + 1)}
    partitions = {b: make_partition(LogNormal(), counts[b]) for b in counts}  # which noise, is no matter of bytes
    with mode, Unread():
        network = FakeNetwork(model, batch, config, make, counted_on, mode)
        network.differentiate(partitions[1])
        return {b: cut for b in counts if (cut := network.cut(partitions[b])) is not None}
