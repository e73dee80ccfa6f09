"""A tiny run of every architecture: what tests of the library on a GPU run, and on the CPU beside."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tiny
import tiny_dit
import tiny_lm
from diffusionblocks.experiments.config import TrainConfig
from diffusionblocks.experiments.models.masked_lm import MaskedLMConfig
from diffusionblocks.experiments.models.recurrent import RecurrentConfig
from diffusionblocks.experiments.session import Session, train
from diffusionblocks.experiments.tasks import ADAPTERS, Adapter, adapter_of
from diffusionblocks.experiments.tasks.masked_lm import MaskedLMRun
from diffusionblocks.experiments.tasks.recurrent import RecurrentRun

SYMBOLS = 64  # of the embedded text
COMMON = dict(batch_size=8, baseline=(), visit=3, checkpoint_every=7, ema=0.9, lr=2e-3, warmup=0.2, store="host")
CONFIGS: dict[str, TrainConfig] = {
    "vit": tiny.CONFIG,
    "dit": tiny_dit.CONFIG,
    "masked_lm": MaskedLMRun(model=MaskedLMConfig(dim=16, layers=3, mlp=24, cond=8), length=12, levels=3),
    # two streams: the noisy one's groups attend to the clean one
    "causal_lm": tiny_lm.config(replace(tiny_lm.KINDS["groups of 4"], symbols=SYMBOLS), combine="none", evaluated=384),
    "recurrent": RecurrentRun(
        model=RecurrentConfig(dim=16, layers=2, heads=2, mlp=24, prelude=1, coda=1), size=6, evaluated=32
    ),
}
assert CONFIGS.keys() == ADAPTERS.keys()


class Stop(Exception):
    """Training is to end here."""


def config(name: str, out: Path, **changes: Any) -> TrainConfig:
    """Return the tiny run of an architecture, writing to `out`; blocks wait on the host."""
    return replace(CONFIGS[name], **(COMMON | {"out": out} | changes))


def adapter(config_: TrainConfig) -> Adapter:
    """Return the architecture of a run; the data, which are the same for all, are read once."""
    made = adapter_of(config_)
    if isinstance(vars(type(made)).get("data"), functools.cached_property):
        vars(made)["data"] = _data(config_.architecture)
    return made


@functools.cache
def _data(name: str) -> Any:
    return adapter_of(CONFIGS[name]).data


def session(config_: TrainConfig, device: torch.device) -> Session:
    """Return a fresh session of a run, with the same weights on every device."""
    return Session(adapter(config_).blocks(), config_, device=device, folder=config_.out / "waiting")


def run(session_: Session, *, until: int) -> list[float]:
    """Train up to step `until`; return the loss of every step, in order."""
    losses: list[torch.Tensor] = []
    objective = session_.model.loss_at

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = objective(*args, **kwargs)
        losses.append(loss.loss.detach())
        return loss

    def stop() -> None:
        if session_.step >= until:
            raise Stop

    session_.model.loss_at = watched
    try:
        train(session_, adapter(session_.config).batches(session_.device), on_log=lambda row: None, on_step=stop)
    except Stop:
        pass
    finally:
        del session_.model.loss_at
    return [float(loss) for loss in losses]


def tensors(session_: Session) -> dict[str, torch.Tensor]:
    """Return all that a session has learnt, copied to the host: weights, moments and averages by name."""
    residency = session_.residency
    return {
        f"{part}/{name}": t.detach().to("cpu", copy=True)
        for part in residency.parts
        for name, t in residency.tensors(part).items()
    }
