"""Generated images as files: grids with labels, trajectories, the steps that are shown."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from diffusionblocks.experiments.plotting.pictures import CAPTION, to_pixels, write_grid, write_trajectory
from diffusionblocks.experiments.tasks.dit import spread_steps


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


@pytest.mark.parametrize("channels", [1, 3])
def test_labels_stand_above_their_images_and_leave_them_as_they_are(tmp_path, channels):
    images = torch.randint(256, (3, channels, 8, 8), dtype=torch.uint8)
    plain = numpy.array(Image.open(write_grid(images, tmp_path / "plain.png", columns=2)))
    for name, labels in {"ones": [1, 1, 1], "mixed": [1, "a name longer than its image", 1]}.items():
        write_grid(images, tmp_path / f"{name}.png", columns=2, labels=labels)
    ones, mixed = (numpy.array(Image.open(tmp_path / f"{name}.png")) for name in ("ones", "mixed"))
    assert ones.shape[0] == plain.shape[0] + 2 * CAPTION and ones.shape[1:] == plain.shape[1:]
    for row in (0, 1):
        top = (row + 1) * CAPTION + row * 72
        assert numpy.array_equal(ones[top : top + 72], plain[row * 72 : row * 72 + 72])
    captions = ones[:CAPTION]
    assert captions.min() < 100 and numpy.array_equal(captions[:, :72], captions[:, 72:]), "the same label twice"
    assert numpy.array_equal(mixed[:CAPTION, :72], ones[:CAPTION, :72]), "a long label stays in its cell"
    assert not numpy.array_equal(mixed[:CAPTION, 72:], ones[:CAPTION, 72:])
    assert (ones[72 + CAPTION : 72 + 2 * CAPTION, 72:] == 255).all(), "no label without an image"
    with pytest.raises(ValueError, match="as many as the 3 images"):
        write_grid(images, tmp_path / "few.png", columns=2, labels=["one"])


def test_a_trajectory_has_room_for_its_labels(tmp_path):
    estimates = [(sigma, block, torch.zeros(2, 1, 8, 8, dtype=torch.uint8)) for block, sigma in enumerate((9.0, 0.5))]
    plain = numpy.array(Image.open(write_trajectory(estimates, tmp_path / "plain.png", 2)))
    path = write_trajectory(estimates, tmp_path / "labelled.png", 2, ["boot", "dress"])
    labelled = numpy.array(Image.open(path))
    assert labelled.shape[0] == plain.shape[0] and labelled.shape[1] > plain.shape[1] + 30
    assert labelled[60:, :40].min() < 100, "the labels' ink"


def test_every_block_is_shown():
    owners = [0] * 30 + [1] * 2 + [2] * 18
    shown = spread_steps(owners)
    assert {owners[i] for i in shown} == {0, 1, 2} and {29, 31, 49} <= set(shown) and len(shown) <= 12
    assert spread_steps(list(range(20))) == list(range(20))
