"""The Forward-Forward baseline: every layer tells true labels from false by itself; no gradient between layers.

Source: Hinton 2022, arXiv 2212.13345. Ours, not the paper's: the layers are a ViT's, the label is the first token, and
goodness is the mean square over tokens, summed over features, less its value for a normalised input.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...noise.rng import stream
from ...sampling.sampler import BATCH
from ...targets.devices import send
from ...targets.labels import spread_codebook
from ...training.memory import SavedTensors, reset_peak
from ...training.optimizer import PartOptimizer, clip_gradients, learning_rate
from ..metrics.bound import accuracy
from ..models import ViT
from ..session import LOG_EVERY, NonFiniteLoss
from ..tasks.base import Row
from ..tasks.vit import ViTAdapter, ViTRun
from .end_to_end import Attempt, Log, Result, memory_row, tuned, usage

FASTER = 4  # a layer's own loss takes higher rates than a loss through all layers


class ForwardForward(nn.Module):
    """An ordinary ViT's stem and layers, the label's embedding in the place of [CLS]."""

    def __init__(self, config: ViTRun):
        super().__init__()
        network = ViT(config.model, conditioned=False)
        self.patch, self.position, self.layers = network.stem.patch, network.stem.position, network.layers
        self.register_buffer("table", spread_codebook(config.model.classes, config.model.dim))

    def embed(self, x: Tensor, y: Tensor) -> Tensor:
        """Images and labels (B,) -> tokens (B, 1 + N, D). The label is as strong as a normalised token."""
        label = self.table[y] * self.table.shape[1] ** 0.5
        return torch.cat([label.unsqueeze(1), self.patch(x).flatten(2).transpose(1, 2)], dim=1) + self.position

    def outputs(self, h: Tensor) -> Any:
        """Each layer's output (B, N, D), its input normalised and cut off from the layer before."""
        for i, layer in enumerate(self.layers):
            h = functional.layer_norm(h if i == 0 else h.detach(), h.shape[-1:])
            h = layer(h, None)
            yield h

    def scores(self, x: Tensor) -> Tensor:
        """The summed goodness of every label, all layers but the first if there are more: (B, K)."""
        columns = []
        for k in range(len(self.table)):
            h = self.embed(x, torch.full((len(x),), k, device=x.device))
            good = [goodness(out) for out in self.outputs(h)]
            columns.append(torch.stack(good[1:] or good).sum(0))
        return torch.stack(columns, dim=1)


def goodness(out: Tensor) -> Tensor:
    """Activity of a layer above that of a normalised input: (B, N, D) -> (B,)."""
    return (out.square().mean(1) - 1).sum(-1)


def wrong_labels(y: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """A label for each sample that isn't its own, each equally likely. y: (B,)."""
    shift = send(torch.randint(1, classes, y.shape, generator=generator), y.device)
    return (y + shift) % classes


def forward_forward(adapter: ViTAdapter, device: torch.device, *, on_log: Log) -> Result:
    """Train at equal layer evaluations; the rate is chosen as end to end's is, from FASTER times its rates.

    Raises: NonFiniteLoss, naming the step, if the loss isn't finite and there is nothing else to try.
    """
    rates = tuple(FASTER * lr for lr in adapter.config.tune_lr)
    faster = ViTAdapter(replace(adapter.config, tune_lr=rates))
    best, choice, tried = tuned(faster, lambda lr, warmup: attempt(adapter, device, lr, warmup, on_log))
    test = score(best.network, *adapter.inputs("test", device))
    return Result("forward-forward", best.val, test, best.seconds, best.memory, choice, tried)


def attempt(adapter: ViTAdapter, device: torch.device, lr: float, warmup: float, on_log: Log) -> Attempt:
    """One training: a step runs a true and a false batch, so there are half as many steps.

    A layer's loss is softplus(-goodness) of true pairs plus softplus(goodness) of false ones; its activations are
    freed before the next layer's are made. Raises: NonFiniteLoss, naming the step.
    """
    reset_peak(device)
    config = adapter.config
    torch.manual_seed(stream(config.seed, "init") % 2**63)
    network = ForwardForward(config).to(device)
    optimizer = PartOptimizer(network.named_parameters(), weight_decay=config.weight_decay, ema_decay=config.ema)
    batches = adapter.batches(device)
    steps, began = max(1, config.steps // 2), time.perf_counter()
    peak: dict[str, int] = {}
    warm = max(1, round(warmup * steps))
    for step in range(steps):
        generator = torch.Generator().manual_seed(stream(config.seed, "wrong", step))
        x, y = batches.batch(step)
        false = wrong_labels(y, config.model.classes, generator)
        loss, saved = train_layers(network, x.repeat(2, 1, 1, 1), torch.cat([y, false]))
        used = usage(network, optimizer, saved, device)
        norm = clip_gradients([optimizer], config.clip)
        rate = learning_rate(step, steps=steps, peak=lr, warmup=warm)
        optimizer.step(rate)
        if step % LOG_EVERY == LOG_EVERY - 1 or step + 1 == steps:
            if not bool(loss.isfinite() & norm.isfinite()):
                raise NonFiniteLoss(f"forward-forward: the loss isn't finite at or before step {step}; lower lr={lr}")
            row = {"step": 2 * (step + 1), "loss": float(loss), "grad_norm": float(norm), "lr": rate}
            on_log({"run": "forward-forward", **row, "seconds": time.perf_counter() - began} | memory_row(used, device))
            peak = max(peak, used, key=lambda bytes_: sum(bytes_.values()))
    optimizer.swap_ema()
    seconds = time.perf_counter() - began
    return Attempt(network, score(network, *adapter.inputs("val", device)), seconds, peak)


def train_layers(network: ForwardForward, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """Gradients of every layer's own loss; the first half of the batch is true. Returns the mean loss, and the most
    bytes that one layer saved."""
    total, most = torch.zeros((), device=x.device), 0
    outputs = network.outputs(network.embed(x, y))
    for _ in network.layers:
        with SavedTensors(network.parameters()).count() as saved:
            true, false = goodness(next(outputs)).chunk(2)
            loss = (functional.softplus(-true) + functional.softplus(false)).mean()
        loss.backward()
        total, most = total + loss.detach() / len(network.layers), max(most, saved.bytes)
    return total, most


@torch.no_grad()
def score(network: nn.Module, x: Tensor, labels: Tensor) -> Row:
    """Accuracy: the label of most goodness."""
    network.eval()
    scores = torch.cat([network.scores(part) for part in x.split(BATCH)])
    return {"accuracy": accuracy(scores, labels)}
