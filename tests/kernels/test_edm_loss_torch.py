"""edm_loss inside PyTorch: torch.library's checks, compile, autocast, fake tensors, what is asked of the op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels import edm_loss
from numerics import EPSILON
from test_edm_loss import REDUCTIONS, S, eager, example


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(dtype, reduction):
    F, z, y, sigma = example((3, 4, 5), (3,), dtype)
    op = torch.ops.dbkernels.edm_loss.default
    torch.library.opcheck(op, (F, z, y, sigma, S, reduction, False, 0, 0, True, True, False))
    torch.library.opcheck(op, (F, z, y, sigma, S, reduction, True, 0, 0, True, True, True))
    torch.library.opcheck(op, (F, None, y, sigma, S, reduction, False, -7, 1, True, False, True))
    at = None, None, 0, 0, 10, 0.5, 1.0
    torch.library.opcheck(torch.ops.dbkernels.edm_loss.at, (F, z, y, sigma, S, reduction, True, *at, True, True, True))
    torch.library.opcheck(torch.ops.dbkernels.edm_loss_scale_.default, (F.float(), sigma))


class Calls(TorchDispatchMode):
    """The arguments of each call of our op."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.dbkernels.edm_loss.default:
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.kernels
def test_no_gradient_is_taken_where_none_is_wanted():
    F, z, y, sigma = example((3, 8), (3,), torch.float32)
    F.requires_grad_()
    with Calls() as calls:
        edm_loss(F, z, y, sigma, sigma_data=S)
        edm_loss(F.detach(), z, y, sigma, sigma_data=S)
        with torch.no_grad():
            edm_loss(F, z, y, sigma, sigma_data=S)
        edm_loss(F, z, y.clone().requires_grad_(), sigma, sigma_data=S)
    wanted = [arguments[-3:] for arguments in calls.arguments]
    assert wanted == [(True, False, False), (False,) * 3, (False,) * 3, (True, False, True)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("z_scaled", [False, True])
def test_compiles_whole_and_once_over_changing_sigma(reduction, z_scaled, compile_counter):
    def step(F, z, y, sigma):
        return edm_loss(F * 2, z, y, sigma, sigma_data=S, reduction=reduction, z_scaled=z_scaled).sum() * 3

    compiled = torch.compile(step, fullgraph=True, backend=compile_counter)
    for _ in range(4):
        F, z, y, sigma = example((6, 5, 4), (6,), torch.bfloat16)
        ours, plain = (F.clone().requires_grad_() for _ in range(2))
        for run, leaf in ((compiled, ours), (step, plain)):
            run(leaf, z, y, sigma).backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=2 * EPSILON[torch.bfloat16], atol=0)
        assert torch.equal(compiled(F, z, y, sigma), step(F, z, y, sigma))
    assert compile_counter.frame_count <= 2  # with and without a gradient


def test_inductor_compiles_it_with_the_layer_around_it():
    torch._dynamo.reset()
    head, (F, _, y, sigma) = torch.nn.Linear(8, 8), example((6, 8), (6,), torch.float32)

    def step(step):
        return edm_loss(head(F), None, y, sigma, sigma_data=S, seed=2**63 + 1, offset=step)

    step(3).backward()
    expected = head.weight.grad.clone()
    head.weight.grad = None
    torch.compile(step, fullgraph=True)(3).backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_autocast_takes_a_half_output_beside_float32_data():
    head, (x, z, y, sigma) = torch.nn.Linear(16, 16), example((6, 16), (6,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F = head(x)
        loss = edm_loss(F, z, y, sigma, sigma_data=S)
    assert F.dtype == torch.bfloat16 and loss.dtype == torch.float32
    exact = eager(F.detach(), z, y, sigma, "mean")
    assert abs(loss.item() / exact.item() - 1) < 1e-6  # y and z were not rounded to bfloat16
    loss.backward()
    assert head.weight.grad.abs().sum() > 0


def test_meta_and_fake():
    x, sigma = torch.empty(5, 6, device="meta", dtype=torch.float16), torch.empty(5, device="meta")
    for reduction, shape in (("mean", ()), ("none", (5, 6)), ("sample", (5,))):
        op = torch.ops.dbkernels.edm_loss
        loss, grad_F, grad_z, _ = op(x, x, x, sigma, S, reduction, True, 0, 0, True, False, False)
        assert loss.shape == shape and loss.dtype == torch.float32 and loss.device.type == "meta"
        assert grad_F.shape == (5, 6) and grad_F.dtype == torch.float32 and grad_z.numel() == 0
