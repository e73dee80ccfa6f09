"""A classifier's evaluation: a trajectory through all blocks, every sampler, batches."""

from __future__ import annotations

import functools

import pytest
import torch

import tiny
from diffusionblocks.experiments.metrics import classification
from diffusionblocks.experiments.metrics.classification import evaluate, score, trajectory
from diffusionblocks.experiments.tasks.base import Addresses
from diffusionblocks.noise.partition import step_levels
from diffusionblocks.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = tiny.config(tmp_path_factory.mktemp("trained"), steps=120, visit=20, lr=1e-2, batch_size=64)
    trainer = tiny.trainer(config)
    trainer.fit(Addresses(), batch=tiny.RandomBatches(64).batch, progress=False)
    return trainer


def test_every_block_is_run_and_the_accuracy_is_the_last_steps(trained):
    x, y = tiny.RandomBatches(300).batch(10**6)
    with trained.averages():
        result = evaluate(trained.model, x, y, steps=5)
    assert [step["block"] for step in result["trajectory"]] == sorted(step["block"] for step in result["trajectory"])
    assert {step["block"] for step in result["trajectory"]} == {0, 1, 2}
    assert result["accuracy"] == result["trajectory"][-1]["accuracy"] > 60
    assert len(result["levels"]) == 32 and len(result["regret_bits"]) == 3 and result["images"] == 300


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_samplers_agree_on_an_easy_task(trained, sampler):
    x, y = tiny.RandomBatches(300).batch(10**6)
    with trained.averages():
        assert evaluate(trained.model, x, y, steps=6, sampler=sampler)["accuracy"] > 55


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_every_step_has_the_logits_of_its_own_level(trained, sampler):
    x, _ = tiny.RandomBatches(20).batch(3)
    levels = step_levels(trained.model.partition, 6)
    path = trajectory(trained.model, x, levels, sampler=sampler)
    assert [step["sigma"] for step in path] == levels[:-1]
    # the last step's estimate comes from the last level's z, so its logits are the nearest to certain
    sure = [float(step["logits"].softmax(-1).amax(-1).mean()) for step in path]
    assert sure[-1] == max(sure)


def test_batches_do_not_change_the_result(trained, monkeypatch):
    x, _ = tiny.RandomBatches(50).batch(3)
    levels = step_levels(trained.model.partition, 4)
    whole = trajectory(trained.model, x, levels)
    sizes, denoise = [], trained.model.denoise
    monkeypatch.setattr(trained.model, "denoise", lambda x, *a, **k: sizes.append(len(x)) or denoise(x, *a, **k))
    monkeypatch.setattr(classification, "Sampler", functools.partial(Sampler, batch=7))
    # matrix products of other shapes may round otherwise; the posterior readout scales logits by 1/sigma^2, about 25
    parts = trajectory(trained.model, x, levels)
    torch.testing.assert_close(parts[-1]["logits"], whole[-1]["logits"], rtol=1e-4, atol=1e-3)
    assert sizes == 4 * [7, 7, 7, 7, 7, 7, 7, 1]


def test_the_ordinary_classifier_is_scored_in_evaluation_mode():
    class Classifier(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return torch.eye(3)[x]

    network = Classifier().train()
    assert score(network, torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])) == 75
    assert network.training


def test_nothing_to_evaluate_is_an_error(trained):
    with pytest.raises(ValueError, match="split is empty"):
        evaluate(trained.model, torch.empty(0, 1, 8, 8), torch.empty(0), steps=3)
    x, y = tiny.RandomBatches(5).batch(0)
    with pytest.raises(ValueError, match="steps must be at least"):
        evaluate(trained.model, x, y, steps=2)
