"""cross_entropy_rows on the CPU against its definition in float64."""

import pytest
import torch

from dbkernels.cross_entropy_rows import cross_entropy_rows_definition
from numerics import EPSILON

op = torch.ops.dbkernels.cross_entropy_rows.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (1, 3000), (70, 257)])
def test_against_float64(shape, dtype):
    """An exponential errs by the rounding of its argument, up to 60 here."""
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=dtype) * 6
    target = torch.randint(shape[1], shape[:1])
    target[::5] = -1
    logits[-1, target[-1].clamp(min=0)] = 40
    factor = torch.rand(shape[0], dtype=dtype)
    exact = logits.double().clone()
    loss = cross_entropy_rows_definition(exact, target, factor.double())
    for out in (None, torch.empty(shape, dtype=torch.bfloat16)):
        given = torch.cat([logits, logits], 1)[:, : shape[1]]  # rows that aren't behind each other
        ours = op(given, target, factor, out)
        assert ((ours.double() - loss).abs() <= 64 * EPSILON[dtype] * loss.abs() + 1e-30).all()
        where, unit = (given, 64 * EPSILON[dtype]) if out is None else (out, EPSILON[torch.bfloat16])
        assert ((where.double() - exact).abs() <= unit * exact.abs() + 1e-37).all()
    assert torch.equal(op(logits.clone(), target, None, None), ours)


def test_threads_and_repeats_give_the_same_bits():
    logits, target = torch.randn(300, 500), torch.randint(500, (300,))
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            given = logits.clone()
            runs.append((op(given, target, torch.ones(300), None), given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad):
    logits = torch.zeros(2, 20)
    logits[0, 3] = bad
    loss = op(logits.clone(), torch.tensor([1, 1]), None, None)
    assert loss[0].isnan() and loss[1].isfinite()
    assert not cross_entropy_rows_definition(logits, torch.tensor([1, 1]))[0].isfinite()
