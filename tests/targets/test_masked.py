"""Tokens as a target: masks by address, a loss of masked places alone, its mean over time the bound."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from diffusionblocks import DiffusionBlocks, StemHead, Uniform, make_partition
from diffusionblocks.experiments.models.masked_lm import Head, MaskedLMConfig, Stem, layers
from diffusionblocks.noise import mask_schedule as masking
from diffusionblocks.targets.base import Features, Noised
from diffusionblocks.targets.masked import T_MIN, MaskedTarget

CONFIG = MaskedLMConfig(dim=16, layers=3, heads=2, mlp=32, cond=8, vocab_size=5)
TARGET = MaskedTarget(5)
NOTHING = torch.zeros(4, 0, dtype=torch.int64)


def model(blocks: int = 3) -> DiffusionBlocks:
    """A network that says something: neither head nor modulation is zero."""
    torch.manual_seed(1)
    around, partition = StemHead(Stem(CONFIG), Head(CONFIG)), make_partition(Uniform(T_MIN, 1.0), 3, blocks, overlap=0)
    made = DiffusionBlocks(around, layers(CONFIG), TARGET, partition)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return made


def loss(features: Features, z: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return TARGET.loss(features, Noised(z, *TARGET.inputs(z, t)), y, t).per_sample


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(5, (4, 9), generator=torch.Generator().manual_seed(seed))


def test_noise_is_masks_by_address_at_the_rate_of_the_time():
    y = tokens().repeat(1000, 1)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0]).repeat(1000)
    z, same, other = (TARGET.noised(y, t, seed=3, offset=offset) for offset in (0, 0, 1))
    assert torch.equal(z, same) and not torch.equal(z, other)
    masked = z == TARGET.mask_id
    assert torch.equal(z[~masked], y[~masked])
    shares = masked.double().view(1000, 4, 9).mean((0, 2))
    torch.testing.assert_close(shares, 1 - masking.alpha(t[:4].double()), rtol=0, atol=0.02)  # 4 standard errors


def test_the_fused_loss_is_its_definition():
    made, y, t = model(), tokens(), torch.tensor([0.9, 0.5, 0.3, 0.02])
    z = TARGET.noised(y, t, seed=0, offset=0)
    features = made.blocks[0](NOTHING, *TARGET.inputs(z, t), made.stem_head)
    by_definition = loss(features._replace(head=lambda h, cond: features.head(h, cond)), z, y, t)
    log_p = features.head(features.h, features.cond).log_softmax(-1)
    by_hand = [
        sum(-log_p[i, n, y[i, n]] for n in range(9) if z[i, n] == 5) * masking.weight(t)[i] / 9 for i in range(4)
    ]
    torch.testing.assert_close(loss(features, z, y, t), by_definition)
    torch.testing.assert_close(by_definition, torch.stack([torch.as_tensor(v) for v in by_hand]).float())


def test_logits_of_visible_places_do_not_matter():
    made, y, t = model(), tokens(), torch.full((4,), 0.5)
    z = TARGET.noised(y, t, seed=0, offset=0)
    features = made.blocks[0](NOTHING, *TARGET.inputs(z, t), made.stem_head)
    visible = (z != TARGET.mask_id).unsqueeze(-1)
    assert visible.any() and not visible.all()
    clean = loss(features, z, y, t)
    assert torch.equal(loss(features._replace(h=features.h + 100 * visible), z, y, t), clean)
    assert not torch.equal(loss(features._replace(h=features.h + 0.1 * ~visible), z, y, t), clean)


def test_the_network_sees_visible_tokens_and_no_hidden_one():
    made, y, t = model(), tokens(), torch.full((4,), 0.5)
    z = TARGET.noised(y, t, seed=0, offset=0)
    masked = z == TARGET.mask_id
    before = made.denoise(NOTHING, z, 0.5).raw
    for place in masked.nonzero().tolist():
        changed = y.clone()
        changed[tuple(place)] = (changed[tuple(place)] + 1) % 5
        noised = TARGET.noised(changed, t, seed=0, offset=0)
        assert torch.equal(noised, z), "what is masked is gone"
    for row, place in (~masked).nonzero().tolist():
        changed = z.clone()
        changed[row, place] = (changed[row, place] + 1) % 5
        moved = (made.denoise(NOTHING, changed, 0.5).raw != before).any(-1)
        assert moved[row].all(), "a visible token reaches every place, by attention"
        assert not moved[torch.arange(4) != row].any()


def test_positions_count():
    """With the same tokens at other places the prediction differs: attention alone would not see it."""
    made = model()
    z = torch.tensor([[0, 1, 2, 5, 3]])
    swapped = torch.tensor([[2, 1, 0, 5, 3]])
    x = NOTHING[:1]
    assert not torch.allclose(made.denoise(x, z, 0.5).raw[0, 3], made.denoise(x, swapped, 0.5).raw[0, 3], atol=1e-4)
    nn.init.zeros_(made.stem_head.stem.near.weight)
    assert not torch.allclose(made.denoise(x, z, 0.5).raw[0, 3], made.denoise(x, swapped, 0.5).raw[0, 3], atol=1e-4)


def test_nothing_masked_is_no_loss_and_no_nan():
    made, y = model(), tokens()
    t = torch.full((4,), 1e-7)
    loss = made.loss(2, NOTHING, y, seed=0, step=0, sigma=t)
    assert float(loss.loss.detach()) == 0 and torch.equal(loss.per_sample, torch.zeros(4))
    loss.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("block", range(3))
def test_gradients_reach_the_active_block_and_the_ends_alone(block):
    made = model()
    made.loss(block, NOTHING, tokens(), seed=0, step=0).loss.backward()
    for b, own in enumerate(made.blocks):
        touched = {name: p.grad is not None and bool(p.grad.any()) for name, p in own.named_parameters()}
        assert all(touched.values()) if b == block else not any(touched.values()), (b, touched)
    assert all(p.grad is not None and p.grad.any() for p in made.stem_head.parameters())


def test_each_block_is_trained_on_its_own_times_spread_evenly():
    made = model()
    for block in range(3):
        sigma = made.draw_sigma(block, (16,), seed=0, step=0, device=torch.device("cpu"))
        low, high = made.partition.owned(block)
        assert (made.partition.block_of(sigma) == block).all()
        parts = ((sigma.double() - low) / (high - low) * 16).sort().values
        torch.testing.assert_close(parts.diff(), torch.ones(15, dtype=torch.float64), rtol=0, atol=1e-3)
        assert not torch.equal(sigma, made.draw_sigma(block, (16,), seed=0, step=1, device=torch.device("cpu")))


def test_the_mean_over_blocks_of_the_mean_loss_is_the_integral_over_time():
    """By enumeration: every set of masks of a window of three, times a fine grid of times."""
    made, y = model(), tokens()[:1, :3]
    grid, drawn = 60, 0.0
    for block in range(3):
        low, high = made.partition.owned(block)
        for t in (low + (high - low) * (torch.arange(grid) + 0.5) / grid).tolist():
            level, keep = torch.full((1,), t), float(masking.alpha(torch.tensor(t)))
            for hidden in itertools.product((False, True), repeat=3):
                chance = torch.tensor([1 - keep if m else keep for m in hidden]).prod()
                z = torch.where(torch.tensor([hidden]), 5, y)
                features = made.blocks[block](NOTHING[:1], *TARGET.inputs(z, level), made.stem_head)
                drawn += float(chance * loss(features, z, y, level).detach()) / grid / 3
    many = y.expand(1024, 3)
    x = many[:, :0]
    with torch.no_grad():
        losses = [made.loss(b, x, many, seed=0, step=step).loss for b in range(3) for step in range(16)]
    assert float(torch.stack(losses).mean()) == pytest.approx(drawn, rel=0.02)  # 49,152 draws of an order-one variance


@pytest.mark.parametrize(("call", "words"), [
    (lambda: MaskedTarget(1), "vocab_size=1"),
    (lambda: TARGET.check(torch.zeros(2, 3)), "y must be non-empty int64 tokens"),
    (lambda: TARGET.check(torch.zeros(2, 0, dtype=torch.int64)), "non-empty"),
    (lambda: TARGET.check(torch.tensor([[0, 5]])), r"y's tokens must be in \[0, 5\)"),
    (lambda: TARGET.check(torch.tensor([[-1, 2]])), "got -1 to 2"),
    (lambda: TARGET.check_noised(torch.tensor([[0, 6]])), r"z's tokens must be in \[0, 6\)"),
    (lambda: MaskedLMConfig(dim=12, heads=4), "must be even"),
])  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_mask_is_a_token_only_for_z():
    TARGET.check_noised(torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match="y's tokens"):
        model().loss(0, NOTHING[:1], torch.tensor([[0, 5]]), seed=0, step=0)
