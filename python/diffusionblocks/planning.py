"""What a run will take, before it runs: bytes by category for every number of blocks, without allocating them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .adapters.vit import class_target
from .blocks import DiffusionBlocks, Ends
from .config import TrainConfig
from .density import LogNormal
from .memory import SavedTensors, Usage, count_bytes
from .models import ViT
from .partition import Partition, make_partition, spread_layers


def plan(config: TrainConfig, device: torch.device) -> Usage:
    """Peak bytes on the device by category, of the block with the most layers and what the blocks share.

    Everything is made of fake tensors, which have shapes and a device but no memory.
    """
    alone = make_partition(LogNormal(), _most_layers(config), 1)
    with FakeTensorMode(), torch.device(device):
        model = _one_block(config, alone)
        trained = [p for p in model.parameters() if p.requires_grad]
        float32 = sum(p.numel() * 4 for p in trained)
        return Usage(
            {
                "weights": count_bytes([*model.parameters(), *model.buffers()], device),
                "gradients": count_bytes(trained, device),
                "moments": 2 * float32,
                "averages": float32 if config.ema else 0,
                "activations": _saved(model, config),
            }
        )


def plans(config: TrainConfig, device: torch.device) -> dict[int, Usage]:
    """A plan for every B from 1 to the number of layers."""
    return {
        blocks: plan(replace(config, blocks=blocks, walk_steps=max(blocks, config.walk_steps)), device)
        for blocks in range(1, config.model.layers + 1)
    }


def smallest_fit(table: dict[int, Usage], memory: int) -> int | None:
    """The smallest B whose plan fits into `memory` bytes; None if none does."""
    return next((blocks for blocks, usage in sorted(table.items()) if usage.total <= memory), None)


def _most_layers(config: TrainConfig) -> int:
    layers, dropped = config.model.layers, config.method.remainder == "dropped"
    return max(spread_layers(layers - layers % config.blocks if dropped else layers, config.blocks))


def _one_block(config: TrainConfig, alone: Partition) -> DiffusionBlocks:
    """The block with the most layers, as a model of its own."""
    method = config.method
    network = ViT(replace(config.model, layers=alone.layers[0], silu_after=method.silu_after), conditioned=True)
    ends = Ends(network.stem, network.head)
    return DiffusionBlocks(
        [ends] if config.shared == "per_block" else ends,
        list(network.layers),
        class_target(torch.empty(config.model.classes, config.model.dim), method),
        alone,
        shared=config.shared,
        weighting=method.weighting,
    )


def _saved(model: DiffusionBlocks, config: TrainConfig) -> int:
    """Bytes that one step saves for its backward pass."""
    size, count = config.model.image_size, config.batch_size
    x, y = torch.empty(count, config.model.channels, size, size), torch.zeros(count, dtype=torch.int64)
    bf16 = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")
    with SavedTensors(model.parameters()).count() as saved, bf16:
        model.loss_at(0, x, y, torch.ones(count), seed=0, step=0)
    return saved.bytes
