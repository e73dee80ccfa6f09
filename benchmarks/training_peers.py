"""Other ways to train with less memory, each in a few lines; what isn't installed raises when its row comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from training_networks import Whole

RANK, GAP = 256, 200  # of the projections of GaLore and APOLLO: the papers' for networks of about this size


def place(network: Whole, device: torch.device, settings: dict[str, Any], *, lr: float, visit: int) -> Any:
    """Bring a network to the device and return its optimizer.

    settings: optimizer, by name in OPTIMIZERS; fsdp.
    """
    if settings.get("fsdp"):
        shard(network, device)
        return torch.optim.AdamW(network.parameters(), lr)
    network.to(device)
    return OPTIMIZERS[settings.get("optimizer", "adamw")](network, lr, visit)


def shard(network: Whole, device: torch.device) -> None:
    """Let every layer of the network wait on the host, weights, gradients and optimizer state, by FSDP2 of one rank."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
    for layer in network.layers:
        fully_shard(layer, mesh=mesh, offload_policy=CPUOffloadPolicy())
    fully_shard(network, mesh=mesh, offload_policy=CPUOffloadPolicy())
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device)  # FSDP places parameters alone


def torchao(network: Whole, lr: float, visit: int) -> Any:
    """8-bit moments."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(network.parameters(), lr)


def bitsandbytes(network: Whole, lr: float, visit: int) -> Any:
    """8-bit moments."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(network.parameters(), lr)


def offloaded(network: Whole, lr: float, visit: int) -> Any:
    """Optimizer state and its step on the host."""
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(network.parameters(), torch.optim.AdamW, offload_gradients=True, lr=lr)


def badam(network: Whole, lr: float, visit: int) -> Any:
    """Optimizer state of one layer at a time, its weights in bfloat16 but for the trained ones."""
    from badam import BlockOptimizer

    if next(network.parameters()).is_cuda:  # as its authors ask for
        for p in network.parameters():
            p.data = p.data.to(torch.bfloat16) if p.dim() > 1 else p.data
    inner = {id(layer): name for name, layer in network.named_modules()}
    prefixes = [[f"{inner[id(layer)]}."] for layer in network.layers]
    base = torch.optim.AdamW(network.parameters(), lr)
    return BlockOptimizer(base, list(network.named_parameters()), prefixes, switch_block_every=visit, verbose=0)


def galore(network: Whole, lr: float, visit: int) -> Any:
    """Moments of gradients that are projected by their singular vectors."""
    from galore_torch import GaLoreAdamW

    low_rank = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW(projected(network, low_rank), lr=lr, no_deprecation_warning=True)


def apollo(network: Whole, lr: float, visit: int) -> Any:
    """A learning rate per channel, from moments of gradients that are projected at random."""
    from apollo_torch import APOLLOAdamW

    low_rank = {"rank": RANK, "proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": GAP,
                "proj_type": "std"}  # fmt: skip
    return APOLLOAdamW(projected(network, low_rank), lr=lr)


def projected(network: Whole, low_rank: dict[str, Any]) -> list[dict[str, Any]]:
    """Return parameter groups: the layers' large matrices, to be projected, and all others."""
    matrices = [p for p in network.layers.parameters() if p.dim() == 2 and min(p.shape) >= 2 * RANK // 4]
    chosen = {id(p) for p in matrices}
    rank = min(low_rank["rank"], *(min(p.shape) // 2 for p in matrices))
    others = [p for p in network.parameters() if id(p) not in chosen]
    return [{"params": others}, {"params": matrices, **low_rank, "rank": rank}]


def adamw(network: nn.Module, lr: float, visit: int) -> Any:
    """PyTorch's default."""
    return torch.optim.AdamW(network.parameters(), lr)


def fused(network: nn.Module, lr: float, visit: int) -> Any:
    """PyTorch's one kernel."""
    return torch.optim.AdamW(network.parameters(), lr, fused=True)


OPTIMIZERS: dict[str, Callable[[Whole, float, int], Any]] = {
    "adamw": adamw, "fused": fused, "torchao": torchao, "bitsandbytes": bitsandbytes, "offloaded": offloaded,
    "badam": badam, "galore": galore, "apollo": apollo,
}  # fmt: skip
