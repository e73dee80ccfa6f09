"""Tokens as points of a codebook: the posterior readout by hand, levels by group, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffusionblocks.targets.base import Features
from diffusionblocks.targets.codebook import spread_codebook
from diffusionblocks.targets.tokens import TokenTarget


class Head(nn.Module):
    """Logits by one linear map, as the target expects."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(dim, classes)

    def forward(self, h, cond):
        return self.linear(h)


def parts(group_size: int, N: int = 5):
    torch.manual_seed(0)
    target = TokenTarget(spread_codebook(4, 6), group_size=group_size)
    y = torch.randint(4, (3, N))
    sigma = torch.rand(target.level_shape(y)) + 0.3
    return target, Head(7, 4), torch.randn(3, N, 7), y, sigma


@pytest.mark.parametrize(("group_size", "groups"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 1, 1, 2]), (0, [0] * 5)])
def test_the_readout_is_bayes_rule_by_hand(group_size, groups):
    target, head, h, y, sigma = parts(group_size)
    z = target.noised(y, sigma, seed=1, offset=2)
    output = target.read(Features(head, h, None), z, sigma)
    prior = (h.double() @ head.linear.weight.double().T + head.linear.bias.double()).softmax(-1)
    table = target.table.double()
    for i in range(3):
        for n in range(5):
            s = float(sigma[i, groups[n]])
            likelihood = torch.exp(-(z[i, n].double() - table).square().sum(-1) / (2 * s * s))
            posterior = prior[i, n] * likelihood / (prior[i, n] * likelihood).sum()
            torch.testing.assert_close(output.raw[i, n].double().softmax(-1), posterior, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(output.denoised[i, n].double(), posterior @ table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 0])
def test_training_computes_what_reading_says(group_size):
    """Mean loss and error per group without logits, against those made from the logits."""
    target, head, h, y, sigma = parts(group_size)
    z = target.noised(y, sigma, seed=1, offset=2)
    output = target.read(Features(head, h, None), z, sigma)
    loss = nn.functional.cross_entropy(output.raw.flatten(0, 1), y.flatten(), reduction="none")
    noised = target.add_noise(y, sigma, seed=1, offset=2)
    found = target.loss(Features(head, h, None), noised, y, sigma, error=True)
    torch.testing.assert_close(found.per_sample.mean(), loss.mean(), rtol=1e-4, atol=1e-5)
    error = (target.clean(y) - output.denoised).square().sum(-1)
    size = group_size or 5
    by_group = torch.stack([part.mean(1) for part in error.split(size, 1)], 1)
    torch.testing.assert_close(found.error, by_group, rtol=1e-4, atol=1e-5)


def test_noise_has_the_level_of_its_token():
    target = TokenTarget(spread_codebook(4, 6), group_size=3)
    y = torch.zeros(2000, 6, dtype=torch.int64)
    sigma = torch.tensor([[0.1, 2.0]]).expand(2000, 2)
    spread = (target.noised(y, sigma, seed=0, offset=0) - target.clean(y)).flatten(2).std((0, 2))
    torch.testing.assert_close(spread, torch.tensor([0.1] * 3 + [2.0] * 3), rtol=0.03, atol=0)


def test_one_token_with_two_classes_has_the_logistic_posterior():
    """E = (+-1, 0): the difference of the logits is 2 z_0 / sigma^2."""
    target = TokenTarget(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    head = Head(3, 2)
    nn.init.zeros_(head.linear.weight)
    nn.init.zeros_(head.linear.bias)
    z, sigma = torch.tensor([[[0.3, -9.0]]]), torch.tensor([[0.5]])
    output = target.read(Features(head, torch.zeros(1, 1, 3), None), z, sigma)
    expected = 1 / (1 + math.exp(-2 * 0.3 / 0.25))
    assert output.raw.softmax(-1)[0, 0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_what_is_no_target_is_refused():
    with pytest.raises(ValueError, match=r"table must be \(K, d\)"):
        TokenTarget(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="group_size must be"):
        TokenTarget(spread_codebook(3, 4), group_size=-1)
    target = TokenTarget(spread_codebook(3, 4))
    for bad in (torch.zeros(2), torch.zeros(2, 3), torch.zeros(0, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"non-empty \(B, N\) int64"):
            target.check(bad)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 0 to 3"):
        target.check(torch.tensor([[0, 3]]))
    for bad in (torch.zeros(2, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="z must be a floating"):
            target.check_noised(bad)
