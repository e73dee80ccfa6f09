"""Bytes of a network's parts, in any number of blocks, without allocating them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..blocks import DiffusionBlocks
from ..checkpoint.layout import Layout
from ..denoiser import StemHead
from ..noise.partition import Partition
from ..offload.memory import CATEGORIES, Usage
from ..offload.part import Part, common_tensors, usage_of
from .activations import saving
from .config import TrainerConfig
from .optimizer import MakeOptimizer, optimizer_of
from .precision import autocast, to_bfloat16
from .schedule import adaptive_density


class Unread(TorchDispatchMode):
    """Answers what only data could tell: a search finds every place, the most there can be; a check finds no fault; an
    optimizer counts one step.

    And corrects a fake: LayerNorm of bfloat16 by float32 weights keeps its statistics in float32, on every device.
    """

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if op is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 0
        result = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.native_layer_norm.default and args[2] is not None:
            out, *statistics = result
            return (out, *(t.to(args[2].dtype) for t in statistics))
        return result


@dataclass(frozen=True)
class PartBytes:
    """One part's bytes: on the device, while it trains; of those, what moves with it; and that in a flat buffer."""

    device: Usage
    moving: int
    flat: int

    @property
    def step(self) -> int:
        """Bytes that are there only while the part is trained."""
        return self.device.by_category["gradients"] + self.device.by_category["activations"]


@dataclass(frozen=True)
class Cut:
    """The bytes of all parts of a network in B blocks."""

    shared: PartBytes
    blocks: list[PartBytes]

    @property
    def slot(self) -> int:
        """Bytes of a slot: of the largest block."""
        return max(block.flat for block in self.blocks)

    @property
    def waiting(self) -> int:
        """Bytes of a store: of all blocks, if there are several."""
        return sum(block.flat for block in self.blocks) if len(self.blocks) > 1 else 0

    def on_device(self, offload: str | None, slots: int, *, host: bool) -> Usage:
        """Return the peak on the device. host: the device is the host itself."""
        active = max(self.blocks, key=lambda b: b.device.total - b.moving)  # a slot is of one size for all
        if offload and len(self.blocks) > 1:
            buffers = slots * self.slot - active.moving + (self.waiting if host and offload == "cpu" else 0)
            return _sum([self.shared.device, active.device, Usage({"buffers": buffers})])
        step = {name: active.device.by_category[name] for name in ("gradients", "activations")}
        idle = [b.device.with_(gradients=0, activations=0) for b in self.blocks]
        return _sum([self.shared.device, Usage(step), *idle])


def _sum(usages: Iterable[Usage]) -> Usage:
    usages = list(usages)
    return Usage({name: sum(u.by_category.get(name, 0) for u in usages) for name in CATEGORIES})


class FakeNetwork:
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
        self._known: dict[Any, PartBytes] = {}

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

    def cut(self, partition: Partition) -> Cut | None:
        """Return the bytes of the network in these blocks; None where weights are tied across them."""
        try:
            model = self._in_blocks(partition)
        except ValueError:
            return None
        modules = model.parts()
        common = common_tensors(model, modules)

        def part(name: str) -> Part:
            optimizer = optimizer_of(modules[name], self.make, self.config.ema)
            found = Part(modules[name], optimizer, common, owns_common=name == "shared")
            found.prepare()
            if optimizer:
                optimizer.step()  # makes its state
            return found

        blocks, first = [], 0
        for b, count in enumerate(partition.layers):
            away = tuple(name for name, t in _tensors(model.blocks[b]) if id(t) in common)
            key = (*self.signatures[first : first + count], away)
            if key not in self._known:
                self._known[key] = self._count(part(f"block_{b}"), self._loss(model, b)[1])
            blocks.append(self._known[key])
            first += count
        return Cut(self._count(part("shared"), 0), blocks)

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
        with autocast(self.device, self.config.precision), saving(model, block, self.config, count=True) as saved:
            loss = model.loss_at(
                block, self.x, self.y, sigma, seed=0, step=0,
                weight=1 / self.config.accumulate, error=adaptive_density(self.model, self.config) is not None,
            )  # fmt: skip
        return loss.loss, saved.bytes if saved else 0

    def _count(self, part: Part, activations: int) -> PartBytes:
        usage = usage_of([part], self.device).with_(activations=activations)
        moving = part.moving()
        in_slot = sum(t.nbytes for t in {id(t): t for t in moving.values()}.values())
        return PartBytes(usage, in_slot, Layout.of(moving).nbytes)

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
