"""What training will take, before it runs: bytes by category for every number of blocks, without allocating them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..blocks import DiffusionBlocks
from ..denoiser import StemHead
from ..noise.density import LogNormal, Tabulated
from ..noise.partition import Partition, make_partition, spread_layers
from ..offload.memory import CATEGORIES, SavedTensors, Usage, readable
from ..offload.part import Part, category, common_tensors, usage_of
from .config import TrainerConfig
from .devices import known_device
from .optimizer import MakeOptimizer, adamw_of, optimizer_of
from .precision import autocast, to_bfloat16


@dataclass(frozen=True)
class Plan:
    """Bytes for every number of blocks that a network can be cut into; print it for a table.

    Attributes:
        rows: Peak bytes on the device by B: of the largest block, and of what is there beside it.
        waiting: Bytes of the blocks that wait elsewhere, by B.
        device: Where the active block is.
        offload: Where the others wait, if that is elsewhere: "cpu", "disk" or None.
    """

    rows: dict[int, Usage]
    waiting: dict[int, Usage]
    device: torch.device
    offload: str | None

    def smallest(self, memory_bytes: int) -> int | None:
        """Return the smallest B that fits into so many bytes on the device; None if none does."""
        return next((blocks for blocks, usage in sorted(self.rows.items()) if usage.total <= memory_bytes), None)

    def __str__(self) -> str:
        waits = {"cpu": ["host"], "disk": ["disk"]}.get(self.offload or "", [])
        lines = [["B", *CATEGORIES, str(self.device), *waits]]
        for blocks, usage in self.rows.items():
            counts = [usage.by_category[c] for c in CATEGORIES] + [usage.total]
            counts += [self.waiting[blocks].total for _ in waits]
            lines.append([str(blocks), *map(readable, counts)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(" ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def plan(
    model: DiffusionBlocks,
    batch: tuple[Tensor, Tensor],
    *,
    config: TrainerConfig | None = None,
    optimizer: MakeOptimizer | None = None,
    **settings: Any,
) -> Plan:
    """Return the bytes that a Trainer will take, by category, for every number of blocks; nothing is allocated.

    Weights, gradients, moments (optimizer state and float32 masters), averages, and what one step saves for its
    backward pass (activations). What kernels need for a moment, and the allocator's rounding, come on top. Without a
    GPU, the activations of a plan for one are those of the CPU's kernels.

    Args:
        model: The network, in any number of blocks, wherever they are; it stays as it is.
        batch: (x, y) of the batch size to train with; only shapes and dtypes matter.
        config: The Trainer's settings; `settings` override its fields.
        optimizer: As for the Trainer.
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
    """
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(f"model must be DiffusionBlocks, from from_layers or convert, got {type(model).__name__}")
    config = TrainerConfig(**settings) if config is None else dataclasses.replace(config, **settings)
    device = known_device(config.device)
    offload = config.offload_from(device)
    if offload == "cpu" and device.type == "cpu":
        offload = None  # the same memory
    counted_on = device if torch.cuda.is_available() else torch.device("cpu")  # autograd needs the device's runtime
    mode = detect_fake_mode([*model.parameters(), *batch]) or FakeTensorMode()
    layers, own = sum(model.partition.layers), model.partition
    counts = {b: own.layers if b == own.blocks else spread_layers(layers, b) for b in range(1, layers + 1)}
    partitions = {b: make_partition(LogNormal(), counts[b]) for b in counts}  # which noise, is no matter of bytes
    with mode, Unread():
        network = _Network(model, batch, config, optimizer or adamw_of(config), counted_on, mode)
        network.differentiate(partitions[1])
        cuts = {b: cut for b in counts if (cut := network.cut(partitions[b])) is not None}
    rows = {b: cut.on_device(offload) for b, cut in cuts.items()}
    return Plan(rows, {b: cut.waiting(offload) for b, cut in cuts.items()}, device, offload)


class Unread(TorchDispatchMode):
    """Answers what only data could tell: a search finds every place, the most there can be; a check finds no fault.

    And corrects a fake: LayerNorm of bfloat16 by float32 weights keeps its statistics in float32, on every device.
    """

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if op is torch.ops.aten._local_scalar_dense.default:
            return 0
        result = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.native_layer_norm.default and args[2] is not None:
            out, *statistics = result
            return (out, *(t.to(args[2].dtype) for t in statistics))
        return result


@dataclass(frozen=True)
class _Counts:
    """One part's bytes: on the device, activations among them, and in a file."""

    device: Usage
    file: Usage

    @property
    def step(self) -> int:
        """Bytes that are there only while the part is trained."""
        return self.device.by_category["gradients"] + self.device.by_category["activations"]


@dataclass(frozen=True)
class _Cut:
    """The bytes of all parts of a network in B blocks."""

    shared: _Counts
    blocks: list[_Counts]

    def on_device(self, offload: str | None) -> Usage:
        """Return the peak on the device."""
        if offload:
            return _sum([self.shared.device, max((b.device for b in self.blocks), key=lambda usage: usage.total)])
        active = max(self.blocks, key=lambda b: b.step).device.by_category
        step = {name: active[name] for name in ("gradients", "activations")}
        idle = [b.device.with_(gradients=0, activations=0) for b in self.blocks]
        return _sum([self.shared.device, Usage(step), *idle])

    def waiting(self, offload: str | None) -> Usage:
        """Return the most that waits elsewhere: in files all blocks, in memory all but the active one."""
        if offload != "cpu":
            return _sum([b.file for b in self.blocks] if offload else [])
        idle = sorted((b.device.with_(gradients=0, activations=0) for b in self.blocks), key=lambda usage: usage.total)
        return _sum(idle[1:])


