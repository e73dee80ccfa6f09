"""Folders of image files as datasets: classes, sizes, modes, and what is wrong in them."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from diffusionblocks.experiments.data.images import load
from diffusionblocks.experiments.models.dit import DiTConfig
from diffusionblocks.experiments.tasks.dit import DiTRun, DiTTask


def test_a_folder_of_images(tmp_path):
    generator = numpy.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for i in range(20):
            pixels = generator.integers(0, 255, (8, 8), dtype=numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    task = DiTTask(DiTRun(data="folder", data_folder=tmp_path, batch_size=8, model=DiTConfig(num_classes=2)))
    assert [len(split) for split in (task.data.train, task.data.val, task.data.test)] == [32, 4, 4]
    assert task.data.test.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / ".DS_Store").write_text("not an image")
    (tmp_path / "cats" / ".hidden").write_text("nor this")
    (tmp_path / "birds").mkdir()
    assert load("folder", folder=tmp_path).num_classes == 2, "what is hidden or empty is no class"
    labels, images = task.batches(torch.device("cpu")).batch(0)
    assert images.shape == (8, 1, 8, 8) and set(labels.tolist()) <= {0, 1, 2}
    Image.fromarray(numpy.zeros((8, 9), dtype=numpy.uint8)).save(tmp_path / "dogs" / "wide.png")
    with pytest.raises(ValueError, match="is 9x8, not 8x8"):
        load("folder", folder=tmp_path)
    (tmp_path / "dogs" / "wide.png").unlink()
    coloured = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=numpy.uint8))
    coloured.save(tmp_path / "dogs" / "red.png")
    assert load("folder", folder=tmp_path).channels == 3, "one image in colour makes all of them"
    whole = (tmp_path / "dogs" / "red.png").read_bytes()
    (tmp_path / "dogs" / "red.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"red\.png can't be read to its end"):
        load("folder", folder=tmp_path)
    Image.fromarray(generator.integers(0, 60000, (8, 8), dtype=numpy.uint16)).save(tmp_path / "dogs" / "red.png")
    with pytest.raises(ValueError, match=r"red\.png has pixels of Pillow's mode 'I;16'"):
        load("folder", folder=tmp_path)
    (tmp_path / "cats" / "0.png").write_text("a text")
    with pytest.raises(ValueError, match="is not an image file"):
        load("folder", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"needs folder= \(--data-folder\).*: none is given"):
        load("folder")
    with pytest.raises(FileNotFoundError, match=r"needs folder= \(--data-folder\).*: .*nope does not exist"):
        load("folder", folder=tmp_path / "nope")
    with pytest.raises(FileNotFoundError, match=r"0\.png is a file"):
        load("folder", folder=tmp_path / "cats" / "0.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image files"):
        load("folder", folder=tmp_path / "empty")
