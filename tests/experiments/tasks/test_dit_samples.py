"""Images of a DiT run: their classes, what can be chosen anew, and what is held while they are made."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from diffusionblocks.experiments import commands as jobs
from diffusionblocks.experiments.tasks.dit import DiTAdapter, ImageOptions
from diffusionblocks.sampling.sampler import Walker
from diffusionblocks.training.memory import count_bytes
from reading import reader
from tiny_dit import config, scrambled

CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path):
    return jobs.open_session(DiTAdapter(config(out=tmp_path)))


def test_samples_are_written_a_class_a_row(session, tmp_path):
    adapter = DiTAdapter(session.config)
    files = jobs.sample(adapter, reader(session), tmp_path / "samples", count=20, seed=0)
    assert [file.name for file in files] == ["samples.png", "trajectory.png"]
    grid = numpy.array(Image.open(files[0]))
    assert grid.shape == (10 * 9 * 8, 2 * 9 * 8)
    assert Image.open(files[1]).width > 3 * 80
    again = jobs.sample(adapter, reader(session), tmp_path / "again", count=20, seed=0, steps=6)
    assert files[0].read_bytes() == again[0].read_bytes()
    with pytest.raises(ValueError, match="images take no prompt"):
        jobs.sample(adapter, reader(session), tmp_path / "other", count=20, seed=0, prompt="a")


@pytest.mark.parametrize("count", [3, 10, 16, 20])
def test_samples_are_of_all_classes(count):
    labels, columns = ImageOptions().labels(count, 10)
    amounts = labels.bincount(minlength=10)
    assert len(labels) == count and int(amounts.max() - amounts.min()) <= 1 and columns == int(amounts.max())


def test_guidance_sampler_and_class_can_be_chosen_when_sampling(tmp_path):
    adapter, walker = DiTAdapter(config(out=tmp_path)), Walker(scrambled())

    def images(name, **options):
        return jobs.sample(adapter, walker, tmp_path / name, count=20, seed=0, **options)[0].read_bytes()

    own = images("own")
    assert images("same", guidance=2.0, sampler="euler") == own, "what the run's own are"
    others = [images("free", guidance=0.0), images("strong", guidance=4.0), images("heun", sampler="heun")]
    assert len({own, *others}) == 4
    alone = images("threes", label=3)
    assert numpy.array(Image.open(tmp_path / "threes" / "samples.png")).shape == (2 * 9 * 8, 10 * 9 * 8)
    assert alone != images("zeros", label=0)
    with pytest.raises(ValueError, match="label=10 must be one of the 10 classes"):
        images("eleventh", label=10)


@pytest.mark.parametrize("store", ["disk", "host"])
def test_reading_a_run_holds_averages_of_one_block_and_no_moments(tmp_path, store, monkeypatch):
    adapter = DiTAdapter(config(out=tmp_path / "run", store=store, checkpoint_every=1))
    jobs.start(adapter.config)
    session = jobs.open_session(adapter)
    with session.residency.averages():
        want = session.residency.weights()
    adapter, walker = jobs.open_run(tmp_path / "run")
    assert want.keys() == walker.weights().keys() and all(torch.equal(want[k], t) for k, t in walker.weights().items())
    sizes = {part: count_bytes(module.parameters(), CPU) for part, module in adapter.blocks().parts().items()}
    denoise, most = walker.model.denoise, []

    def watched(x, z, sigma, *, block, handed):
        resident = [b for b, module in enumerate(walker.model.blocks) if any(p.numel() for p in module.parameters())]
        assert resident == ([block] if store == "disk" else [0, 1, 2])
        name, read = walker.residency._ahead or ("", None)
        ahead = read.result() if read else {}
        assert name in ("", f"block_{block + 1}") and all(key.startswith("weight/") for key in ahead)
        most.append(walker.residency.usage().total + count_bytes(ahead.values(), CPU))
        return denoise(x, z, sigma, block=block, handed=handed)

    monkeypatch.setattr(walker.model, "denoise", watched)
    jobs.sample(adapter, walker, tmp_path / "samples", count=4, seed=0)
    # the shared part, the block that works and the one that is read ahead; buffers besides, of a few numbers
    if store == "disk":
        assert max(most) <= sizes["shared"] + 2 * sizes["block_0"] + 4096
