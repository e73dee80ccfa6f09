"""Samplers against ODEs with known solutions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffusionblocks.noise.edm import karras_sigmas
from diffusionblocks.sampling.samplers import SAMPLERS, check_sigmas, dpmpp_2m, euler, heun

MEAN, STD = 0.7, 0.6
HIGH, LOW = 10.0, 0.05


def gaussian(z: torch.Tensor, sigma: float) -> torch.Tensor:
    """The exact denoiser of targets drawn from N(MEAN, STD^2)."""
    return (STD**2 * z + sigma**2 * MEAN) / (STD**2 + sigma**2)


def solution(z: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """Where dz/dsigma = (z - D) / sigma carries z: z - MEAN scales as sqrt(STD^2 + sigma^2)."""
    return MEAN + (z - MEAN) * math.sqrt((STD**2 + end**2) / (STD**2 + start**2))


def start() -> torch.Tensor:
    return HIGH * torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trajectory(sampler, steps: int) -> torch.Tensor:
    """z after `steps` steps of equal ratio from HIGH to LOW: what the denoiser is given there."""
    seen = {}

    def denoise(z, sigma):
        seen[sigma] = z
        return gaussian(z, sigma)

    levels = [HIGH * (LOW / HIGH) ** (i / steps) for i in range(steps)] + [LOW]
    sampler(denoise, start(), [*levels, 0.0])
    return seen[LOW]


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_convergence_order_on_a_gaussian_target(sampler, order):
    exact = solution(start(), HIGH, LOW)
    errors = [float((trajectory(sampler, steps) - exact).abs().max()) for steps in (100, 200, 400)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    # The next term of the expansion is one order higher: a few per cent at a step of 5.3 / 100 in ln sigma.
    assert measured == pytest.approx([order] * 2, abs=0.12)
    assert errors[-1] < 0.05  # the limit is the right one, not only some limit


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_denoiser_that_knows_the_answer_is_followed_exactly(sampler):
    # D constant: every sampler here is exact, z - D scales with sigma.
    y, z = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()
    seen = {}

    def denoise(z, sigma):
        seen[sigma] = z
        return y

    levels = karras_sigmas(7, 0.01, 20.0)
    assert torch.equal(sampler(denoise, z, [*levels, 0.0]), y)
    for sigma in levels:
        assert torch.allclose(seen[sigma], y + (z - y) * sigma / 20, rtol=0, atol=1e-13)  # float64 rounding


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_step_to_zero_returns_the_estimate(sampler):
    z = start()
    assert torch.equal(sampler(gaussian, z, [HIGH, 0.0]), gaussian(z, HIGH))


def printed_sign(denoise, z, sigmas):
    """The Euler step as arXiv 2506.14202 prints it."""
    for sigma, target in itertools.pairwise(sigmas):
        z = z - (target - sigma) / sigma * (z - denoise(z, sigma))
    return z


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_noise_shrinks_along_the_trajectory_and_grows_with_the_printed_sign(sampler):
    levels = [*karras_sigmas(18, LOW, HIGH), 0.0]
    # Samples of N(0.7, 0.6^2): the deviation of 64 draws is within 30 % (three and a half standard errors).
    # Euler's 18 steps stop 10 % short of it.
    assert float(sampler(gaussian, start(), levels).std()) == pytest.approx(STD, rel=0.4)
    assert float(printed_sign(gaussian, start(), levels).std()) > 2 * HIGH


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 4), ("heun", 7), ("dpmpp_2m", 4)])
def test_callback_sees_the_first_evaluation_of_every_step(name, evaluations):
    calls, seen = [], []
    levels = [8.0, 4.0, 2.0, 1.0, 0.0]

    def denoise(z, sigma):
        calls.append(sigma)
        return gaussian(z, sigma)

    SAMPLERS[name](denoise, start(), levels, lambda i, sigma, D: seen.append((i, sigma, D)))
    assert [(i, sigma) for i, sigma, _ in seen] == list(enumerate(levels[:-1]))
    assert len(calls) == evaluations
    assert torch.equal(seen[0][2], gaussian(start(), 8.0))
    if name == "heun":  # the second evaluation of a step is at its end: there the next block may own the noise
        assert calls == [8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_start_is_not_written_over(sampler):
    z = start()
    sampler(gaussian, z, [HIGH, 1.0, 0.0])
    assert torch.equal(z, start())


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "levels",
    [
        [],
        [0.0],
        [1.0],
        [1.0, 0.5],
        [1.0, 1.0, 0.0],
        [1.0, 2.0, 0.0],
        [NAN, 1.0, 0.0],
        [INF, 0.0],
        [1.0, -1.0, 0.0],
    ],
)
def test_bad_levels_are_refused(levels):
    with pytest.raises(ValueError, match="sigmas"):
        check_sigmas(levels)
    with pytest.raises(ValueError, match="sigmas"):
        euler(gaussian, start(), levels)
