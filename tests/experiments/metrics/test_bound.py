"""Evaluation: a walk through all blocks, and a bound that tells a good model from a bad one."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from diffusionblocks.experiments.metrics.classification import evaluate, walk
from diffusionblocks.experiments.session import train
from diffusionblocks.noise.partition import step_levels
from diffusionblocks.sampling.sampler import Walker


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = tiny.config(tmp_path_factory.mktemp("trained"), steps=120, visit=20, lr=1e-2, batch_size=64)
    session = tiny.session(config)
    train(session, tiny.RandomBatches(64), on_log=lambda row: None, on_step=lambda: None)
    return session


def test_every_block_is_run_and_the_accuracy_is_the_last_steps(trained):
    x, y = tiny.RandomBatches(300).batch(10**6)
    with trained.residency.averages():
        result = evaluate(Walker(trained.model, trained.residency), x, y, steps=5)
    assert [step["block"] for step in result["walk"]] == sorted(step["block"] for step in result["walk"])
    assert {step["block"] for step in result["walk"]} == {0, 1, 2}
    assert result["accuracy"] == result["walk"][-1]["accuracy"] > 60
    assert len(result["levels"]) == 32 and len(result["regret_bits"]) == 3


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("start", ["mean", "noise"])
def test_samplers_and_starts_agree_on_what_is_plain(trained, sampler, start):
    x, y = tiny.RandomBatches(300).batch(10**6)
    with trained.residency.averages():
        walker = Walker(trained.model, trained.residency)
        assert evaluate(walker, x, y, steps=6, sampler=sampler, start=start)["accuracy"] > 55


def test_the_bound_of_an_untrained_model_is_the_entropy_of_the_labels(tmp_path):
    """Zero head and the posterior readout: exactly Bayes with a uniform prior, so the bound is log2 10 everywhere."""
    session = tiny.session(tiny.config(tmp_path))
    x, y = tiny.RandomBatches(4000).batch(0)
    result = evaluate(Walker(session.model, session.residency), x, y, steps=3)
    # sampling error of 4,000 draws (standard error of a mean of about 2 bits: 0.03) and of the integral over 32 levels
    assert result["bound_bits"] == pytest.approx(math.log2(10), abs=0.05)
    assert all(abs(bits) < 0.05 for bits in result["regret_bits"])


def test_a_split_is_evaluated_in_batches_without_changing_the_result(trained, monkeypatch):
    x, _ = tiny.RandomBatches(50).batch(3)
    levels = step_levels(trained.model.partition, 4)
    walker = Walker(trained.model.eval(), trained.residency)
    whole, parts = walk(walker, x, levels), []
    original = walker.read
    monkeypatch.setattr(walker, "read", lambda *args: parts.append(original(*args, batch=7)) or parts[-1])
    # matrix products of other shapes may round otherwise; the posterior readout scales logits by 1/sigma^2, about 25
    torch.testing.assert_close(walk(walker, x, levels)[-1]["logits"], whole[-1]["logits"], rtol=1e-4, atol=1e-3)
    assert len(parts) == 4


def test_nothing_to_evaluate_is_an_error(trained):
    with pytest.raises(ValueError, match="split is empty"):
        evaluate(Walker(trained.model, trained.residency), torch.empty(0, 1, 8, 8), torch.empty(0), steps=3)
    x, y = tiny.RandomBatches(5).batch(0)
    with pytest.raises(ValueError, match="steps must be at least"):
        evaluate(Walker(trained.model, trained.residency), x, y, steps=2)
