"""Folders of image files of one's own: classes, splits, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...noise.rng import stream
from .sources import Pair, Source, own_folder, stratified, visible

GREY, COLOUR = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # Pillow's modes of at most 8 bits
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
Resize = Literal["crop", "stretch"]
Files = list[tuple[Path, int]]  # image files with their labels


def image_folder(folder: Path | None, *, size: int | None = None, resize: Resize | None = None) -> Source:
    """Return the source of a folder of square image files of one size; its sub-folders, if any, are the classes.

    With sub-folders "train" and "test" (and "val"), each of them holds the files or classes of its split; else a fixed
    tenth of each class is the test split.

    Args:
        folder: The folder.
        size: Width and height in pixels; those of the first image by default.
        resize: Take images of other sizes, too: "stretch" them, or "crop" the middle of them, scaled to fit.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: no images, folders within a class, classes that training lacks, files that aren't images of at most
            8 bits per channel, or several sizes.
    """
    folder = own_folder("folder", folder, "image files")
    places = _splits(folder)
    names = _classes(places.get("train", folder))
    files = {split: _files(place, names) for split, place in places.items()}
    every = [path for listed in files.values() for path, _ in listed]
    modes, widths, _ = zip(*(_header(path) for path in every), strict=True)
    channels, side = 1 if set(modes) <= GREY else 3, size or widths[0]
    pairs = {split: _pair(listed, channels, side, resize) for split, listed in files.items()}
    if "train" not in pairs:
        images, labels = pairs.pop("all")
        if len(labels) < 10:
            raise ValueError(
                f"{folder} has {len(labels)} images, of which a tenth is to be the test split: give ten or more, or "
                "sub-folders train and test"
            )
        test, train = stratified(labels, len(labels) // 10, stream(0, "folder", "test"))
        pairs = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return Source((channels, side, side), max(1, len(names)), lambda _: pairs, names)


def _splits(folder: Path) -> dict[str, Path]:
    """Return the folder of each split by its name, or {"all": folder}."""
    found = {split: path for split, names in SPLITS.items() for path in visible(folder) if path.name.lower() in names}
    if "train" not in found:
        return {"all": folder}
    if "test" not in found:
        raise ValueError(f"{folder} has a folder {found['train'].name} and none called test: give it one")
    others = [path.name for path in visible(folder) if path.is_dir() and path not in found.values()]
    if others:
        raise ValueError(f"{folder} has {', '.join(others)} beside its splits: move them elsewhere")
    return found


def _classes(folder: Path) -> tuple[str, ...]:
    """Return the names of the sub-folders that hold images; none if the images are in the folder itself."""
    return tuple(d.name for d in visible(folder) if d.is_dir() and any(visible(d)))


def _files(folder: Path, names: tuple[str, ...]) -> Files:
    """Return a split's files with the number of their class among `names`."""
    if unknown := set(_classes(folder)) - set(names):
        raise ValueError(f"{folder} has the classes {', '.join(sorted(unknown))}, which train lacks")
    places = [folder / name for name in names] or [folder]
    listed = [(label, path) for label, place in enumerate(places) if place.is_dir() for path in visible(place)]
    nested = [path for _, path in listed if path.is_dir() and any(visible(path))]
    if nested:
        raise ValueError(
            f"{nested[0]} is a folder within a class: images lie in FOLDER/CLASS/, or FOLDER/train/CLASS/ and "
            "FOLDER/test/CLASS/, and no deeper; move them up"
        )
    files = [(path, label) for label, path in listed if path.is_file()]
    if not files:
        raise ValueError(f"{folder} holds no image files, and no sub-folders with any")
    return files


def _pair(files: Files, channels: int, size: int, resize: Resize | None) -> Pair:
    images = torch.stack([read_image(path, channels, size, resize) for path, _ in files])
    return images, torch.tensor([label for _, label in files])


def read_image(path: Path, channels: int, size: int, resize: Resize | None = None) -> Tensor:
    """Load an image file as (C, S, S) uint8, resized if asked for. Raises ValueError if it is unreadable or of another
    size."""
    _, width, height = _header(path)
    if resize is None and (width, height) != (size, size):
        raise ValueError(
            f"{path} is {width}x{height}, not {size}x{size}: resize it first, or train with --resize crop or stretch"
        )
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except OSError as error:
        raise ValueError(f"{path} can't be read to its end ({error}); put back the whole file") from error
    if resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    elif resize == "stretch":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(image)).reshape(size, size, channels).permute(2, 0, 1).contiguous()


def _header(path: Path) -> tuple[str, int, int]:
    """Return an image file's Pillow mode, width and height."""
    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image file") from error
    except OSError as error:
        raise ValueError(f"{path} can't be read: {(error.strerror or str(error)).lower()}") from error
    if mode not in GREY | COLOUR:
        raise ValueError(f"{path} has pixels of Pillow's mode {mode!r}, not of 8 bits a channel; convert it first")
    return mode, width, height
