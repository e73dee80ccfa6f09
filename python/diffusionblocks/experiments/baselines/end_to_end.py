"""What block-wise training is measured against: the same network end to end, tuned, and with checkpointing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...noise.rng import stream
from ...training.memory import SavedTensors, allocated, count_bytes, reset_peak
from ...training.optimizer import PartOptimizer, clip_gradients, learning_rate
from ..session import LOG_EVERY, NonFiniteLoss, autocast
from ..tasks.base import Adapter, Row

Log = Callable[[Row], None]


@dataclass(frozen=True)
class Result:
    """What a baseline reached: the adapter's scores, seconds of the chosen run, peak bytes by category, the choice."""

    name: str
    val: Row
    test: Row
    seconds: float
    memory: dict[str, int]
    choice: dict[str, float] = field(default_factory=dict)
    tried: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Attempt:
    """One training of the end-to-end network."""

    network: nn.Module
    val: Row
    seconds: float
    memory: dict[str, int]


class Checkpointed(nn.Module):
    """A layer whose activations are made again in the backward pass."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.layer, *args, use_reentrant=False)


def end_to_end(
    adapter: Adapter,
    device: torch.device,
    *,
    on_log: Log,
    name: str = "end-to-end",
    choice: dict[str, float] | None = None,
) -> Result:
    """The adapter's network, all layers at once, for config.steps steps.

    name: "checkpointing" makes activations again in the backward pass; "shallow" is a network of one block's depth.
    `choice` of learning rate and warm-up skips the search. The test split is read once, for the chosen run.
    Raises: NonFiniteLoss, naming the step, if the loss isn't finite and there is nothing else to try.
    """
    adapter = shallow(adapter) if name == "shallow" else adapter
    best, choice, tried = tuned(
        adapter, lambda lr, warmup: attempt(name, adapter, device, lr, warmup, on_log), choice=choice
    )
    test = adapter.score(best.network, "test", device)
    return Result(name, best.val, test, best.seconds, best.memory, choice, tried)


def tuned(
    adapter: Adapter, run: Callable[[float, float], Attempt], *, choice: dict[str, float] | None = None
) -> tuple[Attempt, dict[str, float], list[dict[str, float]]]:
    """The run(lr, warmup) that is best on the validation split, its choice, and all that were tried.

    Every rate of the config's tune_lr at the first warm-up, then the other warm-ups at the best rate; ties go to the
    earlier one. `choice` skips the search. Raises: NonFiniteLoss if no loss is finite.
    """
    config, metric = adapter.config, adapter.metric
    tried: list[dict[str, float]] = []
    best: Attempt | None = None

    def look(lr: float, warmup: float) -> None:
        nonlocal best, choice
        tried.append({"lr": lr, "warmup": warmup, "val": float("nan")})
        try:
            made = run(lr, warmup)
        except NonFiniteLoss:
            if len(config.tune_lr) * len(config.tune_warmup) == 1:
                raise
            return
        tried[-1]["val"] = made.val[metric.key]
        if best is None or metric.better(made.val[metric.key], best.val[metric.key]):
            best, choice = made, {"lr": lr, "warmup": warmup}

    if choice is not None:
        look(choice["lr"], choice["warmup"])
    else:
        for lr in config.tune_lr:
            look(lr, config.tune_warmup[0])
        rate = choice["lr"] if choice else config.tune_lr[0]
        for warmup in config.tune_warmup[1:]:
            look(rate, warmup)
    if best is None or choice is None:
        raise NonFiniteLoss(f"no learning rate of {config.tune_lr} gave a finite loss; use lower ones")
    return best, choice, tried


def shallow(adapter: Adapter) -> Adapter:
    """The same architecture with one block's layers."""
    config = adapter.config
    return type(adapter)(config.in_one_block(max(config.layer_counts)))


def attempt(
    name: str, adapter: Adapter, device: torch.device, lr: float, warmup: float, on_log: Log = lambda row: None
) -> Attempt:
    """One training; the network comes with its averaged weights."""
    reset_peak(device)
    config, checkpointing = adapter.config, name == "checkpointing"
    network: Any = adapter.network().to(device)
    if checkpointing:
        for i, layer in enumerate(network.layers):
            network.layers[i] = Checkpointed(layer)
    optimizer = PartOptimizer(network.named_parameters(), weight_decay=config.weight_decay, ema_decay=config.ema)
    batches = adapter.batches(device)
    warm, began = max(1, round(warmup * config.steps)), time.perf_counter()
    peak: dict[str, int] = {}
    for step in range(config.steps):
        logs = step % LOG_EVERY == LOG_EVERY - 1 or step + 1 == config.steps
        torch.manual_seed(stream(config.seed, "layers", step) % 2**63)
        for micro in range(step * config.accumulate, (step + 1) * config.accumulate):
            x, y = batches.batch(micro)
            counter = SavedTensors(network.parameters()).count() if logs else nullcontext()
            with counter as saved, autocast(config, device):
                loss = network.loss(x, y, seed=config.seed, step=micro)
            (loss / config.accumulate).backward()
        again = saved_by_a_layer(network, x, y) if saved and checkpointing else 0
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
    seconds = time.perf_counter() - began
    optimizer.swap_ema()
    return Attempt(network, adapter.score(network, "val", device), seconds, peak)


def saved_by_a_layer(network: Any, x: Tensor, y: Tensor) -> int:
    """Bytes that one layer saves: with checkpointing they are made again, a layer at a time, in the backward pass."""
    layer, inputs = network.layers[0], []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args))
    with torch.no_grad():
        network.loss(x, y, seed=0, step=0)
    hook.remove()
    with SavedTensors(network.parameters()).count() as saved:
        layer.layer(*inputs[0])
    return saved.bytes


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
