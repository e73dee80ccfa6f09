"""edm_loss of the network's input c_in·z: its rounding, that it gives what z gives, and no launch more."""

import importlib.util
import shutil

import pytest
import torch
from torch.func import grad, jvp, vmap

import dbkernels
from dbkernels import edm_loss
from test_edm_loss import REDUCTIONS, S, example, graded, spread

CAN_FAKE = importlib.util.find_spec("triton") is not None and shutil.which("cc") is not None


def check_scaled_rounding(device, roundings):
    """Against z before it was rounded: two roundings of c_in·z, times s/sigma, and `roundings` of the three terms. The
    c_in that z was scaled by is rounded as well, which cancels if ours has the same bits; at this sigma_data other ways
    to compute it give others at every fourth level."""
    sigma, s = torch.logspace(-6, 15, 4096), 0.7
    F, y = torch.randn(2, 4096, 16)
    z = dbkernels.inject_noise(y.to(device), sigma.to(device), sigma_data=s, seed=3)
    level, noise = sigma.double().unsqueeze(1), dbkernels.philox_normal((4096, 16), seed=3).double()
    root = (level.square() + s**2).sqrt()
    terms = F.double(), -level / root / s * y.double(), s / root * noise
    leaf = F.to(device).clone().requires_grad_()
    edm_loss(leaf, z, y.to(device), sigma.to(device), sigma_data=s, reduction="sum", z_scaled=True).backward()
    # The definition rounds c_in·y, too; a kernel's fma doesn't.
    of_z = 2.01 if device != "cpu" or dbkernels.compiled() else 3.01
    bound = 2.0**-24 * (of_z * s / level * z.cpu().double().abs() + roundings * sum(term.abs() for term in terms))
    assert ((leaf.grad.cpu().double() / 2 - sum(terms)).abs() <= bound).all()


def test_a_scaled_z_costs_its_own_rounding_alone():
    check_scaled_rounding("cpu", 5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_scaled_z_gives_what_z_gives(reduction):
    """In float64, to its rounding: the loss, and the gradients of F and y; that of z is c_in times the scaled one's."""
    F, z, y, sigma = example((5, 3, 7), (5, 3), torch.float64)
    c_in = spread((sigma.square() + S**2).rsqrt(), z)
    options = dict(sigma_data=S, reduction=reduction)
    loss, (grad_F, grad_z, grad_y) = graded(lambda *t: edm_loss(*t, sigma, **options), F, z, y)
    scaled, grads = graded(lambda *t: edm_loss(*t, sigma, z_scaled=True, **options), F, c_in * z, y)
    for a, b in zip((scaled, *grads), (loss, grad_F, grad_z / c_in, grad_y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13 * b.abs().max().item())


def test_the_transforms_of_torch_func_take_a_scaled_z():
    F, z, y, sigma = example((4, 3, 8), (4,), torch.float32, z_scaled=True)
    options = dict(sigma_data=S, z_scaled=True)
    leaf = z.clone().requires_grad_()
    edm_loss(F, leaf, y, sigma, reduction="sample", **options).sum().backward()
    each = vmap(grad(lambda z, F, y, sigma: edm_loss(F, z, y, sigma, **options)))(z, F, y, sigma)
    torch.testing.assert_close(each, leaf.grad, rtol=2e-6, atol=2e-6)
    direction = torch.randn_like(z)
    tangent = jvp(lambda z: edm_loss(F, z, y, sigma, reduction="sum", **options), (z,), (direction,))[1]
    torch.testing.assert_close(tangent.float(), (24 * leaf.grad * direction).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not CAN_FAKE, reason="needs Triton, and a C compiler for the fake driver")
def test_launches_are_those_of_z():
    from fake_gpu import run_faked

    run_faked("faked_edm_loss.py")
