"""What a run will take, before it runs: bytes by category for every number of blocks, without allocating them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..blocks import DiffusionBlocks
from ..noise.density import LogNormal
from ..noise.partition import make_partition
from ..training.memory import SavedTensors, Usage, count_bytes
from .tasks.base import Adapter


def plan(adapter: Adapter, device: torch.device) -> Usage:
    """Peak bytes on the device by category, of the block with the most layers and what the blocks share.

    Everything is made of fake tensors, which have shapes and a device but no memory.
    """
    config, alone = adapter.config, _one_block(adapter)
    partition = make_partition(LogNormal(), alone.config.layers, 1)
    with FakeTensorMode(), Unread(), torch.device(device):
        model, batch = alone.blocks(partition), alone.example()
        trained = [p for p in model.parameters() if p.requires_grad]
        float32 = sum(p.numel() * 4 for p in trained)
        return Usage(
            {
                "weights": count_bytes([*model.parameters(), *model.buffers()], device),
                "gradients": count_bytes(trained, device),
                "moments": 2 * float32,
                "averages": float32 if config.ema else 0,
                "activations": _saved(model, *batch, config.precision),
            }
        )


class Unread(TorchDispatchMode):
    """Answers what only data could tell: a search finds every place, the most there can be; a check finds no fault."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if op is torch.ops.aten._local_scalar_dense.default:
            return 0
        return op(*args, **(kwargs or {}))


def plans(adapter: Adapter, device: torch.device) -> dict[int, Usage]:
    """A plan for every B that the network can be cut into."""
    config, kind = adapter.config, type(adapter)
    return {blocks: plan(kind(config.in_blocks(blocks)), device) for blocks in config.block_counts}


def smallest_fit(table: dict[int, Usage], memory: int) -> int | None:
    """The smallest B whose plan fits into `memory` bytes; None if none does."""
    return next((blocks for blocks, usage in sorted(table.items()) if usage.total <= memory), None)


def _one_block(adapter: Adapter) -> Adapter:
    """The block with the most layers, as a model of its own."""
    config = adapter.config
    return type(adapter)(replace(config.in_one_block(max(config.layer_counts)), shared=config.shared))


def _saved(model: DiffusionBlocks, x: Tensor, y: Tensor, precision: str) -> int:
    """Bytes that one step saves for its backward pass."""
    bf16 = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with SavedTensors(model.parameters()).count() as saved, bf16:
        model.loss_at(0, x, y, torch.ones(model.target.level_shape(y)), seed=0, step=0)
    return saved.bytes
