"""The loss of one block: what it touches, what it is made of, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dbkernels
from diffusionblocks.blocks import SHARING, DiffusionBlocks
from diffusionblocks.denoiser import StemHead
from diffusionblocks.experiments.models.vit import ViT, ViTConfig
from diffusionblocks.noise.density import LogNormal
from diffusionblocks.noise.partition import make_partition
from diffusionblocks.noise.rng import stream
from diffusionblocks.targets.base import Features, Output
from diffusionblocks.targets.continuous import ContinuousTarget
from diffusionblocks.targets.labels import LabelTarget

CONFIG = ViTConfig(image_size=4, channels=1, num_classes=5, patch=2, dim=8, layers=5, heads=2, mlp=16, cond=4)
B = 3


def network() -> ViT:
    """Nothing starts at zero, so that no gradient is zero for that reason alone."""
    vit = ViT(CONFIG, conditioned=True)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return vit


def make(shared: str = "shared", *, blocks: int = B, trainable: bool = False, **options) -> DiffusionBlocks:
    torch.manual_seed(0)
    networks = [network() for _ in range(blocks if shared == "per_block" else 1)]
    around = [StemHead(n.stem, n.head) for n in networks]
    target = LabelTarget(5, 8)
    target.table.requires_grad_(trainable)
    partition = make_partition(LogNormal(-0.5, 1.0, 0.05, 20.0), 5, blocks)
    return DiffusionBlocks(around, list(networks[0].layers), target, partition, shared=shared, **options)


def read(model: DiffusionBlocks, block: int, x: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> Output:
    features: Features = model.blocks[block](x, *model.target.inputs(z, sigma), model.stem_head)
    return model.target.read(features, z, sigma)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 5


@pytest.mark.parametrize("block", range(B))
@pytest.mark.parametrize("shared", SHARING)
def test_loss_touches_the_active_block_alone(shared, block):
    model = make(shared, trainable=shared == "shared")
    model.loss(block, *batch(), seed=0, step=0).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    wanted = {f"blocks.{block}."}
    if shared == "shared":
        wanted |= {"stem_head.", "target."}
    should = {n for n, _ in model.named_parameters() if n.startswith(tuple(wanted))}
    assert trained == should
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


def test_a_frozen_stem_and_head_get_no_gradient_and_are_not_trainable():
    model = make("frozen")
    assert not any(p.requires_grad for p in model.stem_head.parameters())
    assert all(p.requires_grad for p in model.blocks.parameters())


@pytest.mark.parametrize("shared", SHARING)
def test_blocks_are_independent(shared):
    model, (x, y) = make(shared), batch()
    first = model.loss(0, x, y, seed=0, step=0)
    own = model.loss(1, x, y, seed=0, step=0)
    with torch.no_grad():
        for p in model.blocks[1].parameters():
            p.add_(0.1)
    assert torch.equal(model.loss(0, x, y, seed=0, step=0).loss, first.loss)
    assert not torch.equal(model.loss(1, x, y, seed=0, step=0).loss, own.loss)  # positive control


@pytest.mark.parametrize("shared", SHARING)
def test_layers_run_in_order_and_none_is_dropped(shared):
    model = make(shared)
    assert [len(block.layers) for block in model.blocks] == [2, 2, 1]
    parts = model.parts()
    assert list(parts) == ["shared", "block_0", "block_1", "block_2"]
    counted = [id(p) for part in parts.values() for p in part.parameters()]
    assert sorted(counted) == sorted(id(p) for p in model.parameters())  # each parameter in exactly one part


def test_same_address_same_loss_to_the_bit():
    model, (x, y) = make(), batch()
    torch.manual_seed(1)
    first = model.loss(1, x, y, seed=4, step=7, error=True)
    torch.manual_seed(2)
    again = model.loss(1, x, y, seed=4, step=7, error=True)
    for name in ("loss", "sigma", "per_sample", "error"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    for other in ({"seed": 4, "step": 8}, {"seed": 5, "step": 7}):
        assert not torch.equal(model.loss(1, x, y, **other).sigma, first.sigma)
    blocks = [model.draw_sigma(b, (6,), seed=4, step=7, device=x.device) for b in range(B)]
    ranks = {tuple(s.argsort().tolist()) for s in blocks}
    assert len(ranks) == B  # each block has a stream of its own


def test_loss_is_the_mean_cross_entropy_of_the_noised_label():
    model, (x, y) = make(), batch()
    got = model.loss(1, x, y, seed=4, step=7, error=True)
    eps = dbkernels.philox_normal((6, 8), seed=stream(4, "eps", 1), offset=7)
    clean = model.target.table[y]
    z = clean + got.sigma[:, None] * eps
    output = read(model, 1, x, z, got.sigma)
    # The same float32 sums in the same order, but for z, a fused multiply-add in the kernel.
    per_sample = nn.functional.cross_entropy(output.raw, y, reduction="none")
    assert torch.allclose(got.per_sample, per_sample, rtol=1e-3, atol=1e-5)
    assert torch.equal(got.loss.detach(), got.per_sample.mean())
    assert torch.allclose(got.error, (clean - output.denoised).square().sum(1), rtol=1e-3, atol=1e-5)
    assert got.loss.requires_grad
    assert not any(t.requires_grad for t in (got.sigma, got.per_sample, got.error))


@settings(deadline=None, max_examples=40)
@given(block=st.integers(0, 2), count=st.integers(1, 64), seed=st.integers(0, 2**40), step=st.integers(0, 2**31))
def test_noise_is_drawn_in_the_trained_range(block, count, seed, step):
    sigma = make().draw_sigma(block, (count,), seed=seed, step=step, device=torch.device("cpu"))
    low, high = torch.tensor(make().partition.trained(block))  # both rounded to float32, as the draw is
    assert sigma.shape == (count,) and sigma.dtype == torch.float32
    assert bool(((sigma >= low) & (sigma <= high)).all())


@pytest.mark.parametrize(
    ("share", "count", "wanted"), [(0.0, 8, 0), (0.5, 8, 4), (0.3, 10, 3), (0.7, 10, 7), (1.0, 5, 5)]
)
def test_context_draws_the_first_share_at_the_top(share, count, wanted):
    model = make(context=share)
    sigma = model.draw_sigma(2, (count,), seed=0, step=0, device=torch.device("cpu"))
    assert (sigma == model.partition.sigma_max).tolist() == [i < wanted for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 7, 32])
@pytest.mark.parametrize("share", [0.25, 0.1, 0.5])
def test_context_has_its_share_whatever_the_batch(share, count):
    """A batch of one, accumulated 32 times, trains on the noise of a batch of 32."""
    model = make(context=share)
    counts = []
    for step in range(2000 // count):
        sigma = model.draw_sigma(1, (count,), seed=5, step=step, device=torch.device("cpu"))
        at_top = (sigma == model.partition.sigma_max).tolist()
        assert at_top == sorted(at_top, reverse=True), "the first ones"
        assert abs(sum(at_top) - share * count) < 1
        counts.append(sum(at_top))
    draws = len(counts)
    spread = (share * count % 1 * (1 - share * count % 1) / draws) ** 0.5
    assert abs(sum(counts) / draws - share * count) <= 4 * spread + 1e-9


def test_given_noise_levels_are_used():
    model, (x, y) = make(), batch()
    sigma = torch.linspace(0.1, 10, 6)
    got = model.loss(0, x, y, seed=0, step=0, sigma=sigma)
    assert torch.equal(got.sigma, sigma)
    drawn = model.loss(0, x, y, seed=0, step=0)
    assert torch.equal(model.loss(0, x, y, seed=0, step=0, sigma=drawn.sigma).loss, drawn.loss)


@pytest.mark.parametrize("weight", [0.5, 1 / 3])
def test_a_weight_is_a_factor_on_what_is_backpropagated(weight):
    model, (x, y) = make(), batch()
    plain, weighted = (model.loss(1, x, y, seed=3, step=2, weight=w) for w in (1.0, weight))
    torch.testing.assert_close(weighted.loss, plain.loss * weight)
    torch.testing.assert_close(weighted.per_sample, plain.per_sample)
    parameters = [p for p in model.blocks[1].parameters() if p.requires_grad]
    grads = [torch.autograd.grad(made.loss, parameters, allow_unused=True) for made in (plain, weighted)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None) and (
            a is None or torch.allclose(a * weight, b, rtol=1e-4, atol=1e-6)
        )  # sums in float32


def test_the_loss_without_checks_is_the_same_loss():
    model, (x, y) = make(), batch()
    checked = model.loss(0, x, y, seed=3, step=2)
    assert torch.equal(model.loss_at(0, x, y, checked.sigma, seed=3, step=2).loss, checked.loss)


def test_denoise_uses_the_owner():
    model, (x, _) = make(), batch()
    z = torch.randn(6, 8)
    for block in range(B):
        low, high = model.partition.owned(block)
        sigma = math.sqrt(low * high)
        got = model.denoise(x, z, sigma)
        level = torch.full((6,), sigma)
        want = read(model, block, x, z, level)
        assert torch.equal(got.raw, want.raw) and torch.equal(got.denoised, want.denoised)
        assert not got.raw.requires_grad
        other = model.denoise(x, z, sigma, block=(block + 1) % B)
        assert not torch.equal(other.raw, got.raw)


def test_repartition_cuts_anew_and_keeps_layers():
    model = make()
    model.repartition(LogNormal(1.0, 0.5, 0.5, 10.0))
    assert model.partition.layers == (2, 2, 1)
    assert (model.partition.sigma_min, model.partition.sigma_max) == (0.5, 10.0)


class PlainStem(nn.Module):
    def forward(self, x, z, c_noise):
        return x + z, None


class PlainHead(nn.Module):
    def features(self, h):
        return h

    def forward(self, h, cond):
        return h


class PlainLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h, cond):
        return h + self.linear(h)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    count=st.integers(1, 5),
    block=st.integers(0, 1),
)
def test_a_continuous_target_of_any_shape_is_weighted_l2(shape, count, block):
    torch.manual_seed(0)
    partition = make_partition(LogNormal(), 3, 2)
    model = DiffusionBlocks(
        StemHead(PlainStem(), PlainHead()), [PlainLayer() for _ in range(3)], ContinuousTarget(0.5), partition
    )
    x, y = torch.randn(2, count, *shape, 4).unbind()
    got = model.loss(block, x, y, seed=0, step=0, error=True)
    z = model.target.noised(y, got.sigma, seed=stream(0, "eps", block), offset=0)
    D = read(model, block, x, z, got.sigma).denoised
    sigma = got.sigma.double().reshape(-1, *[1] * (y.dim() - 1))
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    want = (weight * (D.double() - y.double()) ** 2).flatten(1).mean(1)
    # D is float32, and D - y is what is left of it at low noise: 6e-8 |D| over sigma; its square, twice that.
    assert torch.allclose(got.per_sample.double(), want, rtol=1e-3, atol=1e-3)
    assert got.per_sample.shape == got.error.shape == (count,)
    error = (D - y).square().flatten(1).sum(1)
    assert torch.allclose(got.error, error, rtol=1e-3, atol=1e-3)  # from the loss, whose z was scaled


def test_streams_differ_by_seed_and_purpose_and_are_stable():
    keys = {
        stream(s, *p) for s in (0, 1, 12) for p in (("sigma", 0), ("sigma", 1), ("eps", 0), (), ("0",), ("sigma", 0, 0))
    }
    assert len(keys) == 18 and all(0 <= key < 2**64 for key in keys)
    # Old runs resume only while these stay: blake2b of "0/sigma/0" and "7/eps/2", little-endian.
    assert (stream(0, "sigma", 0), stream(7, "eps", 2)) == (2498305949048635282, 4071367828683841495)
    with pytest.raises(ValueError, match="seed"):
        stream(-1)
