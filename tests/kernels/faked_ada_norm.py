"""Run by test_ada_norm_triton.py on a fake GPU: launches of a call, and the Python functions it enters."""

import sys

import torch

import dbkernels
import fake_gpu

gpu = fake_gpu.activate(sys.modules["dbkernels.ada_norm"], sys.modules["dbkernels.gated_residual_norm"])


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


def check_functions(name, op, tensors, forward, whole):
    """Check that forward, and forward with backward, enter no more Python functions: a fifth above what they do."""
    with torch.no_grad():
        found = [fake_gpu.entered(lambda: op(*tensors))]
    found.append(fake_gpu.entered(lambda: both(op, tensors)))
    assert found[0] <= forward and found[1] <= whole, f"{name}: functions: {found}"


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

check_functions("ada_layer_norm", layer_norm, (tiny[0], shift, scale), 28, 120)
check_functions("ada_rms_norm", rms_norm, (tiny[0], shift, scale), 28, 120)
check_functions("gated_residual_norm", gated_norm, (*tiny, gate, shift, scale), 27, 140)
print("faked: ok")
