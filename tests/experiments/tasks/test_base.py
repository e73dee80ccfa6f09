"""What all tasks share: the loader's position, comparing metrics, options of sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import pytest

import tiny
from diffusionblocks.experiments.tasks import TASKS, task_of
from diffusionblocks.experiments.tasks.base import Addresses, Metric, parse_options


def test_addresses_go_on_from_their_position():
    addresses, other = Addresses(), Addresses()
    assert list(islice(addresses, 3)) == [0, 1, 2] and addresses.state_dict() == {"position": 3}
    other.load_state_dict(addresses.state_dict())
    assert list(islice(other, 2)) == [3, 4] and other.position == 5


def test_better_is_more_or_less_and_never_nan():
    accuracy, bits = Metric("accuracy", "accuracy %"), Metric("bits", "bits", higher=False)
    assert accuracy.better(2, 1) and not accuracy.better(1, 2) and not accuracy.better(1, 1)
    assert bits.better(1, 2) and not bits.better(2, 1)
    assert not any(metric.better(math.nan, 1) for metric in (accuracy, bits))


def test_a_config_has_its_task(tmp_path):
    assert type(task_of(tiny.config(tmp_path))) is TASKS["vit"]


def test_unknown_options_are_refused():
    @dataclass
    class Options:
        steps: int = 3

    assert parse_options(Options, {"steps": 4}, "images").steps == 4
    with pytest.raises(ValueError, match="images take no label, prompt; leave it out"):
        parse_options(Options, {"steps": 4, "prompt": "a", "label": 1}, "images")
