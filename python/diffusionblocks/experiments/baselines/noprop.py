"""The NoProp baseline, in discrete time: each block alone tells the label's embedding from a noisier one.

Source: Li, Teh, Pascanu 2025, arXiv 2503.24322 (NoProp-DT). Ours, not the paper's: the blocks are a ViT's layers, the
noisy embedding is the first token, and the label embeddings are fixed.
"""

from __future__ import annotations

import itertools
import math
import time

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import dbkernels

from ...noise.rng import stream
from ...sampling.sampler import BATCH
from ...targets.labels import spread_codebook
from ...training.memory import SavedTensors, reset_peak
from ...training.optimizer import PartOptimizer, clip_gradients, learning_rate
from ..metrics.bound import accuracy
from ..models.vit import Head, Layer, Stem, ViTConfig
from ..session import LOG_EVERY, NonFiniteLoss, block_at
from ..tasks.base import Row
from ..tasks.vit import ViTAdapter, ViTRun
from .end_to_end import Log, Result, memory_row, usage

ETA = 0.1  # the paper's weight of the denoising loss


class NoPropBlock(nn.Module):
    """Some layers with a stem and a head of their own: (x, z, noise) -> the estimate of the label's embedding."""

    def __init__(self, config: ViTConfig, layers: int):
        super().__init__()
        self.stem, self.head = Stem(config, True), Head(config, True)
        self.layers = nn.ModuleList(Layer(config, True) for _ in range(layers))

    def forward(self, x: Tensor, z: Tensor, level: Tensor, table: Tensor) -> Tensor:
        h, cond = self.stem(x, z, level)
        for layer in self.layers:
            h = layer(h, cond)
        return self.head(self.head.features(h), cond).softmax(-1) @ table


class NoProp(nn.Module):
    """B blocks, the embeddings, and the classifier of the last step's z.

    alpha_bar: B + 1 rising shares of signal, a cosine from 1e-4 to 1 - 1e-4; block t is trained at alpha_bar[t].
    """

    def __init__(self, config: ViTRun):
        super().__init__()
        self.blocks = nn.ModuleList(NoPropBlock(config.model, n) for n in config.layer_counts)
        self.out = nn.Linear(config.model.dim, config.model.classes)
        self.register_buffer("table", spread_codebook(config.model.classes, config.model.dim))
        times = torch.linspace(1, 0, config.blocks + 1, dtype=torch.float64)
        self.alpha_bar = (times * math.pi / 2).cos().square().clamp(1e-4, 1 - 1e-4).tolist()

    def noised(self, y: Tensor, t: int, seed: int, step: int) -> Tensor:
        """z of labels (B,) at time t: (B, d), of unit variance where it is noise."""
        signal = self.alpha_bar[t]
        sigma = math.sqrt((1 - signal) / signal)
        noisy = dbkernels.inject_noise(self.table[y], sigma, seed=stream(seed, "noprop", t), offset=step)
        return math.sqrt(signal) * noisy

    def estimate(self, x: Tensor, z: Tensor, t: int) -> Tensor:
        """What block t makes of z."""
        signal = self.alpha_bar[t]
        level = torch.full((len(x),), math.log((1 - signal) / signal) / 8, device=x.device)  # ln(sigma) / 4
        return self.blocks[t](x, z, level, self.table)

    def loss(self, x: Tensor, y: Tensor, t: int, *, seed: int, step: int) -> Tensor:
        """Block t's error, weighted by the gain of signal-to-noise, and the classifier's cross-entropy."""
        B, (below, above) = len(self.blocks), self.alpha_bar[t : t + 2]
        gain = above / (1 - above) - below / (1 - below)
        error = (self.estimate(x, self.noised(y, t, seed, step), t) - self.table[y]).square().sum(-1).mean()
        return functional.cross_entropy(self.out(self.noised(y, B, seed, step)), y) + B / 2 * ETA * gain * error

    def walk(self, x: Tensor, *, seed: int) -> Tensor:
        """Logits (B, K): from noise through all blocks, noise added behind each."""
        shape = (len(x), self.table.shape[1])
        z = dbkernels.philox_normal(shape, seed=stream(seed, "noprop walk"), device=x.device)
        for t, (below, above) in enumerate(itertools.pairwise(self.alpha_bar)):
            kept = below / above
            a = math.sqrt(above) * (1 - kept) / (1 - below)
            b = math.sqrt(kept) * (1 - above) / (1 - below)
            c = (1 - above) * (1 - kept) / (1 - below)
            eps = dbkernels.philox_normal(shape, seed=stream(seed, "noprop walk"), offset=t + 1, device=x.device)
            z = a * self.estimate(x, z, t) + b * z + math.sqrt(c) * eps
        return self.out(z)


def noprop(adapter: ViTAdapter, device: torch.device, *, on_log: Log) -> Result:
    """Train block by block at equal layer evaluations; learning rate and warm-up are block-wise training's.

    Raises: NonFiniteLoss, naming the step.
    """
    reset_peak(device)
    config = adapter.config
    torch.manual_seed(stream(config.seed, "init") % 2**63)
    network, batches, began = NoProp(config).to(device), adapter.batches(device), time.perf_counter()
    parts = [
        PartOptimizer(module.named_parameters(), weight_decay=config.weight_decay, ema_decay=config.ema)
        for module in (*network.blocks, network.out)
    ]
    warm = max(1, round(config.warmup * config.total_steps))
    peak: dict[str, int] = {}
    for step in range(config.total_steps):
        t = block_at(step, config)
        x, y = batches.batch(step)
        with SavedTensors(network.parameters()).count() as saved:
            loss = network.loss(x, y, t, seed=config.seed, step=step)
        loss.backward()
        used = usage(network.blocks[t], parts[t], saved.bytes, device)
        norm = clip_gradients([parts[t], parts[-1]], config.clip)
        rate = learning_rate(step, steps=config.total_steps, peak=config.lr, warmup=warm)
        parts[t].step(rate)
        parts[-1].step(rate)
        if step % LOG_EVERY == LOG_EVERY - 1 or step + 1 == config.total_steps:
            if not bool(loss.isfinite() & norm.isfinite()):
                raise NonFiniteLoss(f"noprop: the loss is not finite at or before step {step}; lower lr")
            row = {"step": step + 1, "loss": float(loss.detach()), "grad_norm": float(norm), "lr": rate}
            on_log({"run": "noprop", **row, "seconds": time.perf_counter() - began} | memory_row(used, device))
            peak = max(peak, used, key=lambda bytes_: sum(bytes_.values()))
    for part in parts:
        part.swap_ema()
    seconds = time.perf_counter() - began
    val, test = (score(network, *adapter.inputs(split, device), seed=config.seed) for split in ("val", "test"))
    return Result("noprop", val, test, seconds, peak, {"lr": config.lr, "warmup": config.warmup})


@torch.no_grad()
def score(network: NoProp, x: Tensor, labels: Tensor, *, seed: int) -> Row:
    """Accuracy at the end of the walk."""
    network.eval()
    return {"accuracy": accuracy(torch.cat([network.walk(part, seed=seed) for part in x.split(BATCH)]), labels)}
