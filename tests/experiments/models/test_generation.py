"""Text from noise: caches that change nothing, ensembles, and samples with the network's own distribution."""

from __future__ import annotations

import torch
from torch import nn

from diffusionblocks.experiments.models.generation import Generator, ancestral
from diffusionblocks.noise.partition import step_levels
from tiny_lm import MODEL, N, blocks, kinds, noised


@kinds
def test_caches_give_the_logits_of_training(model):
    """Group by group behind a cache, the logits are those of one pass over the whole sequence."""
    made, group = blocks(model), model.group_size
    x = torch.randint(12, (2, N))
    z, level = noised(made, x)
    generator = Generator(made, [1.0, 0.0], seed=0)
    for start in range(0, N, group):
        generator.extend(x[:, max(0, start - group) : start])
        for block in range(3):
            with torch.no_grad():
                head, h, cond = made.blocks[block](x, *made.target.inputs(z, level), made.stem_head)
                want = head(h, cond)[:, start : start + group].float()
                got = generator.logits(z[:, start : start + group], torch.full((2, group), 0.3), block)
            # float64 arithmetic, sums in another order; logits are returned as float32
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_ensemble_is_the_mean_of_its_blocks():
    """Trained alone, decoded together: by `denoise` and by the generator alike."""
    made = blocks(MODEL, combine="mean")
    x = torch.randint(12, (2, N))
    z, level = noised(made, x)
    with torch.no_grad():
        each = [block.logits(x, made.stem_head) for block in made.blocks]
    generator = Generator(made, [1.0, 0.0], seed=0)
    generator.extend(x[:, :5])
    want = sum(each) / 3
    for block in range(3):
        read = made.denoise(x, z, 0.3, block=block)
        # float64 arithmetic, sums in another order; logits are returned as float32
        torch.testing.assert_close(read.raw - made.target.evidence(z) / 0.3**2, want, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(generator.logits(z, level, block)[:, 0], want[:, 5], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(each[0], each[2])
    own = made.train().denoise(x, z, 0.3, block=1).raw - made.target.evidence(z) / 0.3**2
    torch.testing.assert_close(own, each[1], rtol=1e-5, atol=1e-4)  # in training each is alone
    alone = made.loss(1, x, x, seed=0, step=0).loss
    assert torch.equal(made.eval().loss(1, x, x, seed=0, step=0).loss, alone), "and so is its loss, in any mode"


@kinds
def test_generation_is_by_seed_and_keeps_the_prompt(model):
    made = blocks(model).float()
    prompt = torch.randint(12, (2, 4))
    levels = step_levels(made.partition, 5)
    one, same, other = (Generator(made, levels, seed=seed).generate(prompt, 8) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (2, 12) and torch.equal(one[:, :4], prompt)
    empty = Generator(made, levels, seed=3).generate(prompt[:, :0], 8)
    assert empty.shape == (2, 8) and not torch.equal(empty[0], empty[1])


def test_every_block_is_run_from_high_noise_to_low(monkeypatch):
    made, run = blocks(MODEL), []
    original = Generator.logits
    monkeypatch.setattr(Generator, "logits", lambda self, z, s, b: run.append(b) or original(self, z, s, b))
    Generator(made, step_levels(made.partition, 6), seed=0).generate(torch.zeros(1, 0, dtype=torch.int64), 2)
    assert run[:6] == sorted(run[:6]) == run[6:] and set(run) == {0, 1, 2}


def test_trajectories_have_the_networks_distribution():
    """One stream and many steps: samples from noise have the distribution of the network's own logits."""
    made = blocks(MODEL, scale=0.0)
    logits = torch.tensor([2.0, 1.0, 0.0] + [-9.0] * 9)
    with torch.no_grad():
        made.stem_head.head.linear.bias.copy_(logits)
    tokens = Generator(made, step_levels(made.partition, 40), seed=0).generate(
        torch.zeros(4000, 0, dtype=torch.int64), 1
    )
    share = torch.bincount(tokens.flatten(), minlength=12) / 4000
    # 4,000 draws: three standard errors of a share are 0.024; 40 Euler steps add about as much
    torch.testing.assert_close(share[:3], logits.softmax(0)[:3], rtol=0, atol=0.05)


def test_an_ensemble_has_exactly_its_own_distribution():
    """Whatever the number of steps: a trajectory of few would sharpen the distribution."""
    made = blocks(MODEL, scale=0.0, combine="mean")
    logits = torch.tensor([2.0, 1.0, 0.0] + [-9.0] * 9)
    with torch.no_grad():
        made.stem_head.head.linear.bias.copy_(logits)
    nothing = torch.zeros(20000, 0, dtype=torch.int64)
    tokens = Generator(made, step_levels(made.partition, 3), seed=0).generate(nothing, 1)
    share = torch.bincount(tokens.flatten(), minlength=12) / 20000
    # 20,000 draws: three standard errors of a share are 0.011
    torch.testing.assert_close(share[:3], logits.softmax(0)[:3], rtol=0, atol=0.011)
    only = Generator(made, [1.0, 0.0], seed=0, keep=lambda x: x.masked_fill(x < x.amax(-1, keepdim=True), -torch.inf))
    assert only.generate(nothing, 2).eq(0).all(), "a filtered token must not be drawn"


class Pairs(nn.Module):
    """Logits of each token from the one before; of the first, all equal."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return torch.cat([torch.zeros(len(x), 1, self.table.shape[1]), self.table[x[:, :-1]]], 1)


def test_ordinary_text_is_drawn_token_by_token_from_those_before():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    network = Pairs(p.log())
    prompt = torch.tensor([[1], [2]]).expand(2, 1).repeat(2000, 1)
    made = ancestral(network, prompt, 5, seed=3)
    assert made.shape == (4000, 6) and torch.equal(made[:, :1], prompt)
    before, after = made[:, :-1].flatten(), made[:, 1:].flatten()
    counts = torch.stack([torch.bincount(after[before == token], minlength=3) for token in range(3)])
    # at least 3,000 draws a row: a standard error under .01
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), p, atol=0.04, rtol=0)
    assert torch.equal(made, ancestral(network, prompt, 5, seed=3))
    assert not torch.equal(made, ancestral(network, prompt, 5, seed=4))
    start = ancestral(network, torch.zeros(3000, 0, dtype=torch.int64), 1, seed=0)
    torch.testing.assert_close(torch.bincount(start.flatten()) / 3000, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
