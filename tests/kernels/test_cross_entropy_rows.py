"""cross_entropy_rows on the CPU against its definition in float64."""

import pytest
import torch

from dbkernels.cross_entropy_rows import cross_entropy_columns_definition, cross_entropy_rows_definition
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


@pytest.mark.parametrize("by", [op, cross_entropy_rows_definition])
def test_a_target_that_is_no_column_gives_nan(by):
    logits, target = torch.randn(5, 8), torch.tensor([3, 8, -1, -2, 2**40])
    loss = by(logits, target, torch.ones(5), None)
    wrong = [False, True, False, True, True]
    assert loss.isnan().tolist() == wrong and logits.isnan().all(1).tolist() == wrong
    assert logits[[0, 2]].isfinite().all() and loss[2] == 0


def test_columns_give_the_rows_gradient():
    """Of each chunk of columns, from the losses: an exponential errs by the rounding of its argument."""
    logits, target, factor = torch.randn(40, 90) * 6, torch.randint(90, (40,)), torch.rand(40)
    target[::5] = -1
    logits[1, target[1]] = 40
    at = logits.gather(1, target.clamp(min=0).unsqueeze(1))
    exact = logits.double()
    loss = cross_entropy_rows_definition(exact, target, factor.double()).float()
    for first, stop in ((0, 32), (32, 89), (89, 90)):
        chunk = logits[:, first:stop].clone()
        out = chunk.view(torch.bfloat16)[:, : stop - first]  # each row's first half
        full = torch.empty_like(chunk)
        cross_entropy_columns_definition(chunk, target, at, loss, factor, first, full)
        cross_entropy_columns_definition(chunk, target, at, loss, factor, first, out)
        for found, unit in ((full, 64 * EPSILON[torch.float32]), (out, EPSILON[torch.bfloat16])):
            near = (found.double() - exact[:, first:stop]).abs() <= unit * exact[:, first:stop].abs() + 1e-37
            assert near.all()


def examples_on_gpu(dtype, width):
    logits = torch.randn(300, width, device="cuda", dtype=dtype) * 6
    target = torch.randint(width, (300,), device="cuda")
    target[::5] = -1
    logits[1, target[1]] = 40
    exact, factor = logits.double(), torch.rand(300, device="cuda", dtype=dtype)
    return logits, target, factor, exact, cross_entropy_rows_definition(exact, target, factor.double())


def check_gpu(ours, exact, dtype):
    """An exponential errs by the rounding of its argument, up to 60 here, and a half once more; below float16's
    smallest normal number by 6e-8."""
    unit = EPSILON[dtype] if dtype.itemsize == 2 else 64 * EPSILON[dtype]
    assert ((ours.double() - exact).abs() <= unit * exact.abs() + (6e-8 if dtype == torch.float16 else 1e-37)).all()


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [257, 32000])
def test_gpu_rows_in_place(width, dtype):
    logits, target, factor, exact, loss = examples_on_gpu(dtype, width)
    ours = op(logits, target, factor, None)
    # The loss near 0 is rest's, a sum of exponentials; near 1 log's own error comes in.
    assert ((ours.double() - loss).abs() <= 64 * EPSILON[dtype] * (loss.abs() + 1e-6)).all()
    check_gpu(logits, exact, dtype)


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [257, 5000, 32000])
def test_gpu_halves_over_the_logits(width, half):
    """Reads must end before writes begin: any race would show as wrong numbers in some of the repetitions."""
    logits, target, factor, exact, _ = examples_on_gpu(torch.float32, width)
    at = logits.gather(1, target.clamp(min=0).unsqueeze(1))
    for _ in range(20):
        given = logits.clone()
        out = given.view(half)[:, :width]
        loss = op(given, target, factor, out)
        check_gpu(out, exact, half)
        first, stop = width // 3, width - 1
        chunk = logits[:, first:stop].clone()
        out = chunk.view(half)[:, : stop - first]
        torch.ops.dbkernels.cross_entropy_columns.default(chunk, target, at, loss, factor, first, out)
        check_gpu(out, exact[:, first:stop], half)
