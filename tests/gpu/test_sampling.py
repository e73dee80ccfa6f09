"""Samples on a device are the CPU's: the same noise by address, the same images within rounding, the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny_all
import tiny_lm
from diffusionblocks.experiments.metrics import masked_diffusion
from diffusionblocks.experiments.metrics.bound import held_out_loss
from diffusionblocks.experiments.metrics.classification import walk
from diffusionblocks.experiments.models.generation import Generator
from diffusionblocks.noise.partition import step_levels
from diffusionblocks.sampling.sampler import Walker
from diffusionblocks.training.offload import Residency

CPU = torch.device("cpu")


def walker(name, device, *, prefetch=False, **changes):
    """Return an untrained model's walker on `device`, with weights where training starts from zeros."""
    adapter = tiny_all.adapter(tiny_all.config(name, tiny_all.CONFIGS[name].out, **changes))
    model = adapter.blocks().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return adapter, Walker(model, Residency(model, device=device), prefetch=prefetch)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_images_are_the_cpus_within_rounding(device, sampler, prefetch):
    made = []
    for where, ahead in ((CPU, False), (device, prefetch)):
        adapter, reader = walker("dit", where, sampler=sampler, prefetch=ahead, guidance=2.0)
        levels = step_levels(reader.model.partition, 8)
        images = adapter.walk(reader, torch.arange(6, device=where), levels, seed=5)
        assert images.device.type == where.type and images.isfinite().all()
        made.append(images.cpu())
    expected, found = made
    assert expected.std() > 0.1, "images that all are alike would prove nothing"
    # some 1e-6 an evaluation; guidance doubles it, and 16 evaluations add up
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_the_held_out_loss_is_the_cpus(device):
    found = []
    for where in (CPU, device):
        _, reader = walker("dit", where)
        images = torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8).to(where)
        found.append(held_out_loss(reader, torch.arange(6, device=where), images, count=6)["loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_labels_walk_to_the_cpus_logits(device):
    found = []
    for where in (CPU, device):
        _, reader = walker("vit", where)
        x = torch.linspace(-1, 1, 5 * 64).sin().view(5, 1, 8, 8).to(where)
        steps = walk(reader, x, step_levels(reader.model.partition, 6), start="noise", seed=2)
        found.append(torch.stack([step["logits"].cpu() for step in steps]).softmax(-1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", tiny_lm.KINDS)
def test_texts_are_the_cpus_token_by_token(device, kind):
    texts = []
    for where in (CPU, device):
        adapter, reader = walker("causal_lm", where, model=replace(tiny_lm.KINDS[kind], symbols=tiny_all.SYMBOLS))
        model = adapter.blocks(reader.model.partition).to(where)
        model.load_state_dict(reader.weights())
        prompt = torch.arange(8, device=where).view(2, 4)
        texts.append(Generator(model, step_levels(model.partition, 4), seed=3).generate(prompt, 12).cpu())
    assert len(texts[0].unique()) > 4
    # a token differs only where two scores are equal within rounding: these, by their seed, aren't
    assert torch.equal(*texts)


def test_masks_are_filled_with_the_cpus_tokens(device):
    texts = []
    for where in (CPU, device):
        adapter, reader = walker("masked_lm", where)
        start = torch.full((3, 12), adapter.config.model.symbols, device=where)
        levels = step_levels(reader.model.partition, 6, kind="probability")
        *_, last = masked_diffusion.generate(reader, levels, start, seed=1)
        texts.append(last.z.cpu())
    assert len(texts[0].unique()) > 4
    assert torch.equal(*texts)


def test_puzzles_are_solved_as_on_the_cpu(device):
    found = []
    for where in (CPU, device):
        adapter, reader = walker("recurrent", where)
        x, _ = adapter.puzzles("val", where)
        found.append(adapter.walk(reader, x[:8], 4)[-1]["logits"].cpu().softmax(-1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", tiny_all.CONFIGS)
def test_samples_are_written(name, device, tmp_path):
    adapter, reader = walker(name, device)
    if name == "vit":
        with pytest.raises(ValueError, match="makes no samples"):
            adapter.sample(reader, tmp_path, count=2, seed=0)
        return
    files = adapter.sample(reader, tmp_path, count=2, seed=0, steps=4)
    assert files and all(file.stat().st_size > 0 for file in files)
