"""The Forward-Forward baseline: every layer is trained to tell true labels from false ones, by its own loss.

Source: Hinton 2022, arXiv 2212.13345. Ours, not the paper's: the layers are a ViT's, the label is the first token, and
goodness is the mean square over tokens, summed over features, less its value for a normalised input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...noise.rng import stream
from ...targets.codebook import spread_codebook
from ...targets.devices import send
from ..models.vit import ViT, ViTConfig
from ..tasks.vit import ViTTask
from .end_to_end import Result, end_to_end
from .one_by_one import backward_one_by_one

FASTER = 4  # a layer's own loss takes higher rates than a loss through all layers


class ForwardForward(nn.Module):
    """An ordinary ViT's stem and layers, the label's embedding in the place of [CLS]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        network = ViT(config, conditioned=False)
        self.patch, self.position, self.layers = network.stem.patch, network.stem.position, network.layers
        self.register_buffer("table", spread_codebook(config.num_classes, config.dim))

    def embed(self, x: Tensor, y: Tensor) -> Tensor:
        """Return tokens (B, 1 + N, D) of images and labels (B,). The label is as strong as a normalised token."""
        label = self.table[y] * self.table.shape[1] ** 0.5
        return torch.cat([label.unsqueeze(1), self.patch(x).flatten(2).transpose(1, 2)], dim=1) + self.position

    def outputs(self, h: Tensor) -> Iterator[Tensor]:
        """Return each layer's output (B, N, D) of its normalised input, through which no gradient flows back."""
        for i, layer in enumerate(self.layers):
            h = functional.layer_norm(h if i == 0 else h.detach(), h.shape[-1:])
            h = layer(h, None)
            yield h

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the mean of the layers' losses: softplus(-goodness) of true pairs plus softplus(goodness) of false.

        Each layer's backward pass runs before the next layer's forward pass, so that the activations of one are held at
        a time. The last layer's is the caller's: its gradient alone flows from the result.
        """
        false = wrong_labels(y, len(self.table), torch.Generator().manual_seed(stream(seed, "wrong", step)))
        outputs = self.outputs(self.embed(x.repeat(2, 1, 1, 1), torch.cat([y, false])))
        pairs = (goodness(out).chunk(2) for out in outputs)
        losses = ((functional.softplus(-good) + functional.softplus(bad)).mean() for good, bad in pairs)
        return backward_one_by_one(losses, len(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return every label's summed goodness, of all layers but the first if there are more: (B, K)."""
        columns = []
        for k in range(len(self.table)):
            h = self.embed(x, torch.full((len(x),), k, device=x.device))
            good = [goodness(out) for out in self.outputs(h)]
            columns.append(torch.stack(good[1:] or good).sum(0))
        return torch.stack(columns, dim=1)


def goodness(out: Tensor) -> Tensor:
    """Return a layer's activity above that of a normalised input: (B, N, D) -> (B,)."""
    return (out.square().mean(1) - 1).sum(-1)


def wrong_labels(y: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return for each label (B,) another one, each equally likely."""
    shift = send(torch.randint(1, num_classes, y.shape, generator=generator), y.device)
    return (y + shift) % num_classes


def forward_forward(task: ViTTask, device: torch.device, *callbacks: Any) -> Result:
    """Train at equal layer evaluations: a step runs a true and a false batch, so there are half as many.

    The learning rate is chosen as the end-to-end network's is, from FASTER times its rates.
    Raises: NonFiniteLoss if no rate gives a finite loss.
    """
    rates = tuple(FASTER * lr for lr in task.config.tune_lr)
    own = ForwardForwardTask(replace(task.config, steps=max(1, task.config.end_to_end_steps // 2), tune_lr=rates))
    own.data = task.data
    return end_to_end(own, device, *callbacks, name="forward-forward")


class ForwardForwardTask(ViTTask):
    """Image labels by Forward-Forward."""

    def network(self) -> nn.Module:
        """Return the network, initialised from the config's seed."""
        torch.manual_seed(stream(self.config.seed, "init") % 2**63)
        return ForwardForward(self.config.model)
