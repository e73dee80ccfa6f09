"""The watch for losses and gradients that aren't finite: it remembers the first bad step."""

from __future__ import annotations

import math

import pytest
import torch

from diffusionblocks.denoiser import BlockLoss
from diffusionblocks.training.finite import FiniteWatch, NonFiniteLoss

CPU = torch.device("cpu")
GOOD = torch.tensor(1.0)
bad_values = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def loss(value, *levels):
    sigma = torch.tensor(levels)
    return BlockLoss(torch.tensor(value), sigma, torch.full_like(sigma, value), None)


def message(watch):
    with pytest.raises(NonFiniteLoss) as caught:
        watch.check()
    return str(caught.value)


@bad_values
def test_the_first_bad_step_is_remembered_not_a_later_one(bad):
    watch = FiniteWatch(CPU, "sigma")
    watch.update(3, 1, [loss(1.0, 0.5, 2.0)], GOOD)
    watch.check()
    watch.update(4, 2, [loss(bad, 0.25, 8.0)], GOOD)
    watch.update(5, 0, [loss(bad, 1.0, 3.0)], torch.tensor(bad))
    watch.update(6, 1, [loss(1.0, 1.0, 3.0)], GOOD)
    assert "block 2 is not finite at step 4 (sigma from 0.25 to 8)" in message(watch)


@bad_values
def test_levels_are_those_of_the_first_bad_batch(bad):
    watch = FiniteWatch(CPU, "t")
    watch.update(7, 0, [loss(1.0, 0.1, 0.2), loss(bad, 0.3, 0.4), loss(bad, 0.5, 0.6)], GOOD)
    assert "step 7 (t from 0.3 to 0.4)" in message(watch)


@bad_values
def test_a_bad_norm_alone_names_the_levels_of_all_batches(bad):
    watch = FiniteWatch(CPU, "sigma")
    watch.update(0, 0, [loss(1.0, 0.5, 0.7), loss(1.0, 0.3, 0.6)], torch.tensor(bad))
    assert "block 0 is not finite at step 0 (sigma from 0.3 to 0.7)" in message(watch)
    assert "step 0" in message(watch), "it stays"


@bad_values
def test_a_batch_that_holds_what_is_not_finite_is_to_blame_and_a_later_one_is_not(bad):
    watch = FiniteWatch(CPU, "sigma")
    watch.look(torch.zeros(0), torch.tensor([1, 2]), torch.tensor([1.0, bad]))
    watch.update(0, 0, [loss(1.0, 0.5)], GOOD)  # e.g. where a mask hides it
    watch.update(1, 0, [loss(bad, 0.5)], GOOD)
    assert "Lower lr" in message(watch)
    watch.forget()
    watch.look(torch.tensor([complex(0, bad)]))
    watch.look(torch.ones(2))  # another batch of the step
    watch.update(2, 0, [loss(bad, 0.5)], GOOD)
    assert "The batch itself, x or y, holds NaN or infinity: mend the data" in message(watch)
