"""Run by test_ada_norm_triton.py on a fake GPU: launches of a call, and its host time against eager PyTorch's here."""

import sys
import time

import torch
import torch.nn.functional as functional

import dbkernels
import fake_gpu

gpu = fake_gpu.activate(sys.modules["dbkernels.ada_norm"], sys.modules["dbkernels.gated_residual_norm"])


def layer(x, shift, scale):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rms(x, shift, scale):
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gated(x, branch, gate, shift, scale):
    h = x + gate * branch
    return h, layer(h, shift, scale)


def fastest(call, count=200):
    times = []
    for _ in range(9):
        start = time.thread_time()
        for _ in range(count):
            call()
        times.append(time.thread_time() - start)
    return 1e6 / count * min(times)


def both(op, tensors):
    """Run forward and backward, with upstream gradients of one."""
    outs = op(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.grad(outs, tensors, [torch.ones_like(out) for out in outs])


def check_launches(name, op, tensors, backward):
    """Check for one launch forward and `backward` of them backward, by the second call's plan as by the first's."""
    for _ in range(2):
        gpu.launches()
        with torch.no_grad():
            op(*tensors)
        assert gpu.launches() == 1, name
        both(op, tensors)
        assert gpu.launches() == 1 + backward, name


def check_time(name, ours, eager, tensors):
    """Compare this thread's time, since tests run in parallel. The aim is 1.2; the rest, and two more tries, allow for
    noise."""
    for _ in range(3):
        with torch.no_grad():
            forward = fastest(lambda: ours(*tensors)), fastest(lambda: eager(*tensors))
        whole = fastest(lambda: both(ours, tensors)), fastest(lambda: both(eager, tensors))
        print(f"host time of {name}, us, ours / eager: forward {forward[0]:.1f} / {forward[1]:.1f}, "
              f"forward and backward {whole[0]:.1f} / {whole[1]:.1f}")  # fmt: skip
        if forward[0] <= 1.5 * forward[1] and whole[0] <= 1.5 * whole[1]:
            return
    raise AssertionError(name)


torch.set_num_threads(1)
x, branch = (torch.randn(2, 600, 64, requires_grad=True) for _ in range(2))
tiny = [t.detach()[:, :2].clone().requires_grad_() for t in (x, branch)]
gate, shift, scale = (torch.randn(2, 1, 64, requires_grad=True) for _ in range(3))
weight = torch.ones(64, requires_grad=True)
layer_norm, rms_norm = dbkernels.ada_layer_norm, dbkernels.ada_rms_norm
gated_norm = dbkernels.gated_residual_norm

# One program has all rows of a sample; several have; weight sums over samples; nothing but x has a gradient
check_launches("tiny", layer_norm, (tiny[0], shift, scale), 1)
check_launches("tiny gated", gated_norm, (*tiny, gate, shift, scale), 1)
check_launches("layer norm", layer_norm, (x, shift, scale), 2)
check_launches("gated", gated_norm, (x, branch, gate, shift, scale), 2)
check_launches("weight", lambda x, weight: rms_norm(x, weight=weight), (tiny[0], weight), 2)
check_launches("x alone", lambda x: rms_norm(x, shift.detach(), scale.detach(), weight=weight.detach()), (x,), 1)

check_time("ada_layer_norm", layer_norm, layer, (tiny[0], shift, scale))
check_time("ada_rms_norm", rms_norm, rms, (tiny[0], shift, scale))
check_time("gated_residual_norm", gated_norm, gated, (*tiny, gate, shift, scale))
print("faked: ok")
