"""The NoProp baseline, in discrete time: each block alone denoises the label's embedding, at its one noise level.

Source: Li, Teh, Pascanu 2025, arXiv 2503.24322 (NoProp-DT). Ours, not the paper's: the blocks are a ViT's layers, the
noisy embedding is the first token, and the label embeddings are fixed. Its variance-preserving z is ours times c_in,
with sigma_data = 1 and sigma^2 = (1 - alpha_bar) / alpha_bar.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import dbkernels

from ...blocks import DiffusionBlocks
from ...denoiser import BlockLoss, StemHead
from ...noise.density import LogUniform
from ...noise.partition import make_partition
from ...noise.rng import stream
from ...targets.base import Features, Output, Target
from ...targets.labels import LabelTarget
from ..models.layers import Layer
from ..models.vit import Head, Stem
from ..tasks.vit import ViTRun, ViTTask
from .end_to_end import Attempt, Result, Rows, settings_of, train, tuned

ETA = 0.1  # the paper's weight of the denoising loss
ALPHA_MIN = 1e-4  # alpha_bar's distance from 0 and 1


class NoPropTarget(LabelTarget):
    """Labels as fixed embeddings, and the classifier `out` of the last block's z, which all blocks train."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__(num_classes, dim, sigma_data=1.0)
        self.out = nn.Linear(dim, num_classes)

    def read(self, features: Features, z: Tensor, sigma: Tensor) -> Output:
        """Return the logits of the label's embedding from features alone, and their mean embedding."""
        logits = features.head(features.h, features.cond)
        return Output(logits, logits.softmax(-1) @ self.table)

    def start(self, count: int, sigma: float, *, seed: int, device: torch.device) -> Tensor:
        """Return z at the highest level: sigma eps."""
        return Target.start(self, count, sigma, seed=stream(seed, "noprop walk"), device=device)

    def advance(self, z: Tensor, output: Output, sigma: float, below: float, *, seed: int, step: int) -> Tensor:
        """Return z at the level `below`, drawn from the noise's posterior given D."""
        r2, D = (below / sigma) ** 2, output.denoised
        eps = dbkernels.philox_normal(z.shape, seed=stream(seed, "noprop walk"), offset=step + 1, device=z.device)
        return D + r2 * (z - D) + below * math.sqrt(1 - r2) * eps


class NoProp(DiffusionBlocks):
    """Independent blocks: block t is trained at the level partition.edges[t] and leads to the next.

    alpha_bar rises along a cosine from ALPHA_MIN to 1 - ALPHA_MIN.
    """

    def __init__(self, config: ViTRun):
        model, around, layers = config.model, list[StemHead](), list[Layer]()
        for count in config.layer_counts:
            around.append(StemHead(Stem(model, True), Head(model, True)))
            layers += [Layer(model, True) for _ in range(count)]
        times = torch.linspace(1, 0, config.blocks + 1, dtype=torch.float64)
        alpha_bar = (times * math.pi / 2).cos().square().clamp(ALPHA_MIN, 1 - ALPHA_MIN)
        edges = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
        partition = make_partition(LogUniform(edges[-1], edges[0]), config.layer_counts, edges=edges, overlap=0.0)
        target = NoPropTarget(model.num_classes, model.dim)
        super().__init__(around, layers, target.requires_grad_(False), partition, shared="per_block")
        self.seed = config.seed
        target.out.requires_grad_(True)  # it reads z alone, so blocks that share it still agree on z

    def draw_sigma(self, block: int | None, shape: tuple[int, ...], *, device: torch.device, **_: Any) -> Tensor:
        """Return the one level of a block."""
        return torch.full(shape, self.partition.edges[block or 0], device=device)

    def loss_at(
        self, block: int, x: Tensor, y: Tensor, sigma: Tensor, *, seed: int, step: int, weight: float = 1.0, **_: Any
    ) -> BlockLoss:
        """Return |y - D|^2, weighted by the block's gain of signal-to-noise, plus the classifier's cross-entropy."""
        B, (above, below), target = self.partition.blocks, self.partition.edges[block : block + 2], self.target
        least = torch.full_like(sigma, self.partition.sigma_min)
        noised = target.add_noise(y, sigma, seed=stream(seed, "noprop", block), offset=step)
        end = target.add_noise(y, least, seed=stream(seed, "noprop", B), offset=step)
        D = target.read(self.blocks[block](x, noised.scaled, noised.c_noise, None), noised.z, sigma).denoised
        gain = below**-2 - above**-2
        squared = (D - target.clean(y)).square().sum(-1)
        entropy = functional.cross_entropy(target.out(end.scaled), y, reduction="none")
        per_sample = entropy + B / 2 * ETA * gain * squared
        return BlockLoss(per_sample.mean() * weight, sigma, per_sample.detach(), None)

    @torch.no_grad()
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Return logits (B, K) at the end of the sampling trajectory, a step per block; weights as they are."""
        edges = self.partition.edges
        z = self.target.start(len(x), edges[0], seed=self.seed, device=x.device)
        for t, (sigma, below) in enumerate(itertools.pairwise(edges)):
            z = self.target.advance(z, self.denoise(x, z, sigma, block=t), sigma, below, seed=self.seed, step=t)
        levels = torch.full((len(z),), edges[-1], device=z.device)
        return self.target.out(self.target.inputs(z, levels)[0])


def noprop(task: ViTTask, device: torch.device, *callbacks: Any) -> Result:
    """Train block by block, at equal layer evaluations, with the learning rate and warm-up of block-wise training.

    Raises: NonFiniteLoss, naming the step.
    """
    config = task.config

    def run(lr: float, warmup: float) -> Attempt:
        torch.manual_seed(stream(config.seed, "init") % 2**63)
        model, where = NoProp(config), {"offload": config.offload, "folder": config.out / "waiting" / "noprop"}
        settings = settings_of(config, device, steps=config.total_steps, lr=lr, warmup=warmup, **where)
        score = lambda split: task.score(model, split, device)  # noqa: E731
        return train("noprop", model, settings, task.batches(device), score, Rows(), *callbacks)

    return tuned("noprop", task, run, (config.lr,), (config.warmup,))
