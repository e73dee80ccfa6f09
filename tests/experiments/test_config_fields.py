"""Every number of every config works as documented, or is refused in one line that names it."""

from __future__ import annotations

import dataclasses
import math
import os
import random

import pytest
import torch

import tiny_all
from diffusionblocks.experiments import commands
from diffusionblocks.experiments.config import TrainConfig
from diffusionblocks.experiments.tasks import task_of
from diffusionblocks.training.devices import pick_device

FLOATS = (-math.inf, -1.0, -1e-300, 0.0, 1e-300, 1.0, 2.0, 1e6, 1e30, math.inf, math.nan)
INTS = (-1, 0, 1, 2, 7)
TRIED = int(os.environ.get("FIELD_VALUES", "1"))  # of each field, by chance; all of them take ten minutes
STEPS = 12  # the recurrent model's passes are drawn for every step by each config that is made

COMMON = {field.name for field in dataclasses.fields(TrainConfig)}


def values(value):
    """What a field is tried with: by its type, alone or in a tuple."""
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return [(number,) for number in FLOATS]
    if isinstance(value, bool):
        return []
    return FLOATS if isinstance(value, float) else INTS if isinstance(value, int) else []


def two_steps(config):
    task = task_of(config)  # not the one whose data are loaded once: it compares them with the model
    batches = task.batches(pick_device(config.device))
    trainer = commands.trainer_of(task)
    for step in range(2 * config.accumulate):
        trainer.step(*batches.batch(step))


def attempt(name, out, field, value, of_model):
    config = tiny_all.config(name, out, steps=STEPS)
    if of_model:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **{field: value}))
    return dataclasses.replace(config, **{field: value})


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_all.CONFIGS)
def test_a_number_works_or_is_refused_by_name(name, tmp_path):
    config, chance = tiny_all.config(name, tmp_path, steps=STEPS), random.Random(name)
    for of_model, owner in ((False, config), (True, config.model)):
        for field in dataclasses.fields(owner):
            found = values(getattr(owner, field.name))
            tried = TRIED if field.name in COMMON else 2 * TRIED  # those of every architecture come once with each
            for i, value in enumerate(chance.sample(found, min(tried, len(found)))):
                try:
                    two_steps(attempt(name, tmp_path / f"{field.name}{i}", field.name, value, of_model))
                except (ValueError, TypeError) as error:
                    assert "\n" not in str(error) and field.name in str(error), (field.name, value, error)


@pytest.mark.parametrize("name", tiny_all.CONFIGS)
def test_no_float_may_be_infinite_or_nan(name, tmp_path):
    config = tiny_all.config(name, tmp_path)
    for of_model, owner in ((False, config), (True, config.model)):
        for field in dataclasses.fields(owner):
            for value in values(getattr(owner, field.name)):
                number = value[0] if isinstance(value, tuple) else value
                if not math.isfinite(number):
                    with pytest.raises(ValueError, match=field.name):
                        attempt(name, tmp_path, field.name, value, of_model)


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip", -1.0), ("weight_decay", -0.1), ("seed", -1), ("overlap", -0.1), ("lr", 0.0), ("tune_lr", (1e-3, 0.0)),
     ("tune_warmup", (1.0,)), ("warmup", -0.1), ("ema", 1.0)],
)  # fmt: skip
def test_what_means_nothing_is_refused(field, value, tmp_path):
    with pytest.raises(ValueError, match=field):
        tiny_all.config("vit", tmp_path, **{field: value})


@pytest.mark.parametrize("overlap", [5.0, 100.0, 1e6, 1e300])
def test_a_large_overlap_is_the_whole_range(overlap, tmp_path):
    partition = tiny_all.task(tiny_all.config("vit", tmp_path, overlap=overlap)).model().partition
    if overlap >= 100:
        assert all(partition.trained(b) == (partition.sigma_min, partition.sigma_max) for b in range(3))
    sigma = partition.draw(1, torch.rand(64))
    assert bool(((sigma >= partition.sigma_min) & (sigma <= partition.sigma_max)).all())


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:99", "tpu9", "xpu", ""])
def test_a_device_that_cannot_train_is_refused(device):
    with pytest.raises(ValueError, match=f"device={device!r}"):
        pick_device(device)
