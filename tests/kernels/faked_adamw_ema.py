"""Run by test_adamw_ema_triton.py on a fake GPU: launches of a step, what they are given, functions entered."""

import torch

import fake_gpu

gpu = fake_gpu.activate()
import triton.language as tl  # noqa: E402

import dbkernels  # noqa: E402
from dbkernels import adamw_ema  # noqa: E402
from dbkernels.triton import adamw_ema_list  # noqa: E402

adamw_ema.direct = lambda *tensors: True
torch.set_num_threads(1)
SHAPES = [(8, 2), (8,), (4, 4), (3,)] * 20
OPTIONS = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, max_norm=1.0, ema_decay=0.99)


def lists_of(shapes):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return [params, *([torch.zeros(shape) for shape in shapes] for _ in range(4))]


lists = lists_of(SHAPES)
dbkernels.adamw_ema_step(*lists, step=1, **OPTIONS)
assert gpu.launches() == 3
((layout, plan),) = adamw_ema_list._plans.values()

# The next step finds the table, whatever the numbers; new gradients at other addresses make another
versions = [tensor._version for tensor in lists[0]]
dbkernels.adamw_ema_step(*lists, step=2, **{**OPTIONS, "lr": 2e-3, "ema_decay": 0.5})
assert gpu.launches() == 3 and len(adamw_ema_list._plans) == 1
assert [tensor._version for tensor in lists[0]] == [version + 1 for version in versions]
others = [torch.zeros_like(grad) for grad in lists[1]]
dbkernels.adamw_ema_step(lists[0], others, *lists[2:], step=2, **OPTIONS)
assert gpu.launches() == 3 and len(adamw_ema_list._plans) == 2

# Views of flat buffers are one tensor
flat = [list(torch.zeros(64 * 20).split(64)) for _ in range(5)]
dbkernels.adamw_ema_step(*flat, step=1, **OPTIONS)
assert gpu.launches() == 3 and next(reversed(adamw_ema_list._plans.values()))[1].tensors == 1

# A changed shape at the same address is found out, as is a list that lacks a tensor
for wrong in ([lists[1][0].view(2, 8), *lists[1][1:]], lists[1][:-1], [lists[1][0].double(), *lists[1][1:]], []):
    try:
        dbkernels.adamw_ema_step(lists[0], wrong, *lists[2:], step=2, **OPTIONS)
    except (TypeError, ValueError) as error:
        assert "grads" in str(error)
    else:
        raise AssertionError(wrong)
try:
    dbkernels.adamw_ema_step(*lists[:4], [], step=2, **OPTIONS)
except ValueError as error:
    assert "emas has 0 tensors" in str(error)
gpu.launches()

# Numbers on the device: the same kernels, and pointers instead of values
step, lr = torch.tensor(3), torch.tensor(1e-3, dtype=torch.float64)
dbkernels.adamw_ema_step(*lists, step=step, **{**OPTIONS, "lr": lr})
assert gpu.launches() == 3
decide = plan._decide((step, lr, 0.99, 0, 0), (0.9, 0.95), 1e-8, 1.0, None)
assert decide.compiled is not None and decide.constants["STEP"] and decide.constants["LR"]
assert not decide.constants["EMA_DECAY"]

# A norm that is given: the gradients' squares aren't computed
norm = torch.tensor(2.0)
assert dbkernels.adamw_ema_step(*lists, step=2, norm=norm, **OPTIONS) is not norm
assert gpu.launches() == 2

# bfloat16 moments: as many launches, and a norm in float32
halves = [*lists[:2], *([moment.bfloat16() for moment in moments] for moments in lists[2:4]), lists[4]]
result = dbkernels.adamw_ema_step(*halves, step=2, norm=norm, seed=1, **OPTIONS)
plan = next(reversed(adamw_ema_list._plans.values()))[1]
assert gpu.launches() == 2 and result.dtype == torch.float32 and plan.update.constants["MOMENT"] == tl.bfloat16
try:
    dbkernels.adamw_ema_step(*halves, step=2, norm=norm, **OPTIONS)
except ValueError as error:
    assert "bfloat16 moments go together" in str(error)
else:
    raise AssertionError("a seed is needed")
assert gpu.launches() == 0

# In a capture a table is the graph's own, and isn't kept
adamw_ema_list.capturing = lambda device: True
kept = dict(adamw_ema_list._plans)
dbkernels.adamw_ema_step(*lists, step=step, **{**OPTIONS, "lr": lr})
assert adamw_ema_list._plans == kept and gpu.launches() == 3
adamw_ema_list.capturing = lambda device: False


# As many functions for many tensors as for few: the tensors' addresses are read in C
few = lists_of(SHAPES[:4])
found = fake_gpu.entered(lambda: dbkernels.adamw_ema_step(*lists, step=2, **OPTIONS))
assert found == fake_gpu.entered(lambda: dbkernels.adamw_ema_step(*few, step=2, **OPTIONS)) <= 84, found
print("faked: ok")
