"""The networks of bench_training.py: all layers at once, as anybody would train them, and in blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from training_rows import Network

import diffusionblocks as db
from diffusionblocks.experiments.baselines.end_to_end import Checkpointed
from diffusionblocks.experiments.models.causal_lm import CausalHead, CausalLayer, CausalLM, CausalLMConfig, CausalStem
from diffusionblocks.experiments.models.dit import DiTConfig, DiTHead, DiTStem
from diffusionblocks.experiments.models.layers import Layer
from diffusionblocks.targets.tokens import TokenTarget


def in_blocks(network: Network, blocks: int, where: str = "cpu") -> db.DiffusionBlocks:
    """Return a network in blocks. where: the device that a DiT's layers are made on; "meta": one block at a time."""
    torch.manual_seed(0)
    partition = db.make_partition(db.LogNormal(), network.sizes["layers"], blocks)
    if network.kind == "dit":
        config = DiTConfig(**network.sizes)
        shape = (config.channels, config.image_size, config.image_size)
        with torch.device(where):
            layers = [Layer(config, conditioned=True) for _ in range(config.layers)]
        return db.DiffusionBlocks(
            db.StemHead(DiTStem(config), DiTHead(config)), layers, db.ContinuousTarget(shape=shape), partition
        )
    sizes = CausalLMConfig(**network.sizes)
    table = nn.functional.normalize(torch.randn(sizes.vocab_size, sizes.dim), dim=1)
    around = db.StemHead(CausalStem(sizes), CausalHead(sizes))
    return db.DiffusionBlocks(
        around, [CausalLayer(sizes) for _ in range(sizes.layers)], TokenTarget(table), partition, context=0.9
    )


def batch(network: Network, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (x, y) of noise: what a step takes doesn't depend on what is in them."""
    generator = torch.Generator().manual_seed(0)
    if network.kind == "dit":
        config = DiTConfig(**network.sizes)
        shape = (network.batch, config.channels, config.image_size, config.image_size)
        x, y = torch.randint(config.num_classes, shape[:1], generator=generator), torch.rand(shape, generator=generator)
        return x.to(device), (2 * y - 1).to(device)
    shape = (network.batch, network.length)
    tokens = torch.randint(network.sizes["vocab_size"], shape, generator=generator).to(device)
    return tokens, tokens


class Whole(nn.Module):
    """All layers of a network and its loss, as `forward`, where FSDP expects it."""

    def __init__(self, network: nn.Module, layers: nn.ModuleList):
        super().__init__()
        self.network = network
        self._layers = [layers]  # not registered twice

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, to be wrapped."""
        return self._layers[0]

    def forward(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """Return the loss of a batch."""
        network: Any = self.network
        if not isinstance(network, db.DiffusionBlocks):
            return network.loss(x, y, seed=0, step=step)
        sigma = network.draw_sigma(0, network.target.level_shape(y), seed=0, step=step, device=y.device)
        return network.loss_at(0, x, y, sigma, seed=0, step=step).loss


def whole(network: Network, *, checkpoint: bool) -> Whole:
    """Return the network with all its layers at once: the DiT as a denoiser for all noise, the ordinary language model.

    checkpoint: Each layer keeps its input alone for the backward pass.
    """
    torch.manual_seed(0)
    if network.kind == "dit":
        model: Any = in_blocks(network, 1)
        layers = model.blocks[0].layers
    else:
        model = CausalLM(CausalLMConfig(**network.sizes))
        layers = model.layers
    for i, layer in enumerate(layers):
        if checkpoint:
            layers[i] = Checkpointed(layer)
    return Whole(model.train(), layers)
