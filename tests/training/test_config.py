"""Settings of a Trainer: what they mean and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest

from diffusionblocks.training.config import TrainerConfig


def test_every_setting_has_a_default_and_cannot_be_changed():
    config = TrainerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    assert dataclasses.replace(config, lr=0.1).lr == 0.1
    with pytest.raises(ValueError, match="lr must be positive"):
        dataclasses.replace(config, lr=0.0)


@pytest.mark.parametrize(("settings", "warmup", "trunk"), [
    (dict(), 0, 0), (dict(warmup=7), 7, 0), (dict(steps=50, warmup=0.1, branch=0.3), 5, 15),
    (dict(steps=50, warmup=10, branch=0.999), 10, 49), (dict(steps=1, branch=0.9), 0, 0),
])  # fmt: skip
def test_shares_become_steps(settings, warmup, trunk):
    config = TrainerConfig(**settings)
    assert (config.warmup_steps, config.trunk_steps, config.total_steps) == (warmup, trunk, settings.get("steps"))


FLOATS = [f.name for f in dataclasses.fields(TrainerConfig) if isinstance(f.default, float)]
COUNTS = ["visit", "accumulate", "log_every", "steps", "slots"]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_are_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainerConfig(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -3, 1.5, True, "5"])
def test_counts_are_whole_and_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        TrainerConfig(**{name: value})


@pytest.mark.parametrize("name", ["compile", "capture", "checkpoint_layers", "adapt", "pin"])
@pytest.mark.parametrize("value", ["yes", 3])
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*got {value!r}"):
        TrainerConfig(**{name: value})


@pytest.mark.parametrize(("settings", "words"), [
    (dict(lr=0.0), "lr must be positive"), (dict(weight_decay=-1), "weight_decay must be at least 0"),
    (dict(clip=-1.0), "clip must be at least 0"), (dict(seed=-1), "seed must be"), (dict(seed=0.5), "seed must be"),
    (dict(warmup=-1), "warmup must be at least 0"), (dict(ema=-0.1), "ema must be in"), (dict(ema=1.0), "ema must"),
    (dict(branch=1.0, steps=5), "branch must be a share"), (dict(branch=0.5), "set steps"),
    (dict(warmup=0.5), "set steps"), (dict(precision="float16"), "precision must be one of 'float32', 'bfloat16'"),
    (dict(offload="gpu"), "offload must be one of None, 'cpu', 'disk', 'auto'"),
    (dict(loggers=("jsonl", "csv")), "loggers must be among jsonl, tensorboard, wandb, got 'csv'"),
])  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainerConfig(**settings)
