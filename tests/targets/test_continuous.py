"""EDM's L2 loss and estimate against the formulas of its table 1, written by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch

from diffusionblocks.noise import edm
from diffusionblocks.targets.base import Features, Noised
from diffusionblocks.targets.continuous import ContinuousTarget

SIGMAS = [0.002, 0.01, 0.18, 0.5, 1.0, 3.7, 80.0]


def by_hand(sigma: float, s: float) -> dict[str, float]:
    total = sigma * sigma + s * s
    return {
        "c_skip": s * s / total,
        "c_out": sigma * s / math.sqrt(total),
        "c_in": 1 / math.sqrt(total),
        "c_noise": math.log(sigma) / 4,
    }


def l2(F, z, y, sigma, **options):
    target = ContinuousTarget(0.5)
    scaled, c_noise = target.inputs(z, sigma)
    return target.loss(
        Features(lambda h, cond: h, F, None), Noised(scaled, scaled, c_noise), y, sigma, **options
    ).per_sample


def test_the_noised_batch_is_the_stems_input_and_the_losss():
    target, y, sigma = ContinuousTarget(0.5), torch.randn(3, 2, 5), torch.tensor([0.01, 0.5, 40.0])
    noised = target.add_noise(y, sigma, seed=3, offset=4)
    scaled, c_noise = target.inputs(target.noised(y, sigma, seed=3, offset=4), sigma)
    torch.testing.assert_close(noised.scaled, scaled)
    torch.testing.assert_close(noised.c_noise, c_noise)
    assert noised.z is noised.scaled


@pytest.mark.parametrize("sigma", SIGMAS)
def test_l2_loss_is_the_weighted_square(sigma):
    generator = torch.Generator().manual_seed(0)
    y, eps, F = (torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    y, z, F = 0.5 * y.float(), (0.5 * y + sigma * eps).float(), F.float()
    level = torch.full((3,), sigma)
    c = by_hand(float(level[0]), 0.5)
    D = c["c_skip"] * z.double() + c["c_out"] * F.double()
    weight = 1 / c["c_out"] ** 2
    want = (weight * (D - y.double()).square()).flatten(1).mean(1)
    got = l2(F, z, y, level)
    # y - c_skip z cancels to about c_out: float32's 6e-8 grows by 1/sigma, to 3e-5 of F's size at sigma_min.
    assert torch.allclose(got.double(), want, rtol=1e-6 + 4 * 2.0**-24 / min(sigma, 1)), (got, want)
    # Positive control: the unweighted square is another number wherever the weight isn't 1.
    assert not torch.allclose(got.double(), want / weight, rtol=1e-2)


def test_l2_loss_stays_finite_and_has_a_finite_gradient_at_sigma_min():
    y, F = torch.full((2, 4), 3e4), torch.zeros(2, 4, requires_grad=True)
    sigma = torch.full((2,), edm.SIGMA_MIN)
    loss = l2(F, y + sigma[:, None], y, sigma).sum()
    (gradient,) = torch.autograd.grad(loss, F)
    assert loss.isfinite() and gradient.isfinite().all()


def test_continuous_read_is_the_preconditioned_estimate():
    class Head(torch.nn.Module):
        def forward(self, h, cond):
            return 2 * h

    h, z = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1)).unbind()
    sigma = torch.tensor([0.05, 4.0])
    D = ContinuousTarget(0.5).read(Features(Head(), h, None), z, sigma).denoised
    for i, level in enumerate(sigma.tolist()):
        c = by_hand(level, 0.5)
        want = c["c_skip"] * z[i].double() + c["c_out"] * 2 * h[i].double()
        assert torch.allclose(D[i].double(), want, rtol=1e-5, atol=1e-6)  # a few float32 roundings
