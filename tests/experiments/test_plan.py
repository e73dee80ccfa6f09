"""A plan is what a run then takes."""

from __future__ import annotations

import pytest
import torch

import tiny
from diffusionblocks.experiments.plan import plan, plans, smallest_fit
from diffusionblocks.experiments.session import train
from diffusionblocks.experiments.tasks import adapter_of
from diffusionblocks.training.memory import parse_bytes, readable

CPU = torch.device("cpu")
CHANGES = [
    {},
    {"blocks": 1},
    {"blocks": 2},  # layers 2 + 1
    {"shared": "per_block"},
    {"shared": "frozen"},
    {"ema": 0.0},
    {"precision": "bfloat16"},
    {"recipe": "published", "lr": 1e-3},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_measured_bytes_are_within_five_percent_of_the_plan(tmp_path, change):
    config = tiny.config(tmp_path, steps=30, **change)
    session, rows = tiny.session(config), []
    train(session, tiny.RandomBatches(), on_log=rows.append, on_step=lambda: None)
    measured = max((row["bytes"] for row in rows), key=lambda bytes_: sum(bytes_.values()))
    planned = plan(adapter_of(config), CPU).by_category
    assert measured.keys() == planned.keys()
    for category, count in planned.items():
        assert measured[category] == pytest.approx(count, rel=0.05), category


def test_more_blocks_take_less(tmp_path):
    table = plans(adapter_of(tiny.config(tmp_path)), CPU)
    assert list(table) == [1, 2, 3]
    totals = [table[blocks].total for blocks in table]
    assert totals == sorted(totals, reverse=True) and totals[-1] < 0.5 * totals[0]
    assert smallest_fit(table, totals[1]) == 2
    assert smallest_fit(table, totals[0] + 1) == 1
    assert smallest_fit(table, totals[-1] - 1) is None


def test_a_plan_allocates_nothing(tmp_path):
    huge = tiny.config(tmp_path, batch_size=10**7)
    assert plan(adapter_of(huge), CPU).total > 2**34  # would not fit this process: it exists on paper alone


@pytest.mark.parametrize(
    "text, count", [("24GiB", 24 * 2**30), ("512MB", 512 * 10**6), ("1e6", 10**6), (" 2 KiB ", 2048), ("7b", 7)]
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "24 apples", "nan", "0"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="memory must be like"):
        parse_bytes(text)


def test_readable():
    assert [readable(n) for n in (5, 2048, 3 * 2**20, 5000 * 2**30)] == ["5 B", "2.0 KiB", "3.0 MiB", "5000.0 GiB"]
