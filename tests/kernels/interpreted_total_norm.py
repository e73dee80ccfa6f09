"""Run by test_total_norm.py with TRITON_INTERPRET=1: the kernels on the CPU, against the definition."""

import itertools

import torch

from dbkernels import total_norm_reference
from dbkernels.triton import total_norm as module
from dbkernels.triton.total_norm import BLOCK, CHUNK, plan_for, total_norm
from numerics import EPSILON

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = [(7, 3), (0,), (1,), (), (BLOCK,), (CHUNK + 5,), (2 * CHUNK,)]


def check(tensors, case):
    ours, exact = total_norm(tensors), total_norm_reference([tensor.double() for tensor in tensors])
    assert ours.dim() == 0 and ours.dtype == total_norm_reference(tensors).dtype, case
    assert abs(ours - exact) <= max(EPSILON[ours.dtype] / 2, 2.0**-40) * exact, case
    assert torch.equal(ours, total_norm(tensors)), case


torch.manual_seed(0)
for dtypes in [*((d,) for d in FLOATS), FLOATS[:3], FLOATS]:
    check([torch.randn(s).to(d) for s, d in zip(SHAPES, itertools.cycle(dtypes))], dtypes)
check([torch.randn(i % 30) for i in range(280)], "more than one look")
check([torch.randn(BLOCK + 9)[1:], torch.randn(CHUNK + 1).bfloat16()[1:]], "unaligned")
check([torch.randn(30, 70).t(), torch.randn(9, 8)[::2, 1:]], "strided")
assert torch.equal(total_norm([torch.empty(0), torch.empty(2, 0)]), torch.tensor(0.0))
for value, dtype in itertools.product((float("nan"), float("inf")), FLOATS):
    bad = torch.ones(CHUNK + 9, dtype=dtype)
    bad[CHUNK + 3] = value
    assert not total_norm([torch.ones(3), bad]).isfinite()

# A plan serves the tensors that it was made for and no others; the values are read anew
tensors = [torch.ones(4), torch.ones(CHUNK).bfloat16()]
plan = plan_for(tensors)
assert plan_for(list(tensors)) is plan and plan.chunks == 2
for other in (tensors[0].view(torch.int32).view(torch.float32)[:3], tensors[0].clone(), tensors[0].view(torch.float64)):
    assert plan_for([other, tensors[1]]) is not plan
tensors[0].fill_(float(CHUNK**0.5))
assert total_norm(tensors) == (5 * CHUNK) ** 0.5
module.MOST_PLANS = 1
assert plan_for([torch.ones(5)]) is not plan and len(module._plans) == 1
print("interpreted: ok")
