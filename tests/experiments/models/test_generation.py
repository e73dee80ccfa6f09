"""Text from noise: caches that change nothing, an ensemble, walks that draw what the network says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusionblocks.experiments.models.generation import Generator, ancestral
from diffusionblocks.noise.partition import step_levels
from tiny_lm import MODEL, N, blocks, kinds, noised


@kinds
def test_caches_give_what_training_saw(model):
    """Group by group behind a cache, the logits are those of one pass over the whole sequence."""
    made, group = blocks(model), model.group_size
    x = torch.randint(12, (2, N))
    z, level = noised(made, x)
    generator = Generator(made, [1.0, 0.0], seed=0)
    for start in range(0, N, group):
        generator.extend(x[:, max(0, start - group) : start])
        for block in range(3):
            with torch.no_grad():
                head, h, cond = made.blocks[block](x, z, level, made.target, made.ends, made.handed(block, x))
                want = head(h, cond)[:, start : start + group].float()
                got = generator.logits(z[:, start : start + group], torch.full((2, group), 0.3), block)
            # float64 arithmetic, sums in another order; logits are returned as float32
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_ensemble_says_the_mean_of_its_blocks():
    """Trained alone, read together: by `denoise` and by the generator alike."""
    made = blocks(MODEL, combine="mean")
    x = torch.randint(12, (2, N))
    z, level = noised(made, x)
    with torch.no_grad():
        each = [block.logits(x, made.ends) for block in made.blocks]
    generator = Generator(made, [1.0, 0.0], seed=0)
    generator.extend(x[:, :5])
    want = sum(each) / 3
    for block in range(3):
        read = made.denoise(x, z, 0.3, block=block, handed=made.handed(block, x))
        # float64 arithmetic, sums in another order; logits are returned as float32
        torch.testing.assert_close(read.raw - made.target.evidence(z) / 0.3**2, want, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(generator.logits(z, level, block)[:, 0], want[:, 5], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(each[0], each[2])
    with pytest.raises(ValueError, match=r"pass handed=model.handed\(1, x\)"):
        made.denoise(x, z, 0.3, block=1)
    assert made.train().handed(2, x) is None, "in training each is alone"
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


def test_every_block_is_asked_from_high_noise_to_low(monkeypatch):
    made, asked = blocks(MODEL), []
    original = Generator.logits
    monkeypatch.setattr(Generator, "logits", lambda self, z, s, b: asked.append(b) or original(self, z, s, b))
    Generator(made, step_levels(made.partition, 6), seed=0).generate(torch.zeros(1, 0, dtype=torch.int64), 2)
    assert asked[:6] == sorted(asked[:6]) == asked[6:] and set(asked) == {0, 1, 2}


def test_walks_draw_what_the_network_says():
    """One stream and many steps: the walk from noise has the distribution of the network's own logits."""
    made = blocks(MODEL, scale=0.0)
    logits = torch.tensor([2.0, 1.0, 0.0] + [-9.0] * 9)
    with torch.no_grad():
        made.ends.head.linear.bias.copy_(logits)
    tokens = Generator(made, step_levels(made.partition, 40), seed=0).generate(
        torch.zeros(4000, 0, dtype=torch.int64), 1
    )
    share = torch.bincount(tokens.flatten(), minlength=12) / 4000
    # 4,000 draws: three standard errors of a share are 0.024; 40 Euler steps of the walk add about as much
    torch.testing.assert_close(share[:3], logits.softmax(0)[:3], rtol=0, atol=0.05)


def test_an_ensemble_draws_exactly_what_it_says():
    """Whatever the walk's steps: a walk of few would sharpen the distribution."""
    made = blocks(MODEL, scale=0.0, combine="mean")
    logits = torch.tensor([2.0, 1.0, 0.0] + [-9.0] * 9)
    with torch.no_grad():
        made.ends.head.linear.bias.copy_(logits)
    nothing = torch.zeros(20000, 0, dtype=torch.int64)
    tokens = Generator(made, step_levels(made.partition, 3), seed=0).generate(nothing, 1)
    share = torch.bincount(tokens.flatten(), minlength=12) / 20000
    # 20,000 draws: three standard errors of a share are 0.011
    torch.testing.assert_close(share[:3], logits.softmax(0)[:3], rtol=0, atol=0.011)
    only = Generator(made, [1.0, 0.0], seed=0, keep=lambda x: x.masked_fill(x < x.amax(-1, keepdim=True), -torch.inf))
    assert only.generate(nothing, 2).eq(0).all(), "what isn't kept is not drawn"


class Pairs(nn.Module):
    """What follows is told by the token before; the first by nothing."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return torch.cat([torch.zeros(len(x), 1, self.table.shape[1]), self.table[x[:, :-1]]], 1)


def test_ordinary_text_is_drawn_token_by_token_from_what_came_before():
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
