"""The ops that draw noise, and edm_loss, under torch.func, forward-mode differentiation and second derivatives."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from dbkernels import edm_loss, inject_noise, philox_normal, philox_uniform

S = 0.5


@pytest.fixture
def tensors():
    y, F = torch.randn(2, 4, 3, 8)
    sigma = torch.rand(4) + 0.1
    return y, F, inject_noise(y, sigma, seed=1), sigma


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_grad_is_autograds(tensors):
    y, F, z, sigma = tensors
    leaf = F.clone().requires_grad_()
    edm_loss(leaf, z, y, sigma, sigma_data=S).backward()
    close(grad(lambda F: edm_loss(F, z, y, sigma, sigma_data=S))(F), leaf.grad)
    leaf = y.clone().requires_grad_()
    inject_noise(leaf, sigma, sigma_data=S, seed=1).square().sum().backward()
    close(grad(lambda y: inject_noise(y, sigma, sigma_data=S, seed=1).square().sum())(y), leaf.grad)
    indices, table = torch.tensor([0, 2, 2]), F[0].clone().requires_grad_()
    inject_noise((indices, table), 0.5, normalize=True, seed=1).square().sum().backward()
    of = grad(lambda table: inject_noise((indices, table), 0.5, normalize=True, seed=1).square().sum())
    close(of(table.detach()), table.grad)


def test_gradients_of_each_sample(tensors):
    """What vmap of grad is used for."""
    y, F, z, sigma = tensors
    ours = vmap(grad(lambda F, z, y, sigma: edm_loss(F, z, y, sigma, sigma_data=S)))(F, z, y, sigma)
    leaf = F.clone().requires_grad_()
    edm_loss(leaf, z, y, sigma, sigma_data=S, reduction="sample").sum().backward()
    close(ours, leaf.grad)


@pytest.mark.parametrize("rounds", [10, 7])
def test_vmap_draws_by_the_offset_of_each(tensors, rounds):
    y, F, _, sigma = tensors
    offsets = torch.arange(4)

    def noised(y, sigma, offset):
        return inject_noise(y, sigma, sigma_data=S, seed=1, offset=offset, rounds=rounds)

    def loss(F, y, sigma, offset):
        return edm_loss(F, None, y, sigma, sigma_data=S, seed=1, offset=offset, rounds=rounds)

    def draw(offset):
        address = dict(seed=1, offset=offset)
        return philox_normal(5, **address, rounds=rounds) + philox_uniform(5, **address)

    close(vmap(noised)(y, sigma, offsets), torch.stack([noised(y[i], sigma[i], i) for i in range(4)]))
    close(vmap(loss)(F, y, sigma, offsets), torch.stack([loss(F[i], y[i], sigma[i], i) for i in range(4)]))
    close(vmap(draw)(offsets), torch.stack([draw(i) for i in range(4)]))


def test_forward_mode_loses_no_tangent(tensors):
    """An op without a rule of its own would drop it without a word."""
    y, F, z, sigma = tensors
    direction = torch.randn_like(y)
    for op, at in (
        (lambda y: inject_noise(y, sigma, sigma_data=S, seed=1), y),
        (lambda F: edm_loss(F, z, y, sigma, sigma_data=S), F),
    ):
        expected = jvp(op, (at,), (direction,))[1]
        for leaf in (at, at.clone().requires_grad_()):
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(leaf, direction))).tangent
            close(tangent, expected.to(tangent.dtype))


@pytest.mark.parametrize("rounds", [10, 7])
@pytest.mark.parametrize("sigma_data", [None, S])
def test_second_derivatives(rounds, sigma_data):
    y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    sigma = (torch.rand(2, dtype=torch.float64) + 0.3).requires_grad_()
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 2], [2, 3]])
    options = dict(sigma_data=sigma_data, seed=1, rounds=rounds)
    assert torch.autograd.gradgradcheck(lambda y, s: inject_noise(y, s, **options).square(), (y, sigma))
    for normalize in (False, True):
        assert torch.autograd.gradgradcheck(
            lambda t, s: inject_noise((indices, t), s, normalize=normalize, **options).square(),  # noqa: B023
            (table, sigma),
        )
