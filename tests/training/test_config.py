"""Settings of a Trainer: what they mean and what is refused."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

import numpy
import pytest

from diffusionblocks.training.config import TrainerConfig
from diffusionblocks.training.schedule import warn_untrained
from diffusionblocks.training.settings import settings_from


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
    (dict(slots=2), "slots=2 is for blocks that wait"), (dict(slots="2"), "slots must be one of 1, 2, got '2'"),
    (dict(seed="a"), "seed must be a whole number, got 'a'"), (dict(lr="1e-3"), "lr must be a number, got '1e-3'"),
    (dict(ema=None), "ema must be a number, got None"), (dict(folder=5), "folder must be a path, got 5"),
    (dict(train_blocks=0), "train_blocks must be a tuple, e.g. .*got 0"), (dict(mesh=[1]), "mesh must be a tuple of 2"),
    (dict(train_blocks=["0"]), "each of train_blocks must be a whole number"), (dict(mesh=(0, 1)), "mesh must be"),
    (dict(loggers=("jsonl", "csv")), "loggers must be one of 'jsonl', 'tensorboard', 'wandb', got 'csv'"),
])  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainerConfig(**settings)


def test_values_of_other_types_are_taken_as_what_they_mean():
    given = dict(
        lr=numpy.float32(0.5), clip=1, visit=numpy.int64(3), slots=numpy.int64(2), pin=numpy.True_, offload="cpu",
        train_blocks=[0, numpy.int64(2)], mesh=[1, 2], loggers="wandb", folder="here",
    )  # fmt: skip
    meant = given | dict(lr=0.5, clip=1.0, visit=3, slots=2, pin=True, train_blocks=(0, 2), mesh=(1, 2))
    meant |= dict(loggers=("wandb",), folder=Path("here"))
    config = TrainerConfig(**given)
    for name, value in meant.items():
        assert getattr(config, name) == value and type(getattr(config, name)) in (type(value), type(Path()))


@pytest.mark.parametrize(("given", "words"), [
    ({"step": 3}, "no setting 'step'; perhaps steps"), ({"bandwith": 1}, "perhaps bandwidth"),
    ({"learning_rate": 1.0}, "no setting 'learning_rate'; known: lr, steps, "),
])  # fmt: skip
@pytest.mark.parametrize("config", [None, TrainerConfig()])
def test_what_is_no_setting_is_named_with_the_nearest_one(config, given, words):
    with pytest.raises(TypeError, match=words):
        settings_from(TrainerConfig, config, given, "bandwidth")
    with pytest.raises(TypeError, match="config must be a TrainerConfig, got float"):
        settings_from(TrainerConfig, 1e-3, {})


@pytest.mark.parametrize(("steps", "own", "words"), [
    (18, range(3), r"18 steps in visits of 25 leave 2 of 3 blocks untrained \(\d, \d\): set visit=6 or less"),
    (2, range(3), "train more steps"), (50, range(3), "leave 1 of 3"), (51, range(3), None), (None, range(3), None),
])  # fmt: skip
def test_a_training_that_ends_before_a_block_had_its_turn_warns(steps, own, words):
    if words:
        with pytest.warns(UserWarning, match=words):
            warn_untrained(own, 3, TrainerConfig(), steps)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_untrained(own, 3, TrainerConfig(), steps)
