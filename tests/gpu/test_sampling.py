"""Samples on a device are the CPU's: the same noise by address, the same images within rounding, the same tokens."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.noise.partition import step_levels

CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", small.KINDS)


def model(kind, device, offload="cpu"):
    """Return an untrained model on `device`, with weights where training starts from zeros."""
    made = small.model(kind, blocks=3, layers=3).eval()
    made.loss(0, *small.batch(kind))  # from which the shape of a sample is known
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    db.Offloader(made, device=device, offload=offload)
    return made


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_images_are_the_cpus_within_rounding(device, sampler, offload):
    made = []
    for where in (CPU, device):
        x = torch.arange(6, device=where) % 3
        images = db.sample(model("images", where, offload), x, steps=8, sampler=sampler, guidance=2.0, seed=5)
        assert images.device.type == where.type and images.isfinite().all()
        made.append(images.cpu())
    expected, found = made
    assert expected.std() > 0.1, "images that all are alike would prove nothing"
    # some 1e-6 an evaluation; guidance doubles it, and 16 evaluations add up
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["labels", "tokens", "masked"])
def test_labels_and_tokens_are_the_cpus(device, kind):
    found = []
    for where in (CPU, device):
        x, _ = small.batch(kind, size=12)
        x = 8 * x if kind == "labels" else x  # an untrained model has a favourite label
        found.append(db.sample(model(kind, where), x.to(where), steps=6).cpu())
    assert len(found[0].unique()) > 1
    # one differs only where two scores are equal within rounding: these, by their seed, aren't
    assert torch.equal(*found)


@every_kind
@pytest.mark.parametrize("prefetch", [False, True])
def test_denoised_estimates_are_the_cpus(device, kind, prefetch):
    found = []
    for where in (CPU, device):
        made = model(kind, where)
        x, y = (t.to(where) for t in small.batch(kind))
        read = db.Sampler(made, x, batch=3, prefetch=prefetch and where == device)
        outputs = []
        for i, level in enumerate(step_levels(made.partition, 5)[:-1]):
            sigma = torch.full(made.target.level_shape(y), level, device=where)
            outputs.append(read(made.target.noised(y, sigma, seed=1, offset=i), level))
        found.append([t.cpu() for output in outputs for t in (output.raw, output.denoised)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_kind
def test_the_forward_pass_is_the_cpus(device, kind):
    found = [model(kind, where)(small.batch(kind)[0].to(where)).cpu() for where in (CPU, device)]
    torch.testing.assert_close(found[1].softmax(-1), found[0].softmax(-1), rtol=0, atol=1e-3)
