"""Image classification data: splits, mean and std."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...noise.rng import stream
from .folder import Resize, image_folder
from .sources import SOURCES, Source, hub_images, idx_folder, stratified

OWN = ("folder", "idx")  # the user's files


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def facts(self) -> dict[str, Any]:
        """Return size and SHA-256, as JSON values."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        digest.update(self.images.contiguous().numpy())
        return {"samples": len(self), "sha256": digest.hexdigest()}

    def take(self, indices: Tensor) -> Split:
        """Return the samples at `indices`, (K,) int64."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A dataset in memory; mean and std per channel are of the training images scaled to [0, 1].

    Raises:
        ValueError: an empty split, or shapes, dtypes or labels that don't fit the other splits or num_classes.
    """

    name: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.train.images.shape[1:])
        for part in ("train", "val", "test"):
            check_split(getattr(self, part), self.num_classes, shape, f"{self.name} ({part})")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{self.name}: need {self.channels} numbers in mean and std, one per channel")

    @property
    def channels(self) -> int:
        """C."""
        return int(self.train.images.shape[1])

    @property
    def image_size(self) -> int:
        """H = W, in pixels."""
        return int(self.train.images.shape[2])

    def facts(self) -> dict[str, Any]:
        """Return what a trained model needs of its data, and each split's size and SHA-256, as JSON values."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
            "image_size": self.image_size,
            "class_names": list(self.class_names),
            "splits": {name: getattr(self, name).facts() for name in ("train", "val", "test")},
        }


def load(
    name: str,
    *,
    folder: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    size: int | None = None,
    resize: Resize | None = None,
) -> ImageData:
    """Load a dataset and set validation images aside. The test split is the same for every seed.

    Args:
        name: one of SOURCES, "folder" or "idx" for the user's files, or "hub:ID" for any dataset of the hub with labels
            and square images of one size.
        folder: for fashion-mnist the folder of the four IDX files, gzipped or not (None: Debian's package
            dataset-fashion-mnist); for cifar100 and tiny-imagenet a copy of the hub's dataset, as parquet or from
            save_to_disk (None: download); for "folder" and "idx" see folder.image_folder and sources.idx_folder.
            digits takes none.
        val_fraction: share of the training images in the validation split, stratified by class, if the data have none.
        seed: of the validation split.
        size, resize: for "folder", see folder.image_folder.

    Raises:
        FileNotFoundError: a missing folder or file, or an unreachable hub.
        ValueError: an unknown name; truncated or foreign files, or images of another shape; labels out of range; an
            empty split.
        ImportError: a library is missing.
    """
    folder = None if folder is None else Path(folder).expanduser()
    if resize is not None and name != "folder":
        raise ValueError(f"resize={resize!r} is for images of a folder of one's own, data='folder', not {name!r}")
    source = image_folder(folder, size=size, resize=resize) if name == "folder" else _source(name, folder)
    pairs = source.load(folder)
    splits = {part: Split(*pair) for part, pair in pairs.items()}
    for part, split in splits.items():
        check_split(split, source.num_classes, source.shape, f"{name} ({part})")
    full, test = splits["train"], splits["test"]
    if "val" in splits:
        train, val = full, splits["val"]
        return ImageData(name, train, val, test, source.num_classes, *_statistics(train.images), source.class_names)
    val_count = _val_count(len(full), val_fraction)
    val_indices, train_indices = stratified(full.labels, val_count, stream(seed, "data", "val"))
    train, val = full.take(train_indices), full.take(val_indices)
    return ImageData(name, train, val, test, source.num_classes, *_statistics(train.images), source.class_names)


def read_data(config: Any) -> ImageData:
    """Return the data that a run's config names, resized to its model's images where it says so."""
    size = config.model.image_size if config.resize else None
    return load(config.data, folder=config.data_folder, seed=config.seed, size=size, resize=config.resize)


def _source(name: str, folder: Path | None) -> Source:
    if name.startswith("hub:"):
        return hub_images(name.removeprefix("hub:"), folder)
    if name not in (*SOURCES, *OWN):
        raise ValueError(f"unknown dataset {name!r}; choose one of {', '.join((*SOURCES, *OWN))}, or 'hub:ID'")
    return idx_folder(folder) if name == "idx" else SOURCES[name]


def check_model(data: ImageData, model: Any) -> None:
    """Raise ValueError if the model's config is for other images or another number of classes."""
    have = (data.channels, data.image_size, data.num_classes)
    want = (model.channels, model.image_size, model.num_classes)
    if have != want:
        names = ("channels", "image-size", "num-classes")
        options = (f"--model.{name} {n}" for name, n, other in zip(names, have, want, strict=True) if n != other)
        raise ValueError(
            f"{data.name} has (channels, image_size, num_classes) {have}, the model {want}: set {' '.join(options)}"
        )


def _val_count(n: int, fraction: float) -> int:
    count = round(n * fraction) if 0 < fraction < 1 else 0
    if not 0 < count < n:
        raise ValueError(f"val_fraction={fraction} of {n} images leaves an empty split; take one within 0..1")
    return count


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std per channel, scaled to [0, 1]; from exact counts, whatever the number of threads."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(images[:, c].flatten(), minlength=256).double() for c in range(images.shape[1])]
    means = [(values @ count / count.sum()).item() for count in counts]
    squares = [((values - m).square() @ count / count.sum()).item() for m, count in zip(means, counts, strict=True)]
    return tuple(means), tuple(square**0.5 for square in squares)


def check_split(split: Split, num_classes: int, shape: tuple[int, ...], where: str) -> None:
    """Raise ValueError unless `split` has images of `shape` (C, H, W), each with a label in [0, num_classes)."""
    images, labels = split.images, split.labels
    if not labels.numel():
        raise ValueError(f"{where} is empty; every split needs at least one image")
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"{where}: labels must be (N,) int64, got {tuple(labels.shape)} {labels.dtype}")
    if images.dtype != torch.uint8 or images.shape != (len(labels), *shape):
        expected = f"({len(labels)} labels, {', '.join(map(str, shape))}) uint8"
        raise ValueError(f"{where}: images must be {expected}, got {tuple(images.shape)} {images.dtype}")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(f"{where}: labels must be in 0..{num_classes - 1}, got {low}..{high}; check its source")


def check_images(images: Tensor) -> None:
    if images.dim() != 4 or not images.numel() or images.dtype != torch.uint8:
        raise ValueError(f"need a batch (B, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
