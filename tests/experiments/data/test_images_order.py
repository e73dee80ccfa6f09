"""The order of the batches: every sample once an epoch, the same after a resume."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionblocks.experiments.data.batches import batch_indices


@settings(deadline=None)  # the first example pays for imports and caches
@given(n=st.integers(1, 50), batch_size=st.integers(1, 120), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_every_batch_is_full_and_every_epoch_holds_every_sample_once(n, batch_size, seed, epochs):
    steps = -(-epochs * n // batch_size)
    batches = [batch_indices(n, batch_size, seed=seed, step=step) for step in range(steps)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    row = torch.cat(batches)[: epochs * n].reshape(epochs, n)
    assert torch.equal(row.sort(1).values, torch.arange(n).expand(epochs, n))


@settings(deadline=None)
@given(n=st.integers(1, 50), small=st.integers(1, 20), factor=st.integers(1, 5), step=st.integers(0, 10**6))
def test_batches_cut_one_row_whatever_their_size(n, small, factor, step):
    large = batch_indices(n, small * factor, seed=7, step=step)
    pieces = [batch_indices(n, small, seed=7, step=step * factor + part) for part in range(factor)]
    assert torch.equal(large, torch.cat(pieces))


def test_order_changes_with_epoch_and_seed_and_is_shuffled():
    first, second = (batch_indices(100, 100, seed=0, step=step) for step in (0, 1))
    other = batch_indices(100, 100, seed=1, step=0)
    orders = {tuple(order.tolist()) for order in (first, second, other, torch.arange(100))}
    assert len(orders) == 4


def test_writing_into_a_batch_does_not_change_later_ones():
    batch_indices(10, 10, seed=0, step=0).zero_()
    assert batch_indices(10, 10, seed=0, step=0).unique().numel() == 10


def test_order_ignores_and_spares_the_global_generator():
    torch.manual_seed(1)
    a = batch_indices(1000, 64, seed=123, step=5)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(2)
    batch_indices.__globals__["_permutation"].cache_clear()
    assert torch.equal(a, batch_indices(1000, 64, seed=123, step=5))


@pytest.mark.parametrize(
    ("n", "batch_size", "seed", "step"), [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)]
)
def test_order_refuses_impossible_numbers(n, batch_size, seed, step):
    with pytest.raises(ValueError, match=r"need|seed"):
        batch_indices(n, batch_size, seed=seed, step=step)
