"""Run by test_cross_entropy_rows_triton.py in a process with TRITON_INTERPRET=1: the kernel against the definition."""

import torch

from dbkernels.cross_entropy_rows import cross_entropy_rows_definition
from dbkernels.triton.cross_entropy_rows import launch
from numerics import EPSILON

torch.manual_seed(0)
for rows, width in ((5, 7), (3, 256), (4, 5000), (1, 1), (6, 9000)):
    logits = torch.randn(rows, width) * 5
    target = torch.randint(width, (rows,))
    target[0] = -1
    logits[-1, target[-1].clamp(min=0)] = 40  # nearly certain: 1 - p is far below float32's last place
    factor = torch.rand(rows) + 0.1
    exact = logits.double()
    loss = cross_entropy_rows_definition(exact, target, factor.double())
    for out in (None, torch.empty(rows, width, dtype=torch.float16)):
        given = logits.clone()
        where = given if out is None else out
        ours = launch(given, target, factor, where)
        assert ((ours.double() - loss).abs() <= 8 * EPSILON[torch.float32] * loss.abs() + 1e-12).all(), (rows, width)
        # An exponential errs by the rounding of its argument, up to 60 here; float16 is subnormal below 6e-5.
        unit, least = (64 * EPSILON[torch.float32], 0) if out is None else (EPSILON[torch.float16], 6e-8)
        assert ((where.double() - exact).abs() <= unit * exact.abs() + least).all(), (rows, width)
    assert torch.equal(launch(logits.clone(), target, None, logits), ours)
assert launch(torch.empty(0, 5), torch.empty(0).long(), None, torch.empty(0, 5)).shape == (0,)
print("interpreted: ok")
