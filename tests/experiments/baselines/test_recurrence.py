"""Other ways to train for many passes: the chain through several steps, and a tiny recursive model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusionblocks.experiments.baselines.tiny_recursive import Recursions, Repeated, TinyRecursive, tiny_recursive
from diffusionblocks.experiments.baselines.unrolled import PART, Chain, unrolled
from diffusionblocks.experiments.models.recurrent import RecurrentConfig
from diffusionblocks.experiments.tasks.recurrent import RecurrentRun, RecurrentTask
from diffusionblocks.noise.partition import step_levels

MODEL = RecurrentConfig(dim=16, layers=2, heads=2, mlp=24, prelude=1, coda=1, passes=2)
TASK = RecurrentTask(RecurrentRun(
    model=MODEL, size=6, batch_size=8, steps=6, evaluated=4, share=1.0, tune_lr=(1e-3,), sampling_steps=3,
))  # fmt: skip
CPU = torch.device("cpu")


def awake(module):
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return module


def test_a_chain_of_one_step_is_block_wise_training():
    chain, (x, y) = awake(Chain(TASK, 1)), TASK.batches(CPU).batch(0)
    one = chain.loss(x, y, seed=3, step=5)
    torch.testing.assert_close(one, chain.model.loss(0, x, y, seed=3, step=5).loss)
    longer = awake(Chain(TASK, 3)).loss(x, y, seed=3, step=5)
    assert longer != one


def test_a_chains_gradient_passes_through_the_states_between():
    """The last step's loss alone reaches the first step's output."""
    chain, (x, y) = awake(Chain(TASK, 2)), TASK.batches(CPU).batch(0)
    outputs = []
    read = chain.model.target.read
    chain.model.target.read = lambda *a: outputs.append(read(*a)) or outputs[-1]
    chain.loss(x, y, seed=0, step=0)
    (grad,) = torch.autograd.grad(outputs[1].raw.sum(), outputs[0].raw, allow_unused=True)
    assert grad is not None and grad.abs().max() > 0


def test_levels_fall_as_those_of_a_trajectory():
    chain = Chain(TASK, 2)
    levels = step_levels(chain.model.partition, PART, kind="probability")
    below = chain.below(torch.tensor(levels[:-2]))
    torch.testing.assert_close(below, torch.tensor(levels[1:-1]), rtol=1e-4, atol=0)
    lowest = torch.tensor([chain.model.partition.sigma_min])
    assert chain.below(lowest) == lowest


def test_a_tiny_network_goes_on_where_the_batch_left_and_learns_from_the_last_round():
    torch.manual_seed(0)
    network = TinyRecursive(MODEL, TASK.config.puzzle, Recursions(latent=2, deep=3, supervised=2))
    x, y = TASK.batches(CPU).batch(0)
    calls = []
    network.norm.register_forward_hook(lambda module, args, out: calls.append(out.requires_grad))
    losses = [network.loss(x, y, seed=0, step=step) for step in range(3)]
    assert calls == ([False] * 6 + [True] * 3) * 3, "latent, latent, answer: three rounds a pass"
    assert losses[0] == losses[2] != losses[1], "a new batch starts anew"
    entropy = torch.nn.functional.cross_entropy(network(x, 2).flatten(0, 1), y.flatten())
    torch.testing.assert_close(entropy, losses[1])


def test_each_batch_is_trained_on_as_often_as_it_is_supervised():
    batches = Repeated(TASK.batches(CPU), 3)
    same = [torch.equal(batches.batch(step)[0], TASK.batches(CPU).batch(step // 3)[0]) for step in range(7)]
    assert all(same) and not torch.equal(batches.batch(2)[0], batches.batch(3)[0])


@pytest.mark.parametrize(
    "train", [lambda: unrolled(TASK, CPU, steps=2), lambda: tiny_recursive(TASK, CPU, recursions=Recursions(1, 1, 2))]
)
def test_all_train_at_the_compute_of_the_blocks(train):
    test = train().test
    assert test["layer_evaluations"] == pytest.approx(TASK.config.budget, rel=0.3)  # a step is a sixth of it
    assert [row["passes"] for row in test["passes"]] == [1, 2, 4, 8, 16, 32]


def test_a_setting_of_sudoku_is_refused_elsewhere():
    with pytest.raises(ValueError, match="guesses=1 must be 0, or positive for task='sudoku'"):
        replace(TASK.config, guesses=1)
