"""Images of one's own: other sizes, splits of one's own, folders that are nested too deep."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from diffusionblocks.experiments.data.folder import read_image
from diffusionblocks.experiments.data.images import load
from diffusionblocks.experiments.models import ViTConfig
from diffusionblocks.experiments.tasks.vit import ViTRun, ViTTask


def write(folder, count, *, width=8, height=8):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = numpy.full((height, width), 10 * i, dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_other_sizes_are_cut_or_stretched_where_asked_for(tmp_path):
    write(tmp_path / "cats", 20, width=12)
    write(tmp_path / "dogs", 20, height=31, width=16)
    with pytest.raises(ValueError, match=r"is 16x31, not 12x12|is 12x8, not 12x12"):
        load("folder", folder=tmp_path)
    for resize in ("crop", "stretch"):
        data = load("folder", folder=tmp_path, size=8, resize=resize)
        assert data.train.images.shape == (32, 1, 8, 8) and data.num_classes == 2
    with pytest.raises(ValueError, match="resize='crop' is for images of a folder of one's own"):
        load("digits", size=8, resize="crop")


def test_a_crop_keeps_the_middle_and_stretching_all(tmp_path):
    pixels = numpy.zeros((4, 12), dtype=numpy.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png", 1, 4, "crop"), torch.full((1, 4, 4), 200, dtype=torch.uint8))
    whole = read_image(tmp_path / "a.png", 1, 4, "stretch").float()
    assert whole[..., 0].mean() < 50 < 100 < whole[..., 1:3].mean()


def test_a_run_resizes_to_its_models_images(tmp_path):
    write(tmp_path / "cats", 20, width=12)
    write(tmp_path / "dogs", 20, height=16)
    model = ViTConfig(image_size=8, num_classes=2, dim=16, layers=3, heads=2, mlp=32, cond=8, patch=4)
    run = ViTRun(data="folder", data_folder=tmp_path, resize="crop", model=model, batch_size=4)
    assert ViTTask(run).batches(torch.device("cpu")).batch(0)[0].shape == (4, 1, 8, 8)


def test_images_without_classes_are_no_task_for_a_classifier(tmp_path):
    write(tmp_path, 20)
    run = ViTRun(data="folder", data_folder=tmp_path, batch_size=4)
    with pytest.raises(ValueError, match="put the images of each class in a sub-folder"):
        _ = ViTTask(run).data


def test_images_too_few_to_split_are_refused(tmp_path):
    write(tmp_path / "cats", 5)
    with pytest.raises(ValueError, match="has 5 images, of which a tenth is to be the test split"):
        load("folder", folder=tmp_path)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("training", "Validation", "testing")])
def test_splits_of_ones_own(tmp_path, names):
    for name, count in zip(names, (6, 3, 2), strict=True):
        write(tmp_path / name / "cats", count)
        write(tmp_path / name / "dogs", count)
    data = load("folder", folder=tmp_path)
    assert [len(data.train), len(data.val), len(data.test)] == [12, 6, 4] and data.class_names == ("cats", "dogs")
    assert data.test.labels.tolist() == [0, 0, 1, 1]


def test_without_a_validation_split_it_is_drawn_from_training(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / name / "cats", 10)
        write(tmp_path / name / "dogs", 10)
    data = load("folder", folder=tmp_path)
    assert [len(data.train), len(data.val), len(data.test)] == [18, 2, 20]


def test_splits_that_do_not_fit_are_explained(tmp_path):
    write(tmp_path / "train" / "cats", 4)
    with pytest.raises(ValueError, match="has a folder train and none called test"):
        load("folder", folder=tmp_path)
    write(tmp_path / "test" / "birds", 4)
    with pytest.raises(ValueError, match="has the classes birds, which train lacks"):
        load("folder", folder=tmp_path)
    write(tmp_path / "more", 4)
    with pytest.raises(ValueError, match="has more beside its splits"):
        load("folder", folder=tmp_path)


@pytest.mark.parametrize("place", ["cats/old", "train/cats/old", "animals/cats"])
def test_folders_within_a_class_are_refused(tmp_path, place):
    write(tmp_path / place, 4)
    if place.startswith("train"):
        write(tmp_path / "test" / "cats", 4)
    with pytest.raises(ValueError, match=rf"{place} is a folder within a class: images lie in FOLDER/CLASS/, or"):
        load("folder", folder=tmp_path)
