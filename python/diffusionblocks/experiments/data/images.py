"""Image classification data: splits, order of the batches, normalisation and augmentation.

Stateless: order and augmentation are functions of (seed, step), so resuming needs only the step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...noise.rng import stream
from ...targets.devices import send
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
            _check(getattr(self, part), self.num_classes, shape, f"{self.name} ({part})")
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
        _check(split, source.num_classes, source.shape, f"{name} ({part})")
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
        raise ValueError(f"{data.name} has (channels, image_size, num_classes) {have}, the model {want}: set --model.*")


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Return the indices of batch `step` among `n` samples: (batch_size,) int64 on the CPU.

    The batches cut an endless sequence of shuffled epochs: every batch is full, each epoch holds every sample once, and
    a batch across two epochs may hold a sample twice.

    Raises:
        ValueError: n or batch_size isn't positive, or step is negative.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"need n >= 1, batch_size >= 1, step >= 0; got n={n}, batch_size={batch_size}, step={step}")
    first, end = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n, (end - 1) // n + 1)
    # cat copies: the caller can't write into the cached permutation
    return torch.cat([_permutation(n, seed, e)[max(first - e * n, 0) : end - e * n] for e in epochs])


def prepare(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], *, device: torch.device | str) -> Tensor:
    """Return (images / 255 - mean) / std, float32 on `device`.

    Args:
        images: (B, C, H, W) uint8, on any device.
        mean, std: one number per channel, of images scaled to [0, 1].
        device: of the result.

    Raises:
        ValueError: an empty batch, another shape or dtype, or a std that isn't positive.
    """
    _check_images(images)
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(f"need {images.shape[1]} numbers, one per channel, got mean={mean}, std={std}")
    if not all(s > 0 for s in std):
        raise ValueError(f"std must be positive in every channel, got {std}; drop channels that never vary")
    images = send(images, device)
    scale, shift = _scale_shift(tuple(mean), tuple(std), images.device)
    return torch.addcmul(shift, images.float(), scale)


def augment(images: Tensor, *, pad: int, flip: bool, seed: int, step: int) -> Tensor:
    """Shift each image by up to `pad` pixels, padding with black, and mirror half of them.

    Args:
        images: (B, C, H, W) uint8.
        pad: largest shift in pixels, in each direction.
        flip: mirror each image with probability 1/2.
        seed, step: address of the draws, which are the same on every device.

    Raises:
        ValueError: an empty batch, another shape or dtype, or a negative pad or step.
    """
    _check_images(images)
    if pad < 0 or step < 0:
        raise ValueError(f"pad and step must not be negative, got pad={pad}, step={step}")
    if not pad and not flip:
        return images
    height, width = images.shape[2:]
    mirrored, top, left = send(_draws(len(images), pad, stream(seed, "augment", step)), images.device)
    rows = torch.arange(height, device=images.device) + top[:, None]  # (B, H)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    if flip:
        columns = torch.where(mirrored[:, None] == 1, columns.flip(1), columns)
    columns = columns + left[:, None]  # (B, W)
    # (B, 1, 1), (B, H, 1) and (B, 1, W) index around the slice of channels: the result is (B, H, W, C)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, (pad, pad, pad, pad))
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Loader:
    """Training batches of a split by step: shuffled, augmented, normalised by the dataset's mean and std.

    Only the batch moves to `device`. pad, flip: as for `augment`.

    Raises:
        ValueError: batch_size below 1, a negative seed or pad, or an empty split.
    """

    def __init__(
        self,
        split: Split,
        data: ImageData,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str,
        pad: int = 0,
        flip: bool = False,
    ) -> None:
        _check(split, data.num_classes, (data.channels, *data.train.images.shape[2:]), data.name)
        if batch_size < 1 or pad < 0 or seed < 0:
            raise ValueError(f"need batch_size >= 1, pad >= 0, seed >= 0; got {batch_size}, {pad}, {seed}")
        self.split, self.data, self.batch_size = split, data, batch_size
        self.seed, self.device, self.pad, self.flip = seed, torch.device(device), pad, flip

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return batch `step` >= 0 on the device: x (batch_size, C, H, W) float32, labels (batch_size,) int64."""
        indices = batch_indices(len(self.split), self.batch_size, seed=self.seed, step=step)
        indices = indices.to(self.split.images.device)
        images = send(self.split.images[indices], self.device)
        images = augment(images, pad=self.pad, flip=self.flip, seed=self.seed, step=step)
        x = prepare(images, self.data.mean, self.data.std, device=self.device)
        return x, send(self.split.labels[indices], self.device)


@lru_cache(maxsize=8)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(stream(seed, "order", epoch)))


def _draws(count: int, pad: int, key: int) -> Tensor:
    """Return (3, count) int64: mirror (0 or 1), and the crop's top and left edge in 0..2 pad."""
    generator = torch.Generator().manual_seed(key)
    coin = torch.randint(2, (1, count), generator=generator)
    return torch.cat([coin, torch.randint(2 * pad + 1, (2, count), generator=generator)])


@lru_cache(maxsize=8)
def _scale_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (C, 1, 1), of x -> x scale + shift; cached, since the copy to a GPU waits for it."""
    constants = [[1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]
    scale, shift = torch.tensor(constants, device=device, dtype=torch.float32)[:, :, None, None]
    return scale, shift


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


def _check(split: Split, num_classes: int, shape: tuple[int, ...], where: str) -> None:
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


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or not images.numel() or images.dtype != torch.uint8:
        raise ValueError(f"need a batch (B, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
