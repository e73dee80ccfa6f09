"""Predictions of pretrained networks: what they are given, and what is read from what they predict."""

from __future__ import annotations

import math

import pytest
import torch

from diffusionblocks.targets.base import Features
from diffusionblocks.targets.scheduled import PREDICTIONS, ScheduledTarget

LOG_SIGMAS = torch.linspace(math.log(0.01), math.log(100), 1000, dtype=torch.float64) ** 3 / 50


def target(prediction):
    return ScheduledTarget(prediction, None if prediction == "flow" else LOG_SIGMAS)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_right_prediction_gives_the_target_and_no_loss(prediction):
    made, y = target(prediction), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 1.0, 2.0, 5.0])
    z, x_t, t = made.add_noise(y, sigma, seed=1, offset=0)
    level = sigma.view(-1, 1, 1, 1)
    eps = (z - y) / level
    clean, noise = (1 / (1 + level), level / (1 + level)) if prediction == "flow" else (
        1 / (1 + level**2).sqrt(), level / (1 + level**2).sqrt()
    )  # fmt: skip
    torch.testing.assert_close(x_t, clean * y + noise * eps)
    right = {"epsilon": eps, "v_prediction": clean * eps - noise * y, "sample": y, "flow": eps - y}[prediction]
    torch.testing.assert_close(made.sigma(t).float(), sigma, rtol=1e-4, atol=0)

    def features(F):
        return Features(lambda h, cond: torch.cat([h, h], 1), F, None)  # twice the channels: those of a variance

    found = made.read(features(right), z, sigma)
    torch.testing.assert_close(found.denoised, y, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.raw, right)
    assert made.loss(features(right), made.add_noise(y, sigma, seed=1, offset=0), y, sigma).per_sample.max() < 1e-9
    off = made.loss(features(right + 1), made.add_noise(y, sigma, seed=1, offset=0), y, sigma, weight=0.5, error=True)
    torch.testing.assert_close(off.per_sample, torch.full((4,), 0.5))
    wrong = (made.read(features(right + 1), z, sigma).denoised - y).square().flatten(1).sum(1)
    torch.testing.assert_close(off.error, wrong, rtol=1e-3, atol=1e-5)


def test_halves_keep_the_table():
    made = target("epsilon").bfloat16()
    torch.testing.assert_close(made.timestep(LOG_SIGMAS.exp()), torch.arange(1000.0), rtol=0, atol=1e-3)


def test_latents_in_halves_keep_their_noise():
    y = torch.ones(1, 4096, dtype=torch.bfloat16)
    z = target("epsilon").noised(y, torch.tensor([0.001]), seed=0, offset=0)
    assert float((z - 1).std()) == pytest.approx(0.001, rel=0.1)


def test_timesteps_lie_between_the_tables_by_ln_sigma():
    made = target("epsilon")
    torch.testing.assert_close(made.timestep(LOG_SIGMAS.exp()), torch.arange(1000.0), rtol=0, atol=1e-3)
    halfway = (LOG_SIGMAS[500:502].mean()).exp()
    assert float(made.timestep(halfway)) == pytest.approx(500.5, abs=1e-3)
    assert float(target("flow").timestep(torch.tensor(1.0))) == 500
    assert float(target("flow").sigma(torch.tensor(1000))) == math.inf


@pytest.mark.parametrize(("prediction", "schedule", "words"), [
    ("noise", LOG_SIGMAS, "prediction must be one of epsilon"),
    ("epsilon", None, "needs log_sigmas"),
    ("flow", LOG_SIGMAS, "takes no log_sigmas"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(prediction, schedule, words):
    with pytest.raises(ValueError, match=words):
        ScheduledTarget(prediction, schedule)
