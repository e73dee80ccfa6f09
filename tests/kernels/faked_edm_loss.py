"""Run by test_edm_loss_scaled.py on a fake GPU: launches and dispatched ops of edm_loss, z given as it is or scaled."""

import importlib
import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fake_gpu

gpu = fake_gpu.activate(*(importlib.import_module(f"dbkernels.{name}") for name in ("_edm_loss", "edm_loss")))
from dbkernels import edm_loss  # noqa: E402

F, z, y = torch.randn(3, 8, 4, 16)
F.requires_grad_(), z.requires_grad_()
sigma = torch.rand(8) + 0.1
LAUNCHES = {"mean": (2, 4), "sample": (1, 3)}  # of the loss; with a backward, which looks at the gradients of F and z


class Calls(TorchDispatchMode):
    """Note every op that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def launches(call):
    """Return how many kernels a second call launches, and the ops that it calls by the dispatcher."""
    call(), gpu.launches()
    with Calls() as calls:
        call()
    return gpu.launches(), calls.names


STEPS = (lambda loss: loss, lambda loss: torch.autograd.grad(loss.mean(), (F, z)))
for (reduction, expected), z_scaled in itertools.product(LAUNCHES.items(), (False, True)):
    for step, most in zip(STEPS, expected, strict=True):
        options = dict(sigma_data=0.5, reduction=reduction, z_scaled=z_scaled)
        count, names = launches(lambda: step(edm_loss(F, z, y, sigma, **options)))  # noqa: B023
        assert count == most, (reduction, z_scaled, count)
        assert not [name for name in names if "dbkernels" in name or "_local_scalar_dense" in name], names
print("faked: ok")
