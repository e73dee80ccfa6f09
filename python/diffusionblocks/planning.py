"""What a run will take, before it runs: bytes by category for every number of blocks, without allocating them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .blocks import Block, Ends
from .config import TrainConfig
from .memory import SavedTensors, Usage, count_bytes
from .models import ViT
from .partition import spread_layers
from .targets import ClassTarget


def plan(config: TrainConfig, device: torch.device) -> Usage:
    """Peak bytes on the device by category, of the block with the most layers and what the blocks share.

    Everything is made of fake tensors, which have shapes and a device but no memory.
    """
    with FakeTensorMode(), torch.device(device):
        block, shared, target = _largest_block(config)
        resident = nn.ModuleList([block, target, *([shared] if shared is not None else [])])
        if config.shared == "frozen" and shared is not None:
            shared.requires_grad_(False)
        trained = [p for p in resident.parameters() if p.requires_grad]
        float32 = sum(p.numel() * 4 for p in trained)
        return Usage(
            {
                "weights": count_bytes([*resident.parameters(), *resident.buffers()], device),
                "gradients": count_bytes(trained, device),
                "moments": 2 * float32,
                "averages": float32 if config.ema else 0,
                "activations": _saved(block, shared, target, config),
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


def _largest_block(config: TrainConfig) -> tuple[Block, Ends | None, ClassTarget]:
    model, method = config.model, config.method
    kept = model.layers - model.layers % config.blocks if method.remainder == "dropped" else model.layers
    layers = max(spread_layers(kept, config.blocks))
    network = ViT(replace(model, layers=layers), conditioned=True)
    ends = Ends(network.stem, network.head)
    target = ClassTarget(
        torch.empty(model.classes, model.dim), readout=method.readout, trainable=method.codebook == "learned"
    )
    own = config.shared == "per_block"
    return Block(network.layers, ends if own else None), None if own else ends, target


def _saved(block: Block, shared: Ends | None, target: ClassTarget, config: TrainConfig) -> int:
    """Bytes that one step of the block saves for its backward pass, after the noise has been added."""
    size, count = config.model.image_size, config.batch_size
    x, y = torch.empty(count, config.model.channels, size, size), torch.zeros(count, dtype=torch.int64)
    sigma = torch.ones(count)
    device, bf16 = x.device.type, config.precision == "bfloat16"
    weights = [p for module in (block, shared, target) if module is not None for p in module.parameters()]
    with SavedTensors(weights).count() as saved, torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        z = target.clean(y) * sigma.unsqueeze(-1)
        output = block(x, z, sigma, target, shared)
        target.loss(output, z, y, sigma).mean()
    return saved.bytes
