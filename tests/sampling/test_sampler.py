"""A model as the denoiser of given conditioning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small
from diffusionblocks.noise.partition import step_levels

SIGMA = 0.7


class Blind(nn.Module):
    """A stem whose layers see x alone."""

    sees_z = False

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 8), 0

    def clean(self, x):
        self.calls += 1
        return self.linear(x)

    def forward(self, x, z, c_noise):
        return self.clean(x), None


class Layer(nn.Linear):
    def forward(self, h, cond):
        return h + super().forward(h)


def blind(blocks=3):
    torch.manual_seed(0)
    stem = Blind()
    target = db.LabelTarget(num_classes=3, dim=8)
    return stem, db.from_layers([Layer(8, 8) for _ in range(3)], stem=stem, head=nn.Linear(8, 3), target=target,
                                blocks=blocks)  # fmt: skip


def noised(model, kind):
    x, y = small.batch(kind, size=7)
    sigma = torch.full(model.target.level_shape(y), SIGMA)
    return x, model.target.noised(y, sigma, seed=0, offset=0)


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("batch", [1, 3, 7, 512])
def test_pieces_of_a_batch_are_the_whole(kind, batch):
    model = small.model(kind)
    x, z = noised(model, kind)
    raw, D = db.Sampler(model, x, batch=batch)(z, SIGMA)
    wanted = model.eval().denoise(x, z, SIGMA)
    assert raw.shape == wanted.raw.shape and D.shape == z.shape == wanted.denoised.shape
    torch.testing.assert_close(raw, wanted.raw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(D, wanted.denoised, rtol=1e-5, atol=1e-5)
    assert not raw.requires_grad and not D.requires_grad


def test_layers_evaluate_without_dropout():
    model = small.model().train()
    read = db.Sampler(model, *noised(model, "labels")[:1])
    z = noised(model, "labels")[1]
    assert not model.training and torch.equal(read(z, SIGMA).raw, read(z, SIGMA).raw)


@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
def test_the_block_that_owns_the_level_is_brought(tmp_path, offload):
    model = small.model(blocks=4)
    x, z = noised(model, "labels")
    levels = step_levels(model.partition, 9)[:-1]
    wanted = [db.Sampler(model, x)(z, sigma) for sigma in levels]
    offloader = db.Offloader(model, device="cpu", offload=offload, folder=tmp_path)
    read, active = db.Sampler(model, x), []
    for sigma, output in zip(levels, wanted, strict=True):
        assert torch.equal(read(z, sigma).denoised, output.denoised)
        active.append(offloader.active)
    assert active == [int(model.partition.block_of(sigma)) for sigma in levels]
    assert sorted(set(active)) == [0, 1, 2, 3] and active == sorted(active)


def test_a_block_that_does_not_see_z_is_run_once():
    stem, model = blind()
    x, z = noised(model, "labels")
    read = db.Sampler(model, x, batch=4)
    levels = step_levels(model.partition, 12)[:-1]
    for sigma in levels:
        found, wanted = read(z, sigma), model.denoise(x, z, sigma)
        torch.testing.assert_close(found.raw, wanted.raw, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.denoised, wanted.denoised, rtol=1e-5, atol=1e-6)
    assert stem.calls == len(levels) + 3 * 2, "denoise's own, and two pieces per block"


def test_an_ensemble_is_the_mean_of_all_blocks_run_once():
    stem, model = blind()
    model.ensemble = True
    x, z = noised(model, "labels")
    read = db.Sampler(model, x)
    mean = torch.stack([model.logits(x, block) for block in range(3)]).mean(0)
    stem.calls = 0
    for sigma in (5.0, 1.0, 0.2):
        wanted = model.target.posterior(mean, z, torch.full((7,), sigma))
        torch.testing.assert_close(read(z, sigma).raw, wanted.raw, rtol=1e-5, atol=1e-5)
    assert stem.calls == 3


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_levels_are_positive(sigma):
    model = small.model()
    x, z = noised(model, "labels")
    with pytest.raises(ValueError, match="sigma"):
        db.Sampler(model, x)(z, sigma)
