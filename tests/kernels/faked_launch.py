"""Run by test_launch.py on a fake GPU: a prepared launch is Triton's own, argument by argument, in fewer functions."""

import torch
import triton
import triton.language as tl

import fake_gpu


@triton.jit(do_not_specialize=["seed"])
def kernel(x_ptr, out_ptr, seed, rows, dim, eps, SHIFTED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < rows * dim)
    if SHIFTED:
        x = x + seed
    tl.store(out_ptr + at, x * eps, mask=at < rows * dim)


gpu = fake_gpu.activate()
from dbkernels.triton.launch import MOST_KINDS, Kinds, Launch  # noqa: E402

x, out = torch.randn(4, 64), torch.empty(4, 64)
constants = dict(SHIFTED=True, BLOCK=128, num_warps=4)
launch = Launch(kernel, (2,), -1, (4, 64, 1e-6), **constants)
launch(x, out, varying=(7,))
assert gpu.launches() == 1 and gpu.grid() == (2, 1, 1) and launch.compiled is not None

# The same compiled kernel with the same arguments as Triton's own launch
seen, run = [], launch.compiled.run
launch.compiled._run = lambda *arguments: seen.append(arguments)
kernel[(2, 1, 1)](x, out, 9, 4, 64, 1e-6, **constants)
launch(x, out, varying=(9,))
theirs, ours = seen
assert theirs[:6] == ours[:6]
assert [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in theirs[9:]] == list(ours[9:])
launch.compiled._run = run
gpu.launches()

# Pointers that aren't aligned take Triton's way to a kernel that may read them, and leave ours as it was
compiled, odd = launch.compiled, torch.randn(300)[1:]
launch(odd, out, varying=(1,))
assert launch.compiled is compiled and gpu.launches() == 1

# A launch prepared by an unaligned first call isn't kept
fresh = Launch(kernel, (2,), -1, (4, 64, 1e-6), **constants)
fresh(odd, out, varying=(1,))
assert fresh.compiled is None

# Varying numbers don't compile anew; hooks of a profiler see launches
launch(x, out, varying=(-(2**31),))
assert launch.compiled is compiled
from triton import knobs  # noqa: E402

calls = []
knobs.runtime.launch_enter_hook.add(calls.append)
launch(x, out, varying=(3,))
assert len(calls) == 1
knobs.runtime.launch_enter_hook.calls.clear()

kinds = Kinds()
for i in range(MOST_KINDS + 3):
    assert kinds.keep(i, launch) is launch
assert len(kinds) == 3

theirs = fake_gpu.entered(lambda: kernel[(2, 1, 1)](x, out, 9, 4, 64, 1e-6, **constants))
ours = fake_gpu.entered(lambda: launch(x, out, varying=(9,)))
assert ours < theirs, (ours, theirs)
print("faked: ok")
