"""The published code's differences from this one, which a Recipe switches on one by one (docs/method.md)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

import dbkernels

from ..blocks import DiffusionBlocks
from ..denoiser import BlockLoss
from ..noise import edm
from ..noise.rng import stream
from ..targets.base import Features, Output
from ..targets.labels import LabelTarget
from ..training.trainer import Trainer
from .recipes import Recipe


class PublishedTarget(LabelTarget):
    """Labels embedded, decoded and sampled as a recipe's `codebook`, `sigma_data`, `readout`, `estimate` and `start`
    say."""

    def __init__(self, num_classes: int, dim: int, recipe: Recipe):
        learned = recipe.codebook == "learned"
        table = torch.randn(num_classes, dim) * 0.02 if learned else None
        super().__init__(num_classes, dim, table=table, sigma_data=recipe.sigma_data or None)
        self.table.requires_grad_(learned)
        self.recipe = recipe

    def embeddings(self) -> Tensor:
        """Return the codebook in use, (K, d): a learned one's rows at unit length."""
        return functional.normalize(self.table, dim=-1) if self.recipe.codebook == "learned" else self.table

    def read(self, features: Features, z: Tensor, sigma: Tensor) -> Output:
        """Return logits (B, K) and D (B, d), float32."""
        if self.recipe.readout == "edm":
            c = edm.precondition(sigma, self.sigma_data)
            h = edm.expand_as(c.c_out, features.h) * features.h + edm.expand_as(c.c_skip, z) * z
            logits = features.head(h, features.cond).float()
        else:
            logits = super().read(features, z, sigma).raw
        table = self.table if self.recipe.estimate == "raw" else self.embeddings()
        with torch.autocast(logits.device.type, enabled=False):
            return Output(logits, logits.softmax(-1) @ table.float())

    def start(self, count: int, sigma: float, *, seed: int, device: torch.device) -> Tensor:
        """Return z at the highest level, (count, d): the noise's centre, or a draw of it."""
        z = super().start(count, sigma, seed=seed, device=device)
        if self.recipe.start == "mean":
            return z
        return dbkernels.inject_noise(z, torch.tensor(sigma, device=device), seed=stream(seed, "walk"), offset=0)


class BatchMeanBlocks(DiffusionBlocks):
    """Blocks whose loss is mean(cross-entropy) * mean(weight(sigma)): a broadcast in the published code."""

    def loss_at(self, block: int, x: Tensor, y: Tensor, sigma: Tensor, **options: Any) -> BlockLoss:
        """Return the loss at given noise levels; `per_sample` stays unweighted."""
        loss = super().loss_at(block, x, y, sigma, **options)
        return loss._replace(loss=loss.loss * edm.weight(sigma, self.target.sigma_data).mean())


class VotingTrainer(Trainer):
    """Draws a batch's noise from the whole range and trains the block that owns most of it."""

    def choose(self, y: Tensor) -> tuple[int, Tensor]:
        """Return the block that most of the batch's noise belongs to, and that noise. Waits for the device."""
        if self.steps_done < self.config.trunk_steps:
            return super().choose(y)
        seed, step, model = self.config.seed, self.batches_done, self.model
        shape = model.target.level_shape(y)
        u = dbkernels.philox_uniform(shape, seed=stream(seed, "vote"), offset=step, device=self.device)
        sigma = model.partition.draw_any(u)
        block = int(model.partition.block_of(sigma).mode().values)
        return block, model.give_context(sigma, seed=seed, step=step)
