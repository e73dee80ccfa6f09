"""Images from and to files: grids, which steps are shown, folders of one's own."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from diffusionblocks.experiments.data import images as data
from diffusionblocks.experiments.models.dit import DiTConfig
from diffusionblocks.experiments.plotting.pictures import to_pixels, write_grid
from diffusionblocks.experiments.tasks.dit import DiTAdapter, DiTRun, spread_steps


def test_a_grid_by_hand(tmp_path):
    images = torch.tensor([[[[0]]], [[[100]]], [[[200]]]], dtype=torch.uint8)
    pixels = numpy.array(Image.open(write_grid(images, tmp_path / "grid.png", columns=2)))
    assert pixels[::64, ::64].tolist() == [[0, 255, 100, 255], [255] * 4, [200, 255, 255, 255], [255] * 4]
    assert to_pixels(torch.tensor([-1.0, 0.0, 1.0, -3.0, 3.0]).view(5, 1, 1, 1)).flatten().tolist() == [
        0,
        128,
        255,
        0,
        255,
    ]


def test_every_block_is_shown():
    owners = [0] * 30 + [1] * 2 + [2] * 18
    shown = spread_steps(owners)
    assert {owners[i] for i in shown} == {0, 1, 2} and {29, 31, 49} <= set(shown) and len(shown) <= 12
    assert spread_steps(list(range(20))) == list(range(20))


def test_a_folder_of_images(tmp_path):
    generator = numpy.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for i in range(20):
            pixels = generator.integers(0, 255, (8, 8), dtype=numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    adapter = DiTAdapter(DiTRun(data="folder", folder=tmp_path, batch_size=8, model=DiTConfig(classes=2)))
    assert [len(split) for split in (adapter.data.train, adapter.data.val, adapter.data.test)] == [32, 4, 4]
    assert adapter.data.test.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / ".DS_Store").write_text("not an image")
    (tmp_path / "cats" / ".hidden").write_text("nor this")
    (tmp_path / "birds").mkdir()
    assert data.load("folder", folder=tmp_path).classes == 2, "what is hidden or empty is no class"
    labels, images = adapter.batches(torch.device("cpu")).batch(0)
    assert images.shape == (8, 1, 8, 8) and set(labels.tolist()) <= {0, 1, 2}
    Image.fromarray(numpy.zeros((8, 9), dtype=numpy.uint8)).save(tmp_path / "dogs" / "wide.png")
    with pytest.raises(ValueError, match="is 9x8, not 8x8"):
        data.load("folder", folder=tmp_path)
    (tmp_path / "dogs" / "wide.png").unlink()
    coloured = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=numpy.uint8))
    coloured.save(tmp_path / "dogs" / "red.png")
    assert data.load("folder", folder=tmp_path).channels == 3, "one image in colour makes all of them"
    whole = (tmp_path / "dogs" / "red.png").read_bytes()
    (tmp_path / "dogs" / "red.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"red\.png can't be read to its end"):
        data.load("folder", folder=tmp_path)
    Image.fromarray(generator.integers(0, 60000, (8, 8), dtype=numpy.uint16)).save(tmp_path / "dogs" / "red.png")
    with pytest.raises(ValueError, match=r"red\.png has pixels of Pillow's mode 'I;16'"):
        data.load("folder", folder=tmp_path)
    (tmp_path / "cats" / "0.png").write_text("a text")
    with pytest.raises(ValueError, match="is not an image file"):
        data.load("folder", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="needs folder="):
        data.load("folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image files"):
        data.load("folder", folder=tmp_path / "empty")
