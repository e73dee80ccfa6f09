"""Run by test_cross_entropy_rows_triton.py with TRITON_INTERPRET=1: the kernels against their definitions."""

import sys

import pytest
import torch

from dbkernels import denoising_cross_entropy
from dbkernels._cross_entropy_checks import mark_targets
from dbkernels.cross_entropy_rows import cross_entropy_columns_definition, cross_entropy_rows_definition
from dbkernels.triton.cross_entropy_rows import columns, mark, rows
from gpu_library import stand_in
from numerics import EPSILON


def example(count, width, dtype):
    logits = torch.randn(count, width, dtype=dtype) * 5
    target = torch.randint(width, (count,))
    target[0] = -1
    logits[-1, target[-1].clamp(min=0)] = 40  # nearly certain: 1 - p is far below the last place
    return logits, target, torch.rand(count, dtype=dtype) + 0.1


def close(ours, exact, unit, least=0.0):
    """An exponential errs by the rounding of its argument, up to 60 here; float16 is subnormal below 6e-5."""
    near = (ours.double() - exact).abs() <= unit * exact.abs() + least
    return torch.equal(ours.isnan(), exact.isnan()) and bool((near | exact.isnan()).all())


torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    for count, width in ((5, 7), (3, 256), (4, 5000), (1, 1), (6, 9000)):
        logits, target, factor = example(count, width, dtype)
        exact = logits.double().clone()
        loss = cross_entropy_rows_definition(exact, target, factor.double())
        unit, half = 64 * EPSILON[dtype], (EPSILON[torch.float16], 6e-8)
        for way in ("in place", "beside", "overlapping"):
            if way == "overlapping" and dtype == torch.float64:
                continue
            given = logits.clone()
            beside = torch.empty(count, width, dtype=torch.float16)
            out = {"in place": given, "beside": beside, "overlapping": given.view(torch.float16)[:, :width]}[way]
            ours = rows(given, target, factor, out)
            # log's own error, where the loss is near 1, beside the exponentials'
            assert ((ours.double() - loss).abs() <= 8 * EPSILON[dtype] * loss.abs() + EPSILON[dtype] * 1e-5).all()
            assert close(out, exact, *((unit,) if way == "in place" else half)), (count, width, way, dtype)
        assert torch.equal(rows(logits.clone(), target, None, logits), ours)

# What is no word: NaN, in the loss and the gradient
logits, target, factor = example(5, 300, torch.float32)
target[1:4] = torch.tensor([300, -2, 2**40])
exact = logits.clone()
loss = cross_entropy_rows_definition(exact, target, factor)
assert loss.isnan().tolist() == [False, True, True, True, False]
given = logits.clone()
assert rows(given, target, factor, given).isnan().equal(loss.isnan()) and given.isnan().equal(exact.isnan())
assert rows(torch.empty(0, 5), torch.empty(0).long(), None, torch.empty(0, 5)).shape == (0,)

# Columns of logits whose losses are known, one chunk after another: the same gradient
for dtype, half in ((torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, None)):
    logits, target, factor = example(6, 5000, dtype)
    target[2] = 7000
    at = logits.gather(1, target.clamp(0, 4999).unsqueeze(1))
    exact = logits.double().clone()
    loss = cross_entropy_rows_definition(exact, target, factor.double()).to(dtype)
    unit, least = (64 * EPSILON[dtype], 0.0) if half is None else (EPSILON[half] * 2, 6e-8)
    for first, width in ((0, 128), (128, 4000), (4128, 872)):
        chunk = logits[:, first : first + width].clone()
        out = chunk if half is None else chunk.view(half)[:, :width]
        where = torch.empty(6, width, dtype=out.dtype)
        cross_entropy_columns_definition(chunk, target, at, loss, factor, first, where)
        columns(chunk, target, at, loss, factor, first, out)
        for found in (where, out):
            want = exact[:, first : first + width]
            assert close(found, want, unit, least), (half, first)

