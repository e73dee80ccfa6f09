"""Training of a base and of its forks, for forks.py: weights are given to one network by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fork_arms import Arm, Fork, Weights, copies, whole
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import dbkernels
from diffusionblocks import DiffusionBlocks
from diffusionblocks.experiments.tasks import Task
from diffusionblocks.noise.rng import stream
from diffusionblocks.targets.masked import MaskedTarget

EXTRA = 0.05  # steps of an arm, as a share of the base's
COOLING = 0.2  # share of the base's steps in which its learning rate falls
FLOOR = 0.1  # what it falls to, as a share of the peak
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the sum of the forks' changes, for a merged network


class Losses(nn.Module):
    """A network's loss as `forward`, for weights that are given with every call."""

    def __init__(self, network: DiffusionBlocks, seed: int):
        super().__init__()
        self.network, self.seed = network, seed

    def forward(self, x: Tensor, y: Tensor, sigma: Tensor, step: int, raw: bool = False) -> tuple[Tensor, Any]:
        """Return the loss of each sample, and the raw output if asked for."""
        network, target = self.network, self.network.target
        noised = target.add_noise(y, sigma, seed=stream(self.seed, "eps"), offset=step)
        features = network.blocks[0](x, noised.scaled, noised.c_noise, network.stem_head)
        output = (target.read(features, noised.z, sigma).raw, noised.z) if raw else None
        return target.loss(features, noised, y, sigma).per_sample, output


@dataclass
class Setting:
    """A base's network and data. steps: of the base; losses: the network, whose own weights are not used."""

    task: Task
    losses: Losses
    steps: int
    device: torch.device

    def loss(self, weights: Weights, *batch: Any, raw: bool = False) -> tuple[Tensor, Any]:
        """Return the loss of each sample of (x, y, sigma, step), and the raw output if asked for."""
        named = {f"network.{name}": t for name, t in weights.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return functional_call(self.losses, named, batch, {"raw": raw})


def setting_of(task: Task, device: torch.device) -> Setting:
    """Return the network of one block of the task's, for all noise, on the device."""
    config = task.config
    lone = type(task)(dataclasses.replace(config.in_one_block(max(config.layer_counts)), steps=config.steps))
    lone.__dict__["data"] = task.data  # read once
    model = lone.model().to(device)
    return Setting(lone, Losses(model, config.seed), config.steps, device)


def warm_and_cool(done: float) -> float:
    """Return the base's learning rate as a share of the peak: it rises, stays, and falls to FLOOR."""
    cooled = max(0.0, (done - (1 - COOLING)) / COOLING)
    return min(done / 0.02, FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * cooled)), 1.0)