def _sum(usages: Iterable[Usage]) -> Usage:
    usages = list(usages)
    return Usage({name: sum(u.by_category.get(name, 0) for u in usages) for name in CATEGORIES})


class _Network:
    """A network of fake tensors, which have shapes and a device but no memory, to be cut anywhere."""

    def __init__(
        self,
        model: DiffusionBlocks,
        batch: tuple[Tensor, Tensor],
        config: TrainerConfig,
        make: MakeOptimizer,
        device: torch.device,
        mode: FakeTensorMode,
    ):
        self.model, self.config, self.make, self.device, self.mode = model, config, make, device, mode
        layers = [layer for block in model.blocks for layer in block.layers]
        parts = (model.blocks[0].around(model.stem_head), layers, model.target, *batch)
        tensors = [*model.parameters(), *model.buffers(), *batch]
        self.around, self.layers, self.target, self.x, self.y = self._copy(parts, tensors)
        self._known: dict[Any, _Counts] = {}

    def differentiate(self, one: Partition) -> None:
        """Give every trained parameter its dtype and its gradient. one: a partition in one block."""
        whole = self._in_blocks(one)
        if self.config.precision == "bfloat16":
            to_bfloat16(whole)
        with autocast(self.device, self.config.precision):
            whole.check(0, self.x, self.y)
        self._loss(whole, 0)[0].backward()

    @cached_property
    def signatures(self) -> list[str]:
        """What the bytes of each layer depend on."""
        return [_signature(layer) for layer in self.layers]

    def cut(self, partition: Partition) -> _Cut | None:
        """Return the bytes of the network in these blocks; None where weights are tied across them."""
        try:
            model = self._in_blocks(partition)
        except ValueError:
            return None
        modules = model.parts()
        common = common_tensors(model, modules)

        def part(name: str) -> Part:
            optimizer = optimizer_of(modules[name], self.make, self.config.ema)
            if optimizer:
                optimizer.step()  # makes its state
            return Part(modules[name], optimizer, common, owns_common=name == "shared")

        blocks, first = [], 0
        for b, count in enumerate(partition.layers):
            away = tuple(name for name, t in _tensors(model.blocks[b]) if id(t) in common)
            key = (*self.signatures[first : first + count], away)
            if key not in self._known:
                self._known[key] = self._count(part(f"block_{b}"), self._loss(model, b)[1])
            blocks.append(self._known[key])
            first += count
        return _Cut(self._count(part("shared"), 0), blocks)

    def _in_blocks(self, partition: Partition) -> DiffusionBlocks:
        """Return the network in blocks; of a subclass, too, however that is made."""
        model = object.__new__(type(self.model))
        model.__dict__.update(self.model.__dict__)
        own = self.model.shared == "per_block"
        arounds = [self.around, *(self._copy_around() for _ in partition.layers[1:])] if own else self.around
        DiffusionBlocks.__init__(model, arounds, self.layers, self.target, partition, shared=self.model.shared)
        return model.train()

    def _loss(self, model: DiffusionBlocks, block: int) -> tuple[Tensor, int]:
        """Return a block's loss and the bytes that it saves for its backward pass, as a Trainer takes and counts it."""
        sigma = torch.ones(self.target.level_shape(self.y), device=self.device)
        weights = [*model.blocks[block].parameters(), *model.parts()["shared"].parameters()]
        with autocast(self.device, self.config.precision), SavedTensors(weights).count() as saved:
            loss = model.loss_at(
                block, self.x, self.y, sigma, seed=0, step=0,
                weight=1 / self.config.accumulate, error=isinstance(self.model.partition.density, Tabulated),
            )  # fmt: skip
        return loss.loss, saved.bytes

    def _count(self, part: Part, activations: int) -> _Counts:
        file = dict.fromkeys(CATEGORIES, 0)
        for name, t in part.tensors().items():
            file[category(name)] += t.numel() * t.element_size()
        return _Counts(usage_of([part], self.device).with_(activations=activations), Usage(file))

    def _copy(self, parts: Any, tensors: Iterable[Tensor]) -> Any:
        """Return a deep copy in which other fake tensors, on the device, stand for `tensors`."""
        memo: dict[int, Any] = {}
        for t in tensors:
            fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device)
            if not any(t.stride()):  # of a block that waits on disk, one element stands for all
                fake = torch.empty(t.shape, dtype=t.dtype, device=self.device)
            memo[id(t)] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
        with FakeCopyMode(self.mode):
            return copy.deepcopy(parts, memo)

    def _copy_around(self) -> StemHead:
        around: StemHead = self._copy(self.around, [t for _, t in _tensors(self.around)])
        for own, p in zip(around.parameters(), self.around.parameters(), strict=True):
            own.grad = None if p.grad is None else torch.empty_like(p.grad)
        return around


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _signature(layer: nn.Module) -> str:
    """Return what distinguishes a layer from others of its kind: modules, settings, and tensors' shapes and dtypes."""
    settings = [(type(m), [f"{k}={v!r}" for k, v in vars(m).items() if not k.startswith("_")]) for m in layer.modules()]
    tensors = [(name, t.shape, t.dtype, t.requires_grad, t.grad is None) for name, t in _tensors(layer)]
    return repr((settings, tensors))
