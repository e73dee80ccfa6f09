"""The published code's loss, as plain equations in float64, against the published recipe; and each of its switches.

Written out here: one block's layers with AdaLN (SiLU after the linear map), the noised label embedding
instead of [CLS], the final LayerNorm, the preconditioned readout, mean(cross-entropy) * mean(weight).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import dbkernels
import tiny
from diffusionblocks.blocks import DiffusionBlocks
from diffusionblocks.experiments.models.vit import ViTConfig
from diffusionblocks.experiments.published import VotingTrainer
from diffusionblocks.experiments.recipes import PUBLISHED
from diffusionblocks.experiments.tasks.vit import vit_blocks
from diffusionblocks.noise.rng import stream

CONFIG = ViTConfig(image_size=6, channels=3, num_classes=7, patch=2, dim=12, layers=6, heads=3, mlp=40, cond=2)
SIGMA_DATA, SEED, STEP, N = 0.5, 3, 17, 9


def published(**switched) -> DiffusionBlocks:
    model = vit_blocks(CONFIG, 3, recipe=replace(PUBLISHED, **switched))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # AdaLN and head start at zero, norms at one: make them count
        for name, p in model.named_parameters():
            if "modulation" in name or "head.head" in name:
                p.add_(0.4 * torch.randn(p.shape, generator=generator))
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 6, 6, generator=generator), torch.randint(0, CONFIG.num_classes, (N,), generator=generator)


def layer_norm(h, eps):
    mean = h.mean(-1, keepdim=True)
    return (h - mean) / torch.sqrt((h - mean).square().mean(-1, keepdim=True) + eps)


def silu(h):
    return h / (1 + torch.exp(-h))


def gelu(h):
    return h * (1 + torch.erf(h / math.sqrt(2))) / 2


def linear(w, name, h):
    return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def noise_vector(w, c_noise):
    angles = 16 * c_noise[:, None] * 10_000 ** (-torch.arange(64, dtype=torch.float64) / 64)
    h = torch.cat([angles.cos(), angles.sin()], dim=1)
    return linear(w, "stem_head.stem.noise.mlp.2", silu(linear(w, "stem_head.stem.noise.mlp.0", h)))


def tokens(w, x, first):
    n, p = x.shape[0], CONFIG.patch
    side = CONFIG.image_size // p
    patches = x.reshape(n, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, 3 * p * p)
    weight = w["stem_head.stem.patch.weight"].reshape(CONFIG.dim, -1)
    patches = patches @ weight.T + w["stem_head.stem.patch.bias"]
    return torch.cat([first[:, None], patches], dim=1) + w["stem_head.stem.position"]


def attention(w, name, h):
    n, t, d = h.shape
    heads = CONFIG.heads
    q, k, v = (
        part.reshape(n, t, heads, d // heads).transpose(1, 2) for part in linear(w, f"{name}.qkv", h).split(d, dim=-1)
    )
    scores = torch.exp(q @ k.transpose(2, 3) / math.sqrt(d // heads))
    out = scores / scores.sum(-1, keepdim=True) @ v
    return linear(w, f"{name}.proj", out.transpose(1, 2).reshape(n, t, d))


def transformer_layer(w, name, h, cond):
    ada = silu(linear(w, f"{name}.modulation.linear", cond))[:, None]  # SiLU after, as published
    shift1, scale1, gate1, shift2, scale2, gate2 = ada.split(CONFIG.dim, dim=-1)
    h = h + gate1 * attention(w, name, layer_norm(h, CONFIG.norm_eps) * (1 + scale1) + shift1)
    mlp = linear(w, f"{name}.mlp.0", layer_norm(h, CONFIG.norm_eps) * (1 + scale2) + shift2)
    return h + gate2 * linear(w, f"{name}.mlp.2", gelu(mlp))


def loss_by_hand(w, block, x, y, sigma, eps):
    """Section 8 of the method, top to bottom."""
    s = SIGMA_DATA
    total = sigma**2 + s**2
    c_skip, c_out, c_in = s**2 / total, sigma * s / torch.sqrt(total), 1 / torch.sqrt(total)
    table = w["target.table"] / torch.sqrt(w["target.table"].square().sum(-1, keepdim=True))
    z = table[y] + sigma[:, None] * eps

    cond = noise_vector(w, torch.log(sigma) / 4)
    h = tokens(w, x, c_in[:, None] * z)
    for i in range(CONFIG.layers // 3):
        h = transformer_layer(w, f"blocks.{block}.layers.{i}", h, cond)
    h = layer_norm(h[:, 0], 1e-12) * w["stem_head.head.norm.weight"] + w["stem_head.head.norm.bias"]

    shift, scale = silu(linear(w, "stem_head.head.modulation.linear", cond)).split(CONFIG.dim, dim=-1)
    logits = linear(w, "stem_head.head.linear", (c_out[:, None] * h + c_skip[:, None] * z) * (1 + scale) + shift)
    cross_entropy = torch.log(torch.exp(logits).sum(-1)) - logits[torch.arange(len(y)), y]
    weight = total / (sigma * s) ** 2
    return cross_entropy.mean() * weight.mean()


def both(block):
    """(the library's loss and model, the loss by hand and the float64 weights it was made from)."""
    model, (x, y) = published(), batch()
    ours = model.loss(block, x, y, seed=SEED, step=STEP)
    eps = dbkernels.philox_normal((N, CONFIG.dim), seed=stream(SEED, "eps", block), offset=STEP)
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    hand = loss_by_hand(w, block, x.double(), y, ours.sigma.double(), eps.double())
    return ours.loss, model, hand, w


@pytest.mark.parametrize("block", [0, 1, 2])
def test_loss_is_the_published_codes(block):
    ours, _, hand, _ = both(block)
    # float32 against float64 through two layers: a few times 1e-7; the requirement is 1e-5.
    assert ours.item() == pytest.approx(hand.item(), rel=1e-5)
    assert hand.item() > 0.5  # something is being compared


@pytest.mark.parametrize("block", [0, 1, 2])
def test_gradient_is_the_published_codes(block):
    ours, model, hand, w = both(block)
    ours.backward()
    hand.backward()
    compared = 0
    for name, p in model.named_parameters():
        assert (p.grad is None) == (w[name].grad is None), name
        if p.grad is None:
            continue
        # Gradients cancel more than losses: 1e-4 of the largest entry. The keys' bias is all rounding.
        scale = float(w[name].grad.abs().max())
        assert torch.allclose(p.grad.double(), w[name].grad, rtol=0, atol=1e-4 * scale + 1e-6 * hand.item()), name
        compared += 1
    assert compared > 30 and model.target.table.grad is not None


def test_weighting_is_a_product_of_means_and_not_a_mean_of_products():
    model, (x, y) = published(), batch()
    ours = model.loss(1, x, y, seed=SEED, step=STEP)
    weight = (ours.sigma**2 + 0.25) / (ours.sigma * 0.5) ** 2
    assert ours.loss.item() == pytest.approx(float(ours.per_sample.mean() * weight.mean()), rel=1e-5)
    assert ours.loss.item() != pytest.approx(float((ours.per_sample * weight).mean()), rel=1e-3)


@pytest.mark.parametrize(
    "switch",
    [
        {"readout": "posterior"},
        {"codebook": "fixed"},
        {"sigma_data": 0.4},
        {"weighting": "none"},
        {"noise": "information"},
    ],
)
def test_a_difference_in_any_piece_shows(switch):
    x, y = batch()
    losses = [model.loss(0, x, y, seed=SEED, step=STEP).loss.item() for model in (published(), published(**switch))]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_the_raw_estimate_leaves_the_codebooks_unit_sphere():
    x, _ = batch()
    z = torch.randn(N, CONFIG.dim)
    raw, trained = (published(estimate=estimate) for estimate in ("raw", "as_trained"))
    for model, table in ((raw, raw.target.table), (trained, trained.target.embeddings())):
        output = model.denoise(x, z, 1.0)
        torch.testing.assert_close(output.denoised, output.raw.softmax(-1) @ table)
    assert raw.target.table.norm(dim=-1).max() < 0.2
    torch.testing.assert_close(trained.target.embeddings().norm(dim=-1), torch.ones(CONFIG.num_classes))


def test_the_trajectory_starts_at_a_draw_of_noise_or_at_its_centre():
    drawn, centre = (
        published(start=start).target.start(5000, 3.0, seed=1, device="cpu") for start in ("noise", "mean")
    )
    assert float(drawn.std()) == pytest.approx(3, rel=0.02) and not centre.any()
    assert float(drawn.mean()) == pytest.approx(0, abs=0.06)  # 60 000 numbers


def test_a_batch_votes_for_the_block_that_owns_most_of_its_noise(tmp_path):
    trainer = tiny.trainer(tiny.config(tmp_path, recipe="published", lr=1e-3))
    assert isinstance(trainer, VotingTrainer)
    y, votes = torch.zeros(4, dtype=torch.int64), set()
    for step in range(12):
        trainer.batches_done = step
        block, sigma = trainer.choose(y)
        owners = trainer.model.partition.block_of(sigma).tolist()
        assert owners.count(block) == max(map(owners.count, owners))
        votes.add(block)
    assert votes == {0, 1, 2}
    trainer.batches_done = 0
    output = trainer.step(*tiny.RandomBatches().batch(0))
    assert output.block == trainer.offloader.active, "its weights are the ones that moved"
