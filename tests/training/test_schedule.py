"""Whose turn it is, and the learning rate of a step."""

from __future__ import annotations

import math

import pytest

from diffusionblocks.training.schedule import learning_rate, turn


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_every_block_has_one_visit_per_round(blocks):
    for round_ in range(6):
        turns = [turn(round_ * blocks + i, blocks, seed=3) for i in range(blocks)]
        assert sorted(turns) == list(range(blocks))


def test_the_order_is_drawn_for_each_round_and_seed():
    def orders(seed):
        return [tuple(turn(8 * r + i, 8, seed=seed) for i in range(8)) for r in range(5)]

    assert len(set(orders(0))) == 5 and not set(orders(0)) & set(orders(1))
    backwards = [turn(i, 8, seed=0) for i in reversed(range(40))]  # a function of the step alone
    assert [t for order in orders(0) for t in order] == backwards[::-1]


@pytest.mark.parametrize(("step", "expected"), [
    (0, 0.05), (1, 0.1), (3, 0.2), (4, 0.2),
    (8, 0.2 * 0.5 * (1 + math.cos(math.pi * 4 / 16))), (12, 0.1), (20, 0.0), (21, 0.0), (40, 0.0),
])  # fmt: skip
def test_the_rate_rises_linearly_and_falls_along_a_cosine(step, expected):
    assert learning_rate(step, steps=20, peak=0.2, warmup=4) == pytest.approx(expected, abs=1e-12)


def test_without_an_end_or_a_warmup():
    assert [learning_rate(s, steps=None, peak=0.3, warmup=2) for s in (0, 1, 2, 999)] == [0.15, 0.3, 0.3, 0.3]
    assert learning_rate(0, steps=10, peak=0.3, warmup=0) == 0.3
    assert learning_rate(5, steps=4, peak=0.3, warmup=4) <= 0.3  # a warm-up as long as all steps divides by nothing