# Marks
for weighted in (False, True):
    for mean in (False, True):
        target = torch.randint(-3, 12, (2500,))
        weight = torch.rand(2500) if weighted else None
        ours = mark(target, 10, 11, weight, mean, torch.float32)
        exact = mark_targets(target.to("meta"), 10, 11, None, mean, torch.empty(0))  # shapes
        assert [t.shape for t in ours] == [t.shape for t in exact]
        assert torch.equal(ours[0], torch.where(target == 11, -1, torch.where((target < 0) | (target > 9), -2, target)))
        factor = (target != 11) * (1.0 if weight is None else weight) / ((target != 11).sum() if mean else 1)
        torch.testing.assert_close(ours[1], factor)
assert mark(torch.full((3,), 5), 4, 5, None, True, torch.float32)[1].isnan().all()
# Weights of any layout, and what an ignored row weighs doesn't count, whatever it is
target = torch.tensor([3, 5, 2, 1])
for weight in (torch.rand(4, 2)[:, 1], torch.rand(()).expand(4), torch.tensor([1.0, torch.inf, 2.0, 3.0])):
    factor = mark(target, 4, 5, weight, False, torch.float32)[1]
    assert torch.equal(factor, torch.where(target == 5, 0, weight)), weight
# Few rows by their own way, the kernel counting them, against the other
few_rows = sys.modules["dbkernels._few_rows"]
for dtype in (torch.float32, torch.float64):
    for reduction in ("mean", "sum"):
        for shape in ((7,), (3, 5), (1,)):
            h, weight = torch.randn(*shape, 6, dtype=dtype), torch.randn(20, 6, dtype=dtype)
            target = torch.randint(20, shape)
            target.view(-1)[1:3] = -100
            results = []
            for direct in (True, False):
                few_rows.direct = lambda *tensors, direct=direct: direct
                leaves = [h.clone().requires_grad_(), weight.clone().requires_grad_()]
                loss = denoising_cross_entropy(*leaves, target, reduction=reduction)
                assert ("FewRows" in loss.grad_fn.name()) == direct
                with torch.no_grad():
                    torch.testing.assert_close(denoising_cross_entropy(*leaves, target, reduction=reduction), loss)
                results.append((loss, *torch.autograd.grad(3 * loss, leaves)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=64 * EPSILON[dtype], atol=64 * EPSILON[dtype])

# Halves, their gradient over the logits: only the products are NumPy's
with pytest.MonkeyPatch.context() as patch:
    stand_in(patch, 2**20)
    h, weight = torch.randn(9, 6).bfloat16().requires_grad_(), torch.randn(21, 6).bfloat16().requires_grad_()
    target = torch.randint(21, (9,))
    results = []
    for direct in (True, False):
        few_rows.direct = lambda *tensors, direct=direct: direct
        loss = denoising_cross_entropy(h, weight, target)
        results.append((loss, *torch.autograd.grad(loss, (h, weight))))
    for a, b in zip(*results, strict=True):  # the interpreter cuts halves off, where the definition rounds them
        assert a.dtype == b.dtype and (a - b).abs().max() <= 2 * EPSILON[torch.bfloat16] * b.abs().max()

few_rows.direct = lambda *tensors: True
h, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
loss = denoising_cross_entropy(h, weight, torch.full((4,), -100))
assert loss.isnan() and torch.autograd.grad(loss, h)[0].abs().sum() == 0
loss = denoising_cross_entropy(h, weight, torch.tensor([1, 7, 0, -1]))
assert loss.isnan() and torch.autograd.grad(loss, h)[0].isnan().all(1).tolist() == [False, True, False, True]
try:
    torch.autograd.grad(denoising_cross_entropy(h, weight, torch.ones(4).long()), h, create_graph=True)
    raise AssertionError("a second derivative")
except RuntimeError as error:
    assert "no second derivative" in str(error)
print("interpreted: ok")
