"""Images of a DiT run: their classes, the options of sampling, and the memory held meanwhile."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from diffusionblocks.checkpoint.layout import PAGE
from diffusionblocks.experiments import commands
from diffusionblocks.experiments.tasks.dit import DiTTask, ImageOptions
from diffusionblocks.offload.memory import count_bytes
from diffusionblocks.offload.offloader import Offloader
from tiny_all import resident
from tiny_dit import config, scrambled

CPU = torch.device("cpu")


def test_samples_are_written_in_whole_classes_a_row(tmp_path):
    task = DiTTask(config(out=tmp_path))
    model = commands.open_trainer(task)[0].model
    files = commands.sample(task, model, tmp_path / "samples", count=20, seed=0)
    assert [file.name for file in files] == ["samples.png", "trajectory.png"]
    grid = numpy.array(Image.open(files[0]))
    assert grid.shape == (5 * (9 * 8 + 14), 4 * 9 * 8)  # each row under its labels
    assert Image.open(files[1]).width > 3 * 80
    again = commands.sample(task, model, tmp_path / "again", count=20, seed=0, steps=6)
    assert files[0].read_bytes() == again[0].read_bytes()
    with pytest.raises(ValueError, match="images take no prompt"):
        commands.sample(task, model, tmp_path / "other", count=20, seed=0, prompt="a")


@pytest.mark.parametrize(
    ("count", "wide"), [(1, 1), (3, 2), (10, 3), (16, 4), (20, 4), (50, 5), (100, 10), (1000, 100)]
)
def test_samples_are_of_all_classes_in_a_grid_nearly_square(count, wide):
    labels, columns = ImageOptions().labels(count, 10)
    amounts = labels.bincount(minlength=10)
    assert len(labels) == count and bool((labels.diff() >= 0).all())
    assert int(amounts.max() - amounts.min()) <= 1 and columns == wide


def test_guidance_sampler_and_class_can_be_chosen_when_sampling(tmp_path):
    task, model = DiTTask(config(out=tmp_path)), scrambled()

    def images(name, **options):
        return commands.sample(task, model, tmp_path / name, count=20, seed=0, **options)[0].read_bytes()

    own = images("own")
    assert images("same", guidance=2.0, sampler="euler") == own, "the run's own settings"
    others = [images("free", guidance=0.0), images("strong", guidance=4.0), images("heun", sampler="heun")]
    assert len({own, *others}) == 4
    alone = images("threes", label=3)
    assert numpy.array(Image.open(tmp_path / "threes" / "samples.png")).shape == (2 * (9 * 8 + 14), 10 * 9 * 8)
    assert alone != images("zeros", label=0)
    with pytest.raises(ValueError, match="label=10 must be one of the 10 classes"):
        images("eleventh", label=10)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_an_opened_run_holds_averages_of_one_block_and_no_moments(tmp_path, place, monkeypatch, quick_judge):
    task = DiTTask(config(out=tmp_path / "run", draws=0.1))
    commands.start(task.config)
    trainer, _ = commands.open_trainer(task)
    with trainer.averages():
        want = trainer.offloader.weights()
    task, model = commands.open_run(tmp_path / "run")
    if place == "cpu":  # as where a GPU samples
        model.offloader.release()
        Offloader(model, device=CPU, offload="cpu", slots=2)
    found = model.offloader.weights()
    assert want.keys() == found.keys() and all(torch.equal(want[name], t) for name, t in found.items())
    sizes = {part: count_bytes(module.parameters(), CPU) for part, module in task.model().parts().items()}
    denoise, most = model.denoise, []

    def watched(x, z, sigma, *, block):
        assert resident(model) == [block]
        most.append(model.offloader.usage().total)
        return denoise(x, z, sigma, block=block)

    monkeypatch.setattr(model, "denoise", watched)
    commands.sample(task, model, tmp_path / "samples", count=4, seed=0)
    # the shared part, the block that works and the one that is prefetched; buffers besides, of a few numbers
    if place == "disk":
        assert max(most) <= sizes["shared"] + 2 * (sizes["block_0"] + PAGE)
