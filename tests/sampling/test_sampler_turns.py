"""Sampler: the denoiser of whole splits, in batches, with as few runs of blocks and as few blocks as can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import small
from diffusionblocks import (
    DiffusionBlocks,
    Offloader,
    Sampler,
    StemHead,
    TokenTarget,
    make_partition,
    spread_codebook,
    step_levels,
)
from diffusionblocks.noise.density import LogNormal

KINDS = ("labels", "images", "tokens", "masked")


class Clean(nn.Embedding):
    """A stem whose layers don't see z."""

    sees_z = False

    def clean(self, x):
        return super().forward(x)

    def forward(self, x, z, c_noise):
        return self.clean(x), None


class Layer(nn.Linear):
    def forward(self, h, cond):
        return h + super().forward(h).tanh()


class Head(nn.Linear):
    def features(self, h):
        return h

    def forward(self, h, cond):
        return super().forward(h)


def blind(*, ensemble: bool = False) -> DiffusionBlocks:
    """Return a model of tokens whose three blocks don't see z."""
    target, partition = TokenTarget(spread_codebook(5, 8)), make_partition(LogNormal(), 3, 3)
    around = StemHead(Clean(5, 8), Head(8, 5))
    return DiffusionBlocks(around, [Layer(8, 8) for _ in range(3)], target, partition, ensemble=ensemble)


def noised(model: DiffusionBlocks, y: torch.Tensor, sigma: float) -> torch.Tensor:
    return model.target.noised(y, torch.full(model.target.level_shape(y), sigma), seed=0, offset=0)


def levels(model: DiffusionBlocks, steps: int = 6) -> list[float]:
    return list(step_levels(model.partition, steps))[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_denoise_of_the_levels_owner_in_batches(kind):
    model, (x, y) = small.model(kind, blocks=2), small.batch(kind, size=7)
    whole, pieces = Sampler(model, x), Sampler(model, x, batch=3)
    assert not model.training, "dropout would make a sample depend on chance"
    for sigma in levels(model):
        z = noised(model, y, sigma)
        want = model.denoise(x, z, sigma, block=int(model.partition.block_of(sigma)))
        for sampler in (whole, pieces):
            # products of fewer rows may round otherwise; logits are scaled by up to 1 / sigma^2
            for have, expected in zip(sampler(z, sigma), want, strict=True):
                torch.testing.assert_close(have, expected, rtol=1e-5, atol=1e-4)
                assert not have.requires_grad


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_block_that_does_not_see_z_is_run_once_for_all_its_levels(ensemble):
    model, run = blind(ensemble=ensemble).eval(), []
    for b, block in enumerate(model.blocks):
        block.layers[0].register_forward_hook(lambda *_, b=b: run.append(b))
    x = torch.randint(5, (7, 4))
    sigmas, sampler = levels(model, 9), Sampler(model, x, batch=3)
    found = [sampler(noised(model, x, sigma), sigma) for sigma in sigmas]
    assert run == ([0, 1, 2] * 3 if ensemble else [0, 0, 0, 1, 1, 1, 2, 2, 2])
    for output, sigma in zip(found, sigmas, strict=True):
        for have, want in zip(output, model.denoise(x, noised(model, x, sigma), sigma), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-4)  # as above


@pytest.mark.parametrize("prefetch", [False, True])
def test_blocks_come_in_turn_and_the_next_one_ahead_if_asked(prefetch, tmp_path, monkeypatch):
    model, (x, y) = small.model("images", blocks=4), small.batch("images")
    sigmas = levels(model, 8)
    want = [Sampler(model, x)(noised(model, y, sigma), sigma).denoised for sigma in sigmas]
    offloader = Offloader(model, device="cpu", offload="disk", folder=tmp_path)
    ahead, fetch = [], offloader.prefetch
    monkeypatch.setattr(offloader, "prefetch", lambda block: (ahead.append((offloader.active, block)), fetch(block)))
    sampler = Sampler(model, x, prefetch=prefetch)
    for sigma, expected in zip(sigmas, want, strict=True):
        assert torch.equal(sampler(noised(model, y, sigma), sigma).denoised, expected)
        assert offloader.active == model.partition.block_of(sigma)
    assert set(ahead) == ({(0, 1), (1, 2), (2, 3)} if prefetch else set())


def test_z_of_another_length_is_an_error():
    model, (x, y) = small.model("labels"), small.batch("labels")
    with pytest.raises(ValueError, match="batch size"):
        Sampler(model, x)(noised(model, y[:3], 1.0), 1.0)
