"""The published code's loss, as plain equations in float64, against DiffusionBlocks set up as that code is.

Written out here: one block's layers with AdaLN (SiLU after the linear map), the noised label embedding
instead of [CLS], the final LayerNorm, the preconditioned readout, mean(cross-entropy) * mean(weight).
"""

from __future__ import annotations

import math

import pytest
import torch

import dbkernels
from diffusionblocks.blocks import DiffusionBlocks
from diffusionblocks.denoiser import Ends
from diffusionblocks.experiments.models.vit import ViT, ViTConfig
from diffusionblocks.noise.density import LogNormal
from diffusionblocks.noise.partition import make_partition
from diffusionblocks.noise.rng import stream
from diffusionblocks.targets.labels import ClassTarget

CONFIG = ViTConfig(
    image_size=6,
    channels=3,
    classes=7,
    patch=2,
    dim=12,
    layers=6,
    heads=3,
    mlp=40,
    cond=2,
    gate_start=0,
    z_gain=1,
    silu_after=True,
)
SIGMA_DATA, SEED, STEP, N = 0.5, 3, 17, 9


def published() -> DiffusionBlocks:
    torch.manual_seed(0)
    network = ViT(CONFIG, conditioned=True, head_norm_eps=1e-12)
    target = ClassTarget(
        torch.randn(CONFIG.classes, CONFIG.dim) * 0.02,
        sigma_data=SIGMA_DATA,
        readout="edm",
        trainable=True,
        normalize=True,
    )
    with torch.no_grad():  # AdaLN and head start at zero, norms at one: make them count
        for name, p in network.named_parameters():
            if "modulation" in name or name.startswith("head"):
                p.add_(0.4 * torch.randn(p.shape))
    return DiffusionBlocks(
        Ends(network.stem, network.head),
        list(network.layers),
        target,
        make_partition(LogNormal(), CONFIG.layers, 3),
        weighting="batch_mean",
    )


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 6, 6, generator=generator), torch.randint(0, CONFIG.classes, (N,), generator=generator)


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
    return linear(w, "ends.stem.noise.mlp.2", silu(linear(w, "ends.stem.noise.mlp.0", h)))


def tokens(w, x, first):
    n, p = x.shape[0], CONFIG.patch
    side = CONFIG.image_size // p
    patches = x.reshape(n, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, 3 * p * p)
    weight = w["ends.stem.patch.weight"].reshape(CONFIG.dim, -1)
    patches = patches @ weight.T + w["ends.stem.patch.bias"]
    return torch.cat([first[:, None], patches], dim=1) + w["ends.stem.position"]


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
    h = layer_norm(h[:, 0], 1e-12) * w["ends.head.norm.weight"] + w["ends.head.norm.bias"]

    shift, scale = silu(linear(w, "ends.head.modulation.linear", cond)).split(CONFIG.dim, dim=-1)
    logits = linear(w, "ends.head.linear", (c_out[:, None] * h + c_skip[:, None] * z) * (1 + scale) + shift)
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


@pytest.mark.parametrize(("change", "factor"), [("readout", "posterior"), ("normalize", False), ("sigma_data", 0.4)])
def test_a_difference_in_any_piece_shows(change, factor):
    model, (x, y) = published(), batch()
    want = model.loss(0, x, y, seed=SEED, step=STEP).loss.item()
    setattr(model.target, change, factor)
    assert model.loss(0, x, y, seed=SEED, step=STEP).loss.item() != pytest.approx(want, rel=1e-3)
