"""What block-wise training is measured against: the ordinary ViT, tuned, end to end and with checkpointing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import TrainConfig, augmentation
from .data import ImageData, Loader, Split, prepare
from .memory import SavedTensors, allocated, count_bytes
from .models import ViT
from .optim import PartOptimizer, clip_gradients, learning_rate
from .rng import stream
from .training import LOG_EVERY, NonFiniteLoss, autocast

Log = Callable[[dict[str, Any]], None]
BATCH = 512


@dataclass(frozen=True)
class Result:
    """What a baseline reached: accuracies in percent, seconds of the chosen run, peak bytes by category, the choice."""

    name: str
    val_accuracy: float
    test_accuracy: float
    seconds: float
    memory: dict[str, int]
    choice: dict[str, float] = field(default_factory=dict)
    tried: list[dict[str, float]] = field(default_factory=list)


def end_to_end(
    config: TrainConfig,
    data: ImageData,
    device: torch.device,
    *,
    on_log: Log,
    checkpointing: bool = False,
    choice: dict[str, float] | None = None,
) -> Result:
    """The ordinary ViT ([CLS], affine LayerNorm, no noise), all layers at once, for config.steps steps.

    Learning rate and warm-up are chosen on the validation split at the full budget: every rate of tune_lr at the first
    warm-up, then the other warm-ups at the best rate; ties go to the earlier one. `choice` skips the search. The test
    split is read once, for the chosen run.
    Raises: NonFiniteLoss, naming the step, if the chosen run's loss isn't finite; a try that isn't counts as 0 %.
    """
    name = "checkpointing" if checkpointing else "end-to-end"
    tried: list[dict[str, float]] = []
    best: tuple[float, nn.Module, float, dict[str, int]] | None = None

    def attempt(lr: float, warmup: float) -> None:
        nonlocal best, choice
        try:
            run = _train(name, config, data, device, lr, warmup, checkpointing, on_log)
        except NonFiniteLoss:
            if len(config.tune_lr) * len(config.tune_warmup) == 1:
                raise
            run = (0.0, nn.Identity(), 0.0, {})
        tried.append({"lr": lr, "warmup": warmup, "val_accuracy": run[0]})
        if best is None or run[0] > best[0]:
            best, choice = run, {"lr": lr, "warmup": warmup}

    if choice is not None:
        attempt(choice["lr"], choice["warmup"])
    else:
        for lr in config.tune_lr:
            attempt(lr, config.tune_warmup[0])
        for warmup in config.tune_warmup[1:]:
            attempt(choice["lr"], warmup)  # type: ignore[index]  # set by the first attempt
    assert best is not None and choice is not None
    val, network, seconds, memory = best
    test = score(network, data, data.test, device)
    return Result(name, val, test, seconds, memory, choice, tried)


def _train(
    name: str,
    config: TrainConfig,
    data: ImageData,
    device: torch.device,
    lr: float,
    warmup: float,
    checkpointing: bool,
    on_log: Log,
) -> tuple[float, nn.Module, float, dict[str, int]]:
    """One training: validation accuracy of the averaged weights, the network, seconds, peak bytes."""
    torch.manual_seed(stream(config.seed, "init") % 2**63)
    network = ViT(config.model, conditioned=False).to(device)
    optimizer = PartOptimizer(network.named_parameters(), weight_decay=config.weight_decay, ema_decay=config.ema)
    loader = Loader(data.train, data, config.batch_size, seed=config.seed, device=device, **augmentation(config))
    warm, began = max(1, round(warmup * config.steps)), time.perf_counter()
    peak: dict[str, int] = {}
    for step in range(config.steps):
        logs = step % LOG_EVERY == LOG_EVERY - 1 or step + 1 == config.steps
        torch.manual_seed(stream(config.seed, "layers", step) % 2**63)
        for micro in range(step * config.accumulate, (step + 1) * config.accumulate):
            x, y = loader.batch(micro)
            counter = SavedTensors(network.parameters()).count() if logs else nullcontext()
            with counter as saved, autocast(config, device):
                loss = functional.cross_entropy(forward(network, x, checkpointing).float(), y)
            (loss / config.accumulate).backward()
        again = saved_by_a_layer(network, x) if saved and checkpointing else 0
        used = usage(network, optimizer, saved.bytes + again, device) if saved else {}
        norm = clip_gradients([optimizer], config.clip)
        rate = learning_rate(step, steps=config.steps, peak=lr, warmup=warm)
        optimizer.step(rate)
        if logs:
            if not bool(loss.isfinite() & norm.isfinite()):
                raise NonFiniteLoss(f"{name}: the loss is not finite at or before step {step}; lower lr (now {lr})")
            row = {"step": step + 1, "loss": float(loss.detach()), "grad_norm": float(norm), "lr": rate}
            on_log({"run": name, **row, "seconds": time.perf_counter() - began, **memory_row(used, device)})
            peak = max(peak, used, key=lambda bytes_: sum(bytes_.values()))
    optimizer.swap_ema()
    return score(network, data, data.val, device), network, time.perf_counter() - began, peak


def forward(network: ViT, x: Tensor, checkpointing: bool) -> Tensor:
    """Logits; with checkpointing a layer's activations are made again in the backward pass."""
    if not checkpointing:
        return network(x)
    h, cond = network.stem(x)
    for layer in network.layers:
        h = checkpoint(layer, h, cond, use_reentrant=False)
    return network.head(network.head.features(h), cond)


def saved_by_a_layer(network: ViT, x: Tensor) -> int:
    """Bytes that one layer saves: with checkpointing they are made again, a layer at a time, in the backward pass."""
    with torch.no_grad():
        h, cond = network.stem(x)
    with SavedTensors(network.parameters()).count() as saved:
        network.layers[0](h, cond)
    return saved.bytes


@torch.no_grad()
def score(network: nn.Module, data: ImageData, split: Split, device: torch.device) -> float:
    """Accuracy on a split, in percent."""
    x = prepare(split.images, data.mean, data.std, device=device)
    with evaluating(network):
        guesses = torch.cat([network(part).argmax(-1) for part in x.split(BATCH)])
    return float((guesses == split.labels.to(device)).double().mean() * 100)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within, training mode after."""
    network.eval()
    yield
    network.train()


def usage(network: nn.Module, optimizer: PartOptimizer, saved: int, device: torch.device) -> dict[str, int]:
    """Bytes by category after a backward pass."""
    state = optimizer.tensors()
    moments = [t for name, t in state.items() if not name.startswith("ema/")]
    return {
        "weights": count_bytes([*network.parameters(), *network.buffers()], device),
        "gradients": count_bytes([p.grad for p in network.parameters() if p.grad is not None], device),
        "moments": count_bytes(moments, device),
        "averages": count_bytes([t for name, t in state.items() if name.startswith("ema/")], device),
        "activations": saved,
    }


def memory_row(used: dict[str, int], device: torch.device) -> dict[str, Any]:
    peak, reserved = allocated(device)
    total = sum(used.values())
    return {"bytes": used, "allocated": peak if device.type == "cuda" else total, "reserved": reserved}
