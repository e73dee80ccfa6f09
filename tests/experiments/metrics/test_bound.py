"""The information bound: exact where it is known, and each block's regret at its own levels alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tiny
from diffusionblocks import DiffusionBlocks, LabelTarget, StemHead, make_partition
from diffusionblocks.experiments.metrics.bound import accuracy, bound, cross_entropy, held_out_loss
from diffusionblocks.experiments.tasks.vit import ViTTask
from diffusionblocks.noise.density import LogNormal

P = torch.tensor([0.5, 0.25, 0.125, 0.125])  # of the labels: 1.75 bits


class Known(nn.Module):
    """Passes x on and drops z: logits of x alone, whatever the noise."""

    def forward(self, x, z, c_noise):
        return x, c_noise


class Biased(nn.Module):
    """A layer that adds a constant to the logits."""

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.bias = nn.Parameter(bias.clone())

    def forward(self, h, cond):
        return h + self.bias


class Logits(nn.Module):
    def features(self, h):
        return h

    def forward(self, h, cond):
        return h


def biased(*biases: torch.Tensor) -> DiffusionBlocks:
    """A model of labels whose blocks have given logits, updated by Bayes' rule with z."""
    partition = make_partition(LogNormal(), len(biases), len(biases), overlap=0)
    layers = [Biased(bias) for bias in biases]
    return DiffusionBlocks(StemHead(Known(), Logits()), layers, LabelTarget(4, 4), partition)


def labels(count: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(4), (P * count).long())


@pytest.mark.parametrize("count", [2, 8])
def test_the_bound_of_bayes_rule_is_its_priors_cross_entropy_from_few_labels(count):
    """The control variate takes off all of the sampling and integration error, which is large here."""
    y = labels(16)
    model = biased(torch.tensor([0.3, 0.0, -0.5, 0.1]))
    truth = -float(torch.log_softmax(torch.tensor([0.3, 0.0, -0.5, 0.1]), 0)[y].mean())
    for seed in range(3):
        found = bound(model, torch.zeros(16, 4), y, count=count, seed=seed)
        # float32 logits of up to 1 / sigma_min^2 / 2
        assert [level["bound"] for level in found["levels"]] == pytest.approx([truth] * count, abs=1e-4)
        assert found["bound_bits"] == pytest.approx(truth / math.log(2), abs=1e-4)
        assert found["regret_bits"] == pytest.approx([0], abs=1e-4)


def test_a_block_that_errs_has_its_own_regret():
    """The middle block has a wrong prior: it pays for that, the block after it has nothing to win back."""
    right = P.log()
    wrong = right + torch.tensor([-1.0, 1.0, 1.0, -1.0])
    y = labels(4000)
    found = bound(biased(right, wrong, right), torch.zeros(4000, 4), y, count=24)
    first, middle, last = found["regret_bits"]
    assert first == pytest.approx(0, abs=1e-4) and last == pytest.approx(0, abs=0.02)
    assert middle > 0.02
    assert found["bound_bits"] == pytest.approx(1.75 + first + middle + last, abs=1e-4)
    better = bound(biased(wrong, right, right), torch.zeros(4000, 4), y, count=24)
    assert better["regret_bits"][1] < -0.02, "a block that knows more than the first wins bits back"


def test_the_bound_of_an_untrained_model_is_the_entropy_of_the_labels(tmp_path):
    """Zero head and the posterior readout: exactly Bayes with a uniform prior, so the bound is log2 10 everywhere."""
    model = ViTTask(tiny.config(tmp_path)).model()
    result = bound(model, *tiny.RandomBatches(50).batch(0))
    assert result["bound_bits"] == pytest.approx(math.log2(10), abs=1e-4)
    assert result["regret_bits"] == pytest.approx([0, 0, 0], abs=1e-4)
    assert {level["block"] for level in result["levels"]} == {0, 1, 2}


def test_held_out_losses_fall_with_the_noise(tmp_path):
    model = ViTTask(tiny.config(tmp_path)).model()
    x, y = tiny.RandomBatches(200).batch(0)
    found = held_out_loss(model, x, y, count=6)
    assert found["loss"] == pytest.approx(sum(level["loss"] for level in found["levels"]) / 6)
    assert [level["block"] for level in found["levels"]] == [0, 0, 1, 1, 2, 2]
    # more noise, more to guess
    losses = [level["loss"] for level in found["levels"]]
    assert losses == sorted(losses, reverse=True) and found == held_out_loss(model, x, y, count=6)


def test_cross_entropy_and_accuracy_by_hand():
    logits, y = P.log().expand(2, 3, 4), torch.tensor([[0, 1, 2], [0, 0, 3]])
    assert cross_entropy(logits, y) == pytest.approx((3 * 1 + 2 + 3 + 3) / 6 * math.log(2))
    assert accuracy(logits, y) == 50