def adamw(leaves: Weights, state: Weights, config: Any, lr: float) -> torch.optim.Optimizer:
    """Return AdamW of the leaves, with the base's moments where a leaf began as a weight of it."""
    groups = [
        {"params": [t for t in leaves.values() if t.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [t for t in leaves.values() if t.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    for name, leaf in leaves.items():
        key = name.partition("#")[2]
        if f"exp_avg/{key}" in state:
            moments = {n: state[f"{n}/{key}"].clone() for n in ("exp_avg", "exp_avg_sq")}
            optimizer.state[leaf] = {"step": state["step"].clone().float(), **moments}
    return optimizer


def draw(setting: Setting, model: DiffusionBlocks, fork: Fork, range_: int | None, y: Tensor, step: int) -> Tensor:
    """Return a step's levels of noise: of the range, but for the fork's share from all noise."""
    shape, seed, device = model.target.level_shape(y), setting.task.config.seed, y.device
    everywhere = model.draw_sigma(None, shape, seed=seed, step=step, device=device)
    if range_ is None:
        return everywhere
    sigma = model.draw_sigma(range_, shape, seed=seed, step=step, device=device)
    if not fork.everywhere:
        return sigma
    u = dbkernels.philox_uniform(shape, seed=stream(seed, "everywhere"), offset=step, device=device)
    return torch.where(u < fork.everywhere, everywhere, sigma)


def disagreement(setting: Setting, output: Any, base: Any) -> Tensor:
    """Return the distance between two raw outputs: squared, or of masked tokens' distributions in nats."""
    (raw, z), (other, _) = output, base
    if not isinstance(setting.losses.network.target, MaskedTarget):
        return (raw - other).square().mean()
    masked = z == setting.losses.network.target.mask_id
    apart = nn.functional.kl_div(raw.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return (apart * masked).sum() / masked.sum().clamp(min=1)


def train(
    setting: Setting,
    model: DiffusionBlocks,
    fork: Fork,
    state: Weights,
    steps: int,
    rate: Callable[[float], float],
    *,
    address: Callable[[int], int],
    keep: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
) -> None:
    """Train a fork's leaves in place. model: whose ranges of noise they are; address: of a step's batch and noise."""
    config, batches = setting.task.config, setting.task.batches(setting.device)
    for leaf in fork.leaves.values():
        leaf.requires_grad_(True)
    base = weights_of(state)
    optimizer = adamw(fork.leaves, state, config, config.lr)
    for step in range(steps):
        at, range_ = address(step), fork.ranges[step % len(fork.ranges)]
        x, y = batches.batch(at)
        batch = (x, y, draw(setting, model, fork, range_, y, at), at)
        per_sample, output = setting.loss(
            fork.weights(fork.leaves, range_, step / steps), *batch, raw=fork.agreement > 0
        )
        loss = per_sample.mean()
        if fork.agreement:
            with torch.no_grad():
                told = setting.loss(base, *batch, raw=True)[1]
            loss = loss + fork.agreement * disagreement(setting, output, told)
        loss.backward()
        nn.utils.clip_grad_norm_(fork.leaves.values(), config.clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * fork.lr * rate((step + 1) / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep(step, optimizer)
    for leaf in fork.leaves.values():
        leaf.requires_grad_(False)


def train_base(setting: Setting) -> tuple[Weights, Weights]:
    """Return the state of the base, weights, moments and step, before its learning rate cooled down, and after."""
    names = [name for name, p in setting.losses.network.named_parameters() if p.requires_grad]
    start = dict(setting.losses.network.named_parameters())
    fork = Fork(copies({name: start[name].detach() for name in names}), (None,), whole)
    kept: list[Weights] = []

    def keep(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step + 1 not in (round((1 - COOLING) * setting.steps), setting.steps):
            return
        state = {name: fork.leaves[f"#{name}"].detach().clone() for name in names}
        for name in names:
            moments = optimizer.state[fork.leaves[f"#{name}"]]
            state |= {f"{n}/{name}": moments[n].clone() for n in ("exp_avg", "exp_avg_sq")}
        kept.append(state | {"step": torch.tensor(step + 1)})

    model = setting.losses.network
    train(setting, model, fork, {}, setting.steps, warm_and_cool, address=lambda step: step, keep=keep)
    return kept[0], kept[1]


def weights_of(state: Weights) -> Weights:
    """Return the weights in a base's state."""
    return {name: t for name, t in state.items() if "/" not in name and name != "step"}


def states(key: str, setting: Setting, folder: Path) -> list[Weights]:
    """Return the base's states before and after its learning rate cooled down, trained unless its files are there."""
    files = [folder / f"{key}_{name}.safetensors" for name in ("warm", "cooled")]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        for file, state in zip(files, train_base(setting), strict=True):
            save_file(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    return [load_file(file, device=str(setting.device)) for file in files]


def trained(setting: Setting, model: DiffusionBlocks, arm: Arm, state: Weights, rate: float) -> list[list[Weights]]:
    """Train an arm; return the weights of each range, in all ways to merge them if they are merged."""
    base, ranges, begin = weights_of(state), len(model.blocks), int(state["step"])
    made, left = arm.forks(base, ranges), setting.steps * (1 + EXTRA) - begin
    for i, fork in enumerate(made):
        train(
            setting, model, fork, state, round(left / arm.cost / len(made)), lambda done: rate * (1 - done),
            address=lambda step, i=i: begin + step * len(made) + i,
        )  # fmt: skip
    if arm.merged:
        changes = [fork.weights(fork.leaves, None, 1.0) for fork in made]
        merged = [{n: t + share * sum(c[n] - t for c in changes) for n, t in base.items()} for share in SHARES]
        return [[weights] * ranges for weights in merged]
    found = [base] * ranges
    for fork in made:
        for range_ in range(ranges) if fork.ranges == (None,) else fork.ranges:
            assert range_ is not None
            found[range_] = {n: t.detach() for n, t in fork.weights(fork.leaves, range_, 1.0).items()}
    return [found]
