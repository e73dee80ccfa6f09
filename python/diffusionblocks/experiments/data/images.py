"""Image classification data: the splits, the order of the batches, normalisation and augmentation.

Nothing here has state: order and augmentation are functions of (seed, step), so a resumed run
needs only its step.
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
from .sources import SOURCES, Source, hub_images, idx_folder, image_folder, stratified

NAMES = tuple(SOURCES)
OWN = {"folder": image_folder, "idx": idx_folder}  # files of one's own


@dataclass(frozen=True)
class Split:
    """images: (N, C, H, W) uint8. labels: (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """The samples at `indices`: (K,) int64."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A dataset in memory. mean, std: one number a channel, of the training images scaled to 0..1.

    Raises: ValueError if a split is empty, or its shapes, dtypes or labels don't fit the others or `classes`.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.train.images.shape[1:])
        for part in ("train", "val", "test"):
            _check(getattr(self, part), self.classes, shape, f"{self.name} ({part})")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{self.name}: need {self.channels} numbers in mean and std, one a channel")

    @property
    def channels(self) -> int:
        """C."""
        return int(self.train.images.shape[1])

    @property
    def image_size(self) -> int:
        """H = W, in pixels."""
        return int(self.train.images.shape[2])

    def fingerprint(self) -> str:
        """SHA-256 of what is trained on."""
        digest = hashlib.sha256(self.train.labels.numpy().tobytes())
        digest.update(self.train.images.contiguous().numpy())
        return digest.hexdigest()


def load(name: str, *, folder: str | Path | None = None, val_fraction: float = 0.1, seed: int = 0) -> ImageData:
    """The dataset `name`: one of NAMES, "folder" or "idx" for files of one's own, or "hub:ID" for any of the hub's with
    square images of one size and labels. Its test split is the same for every seed.

    folder: where the files are. For fashion-mnist the four IDX files, gzipped or not (None: where Debian's
    package dataset-fashion-mnist puts them); for cifar100 and tiny-imagenet a copy of the hub's dataset, as
    parquet or from save_to_disk (None: downloaded); digits comes with scikit-learn and takes none; for
    "folder" and "idx" see sources.image_folder and sources.idx_folder.
    val_fraction: share of the training images set aside for choices, stratified by class, drawn by `seed`.
    Raises: FileNotFoundError on a missing folder or file, or an unreachable hub. ValueError on an unknown
    name, files that are truncated, foreign or of another shape, labels out of range, or an empty split.
    ImportError on a missing library.
    """
    source, where = _source(name, folder), None if folder is None else Path(folder).expanduser()
    pairs = source.read(where)
    full, test = Split(*pairs["train"]), Split(*pairs["test"])
    for part, split in (("train", full), ("test", test)):
        _check(split, source.classes, source.shape, f"{name} ({part})")
    val_count = _val_count(len(full), val_fraction)
    val_indices, train_indices = stratified(full.labels, val_count, stream(seed, "data", "val"))
    train, val = full.take(train_indices), full.take(val_indices)
    return ImageData(name, train, val, test, source.classes, *_statistics(train.images))


def _source(name: str, folder: str | Path | None) -> Source:
    where = None if folder is None else Path(folder).expanduser()
    if name.startswith("hub:"):
        return hub_images(name.removeprefix("hub:"), where)
    if name not in (*SOURCES, *OWN):
        raise ValueError(f"unknown dataset {name!r}; choose one of {', '.join((*NAMES, *OWN))}, or 'hub:ID'")
    return OWN[name](where) if name in OWN else SOURCES[name]


def check_model(data: ImageData, model: Any) -> None:
    """Raise ValueError if a model is for other images or classes."""
    have = (data.channels, data.image_size, data.classes)
    want = (model.channels, model.image_size, model.classes)
    if have != want:
        raise ValueError(f"{data.name} has (channels, image_size, classes) {have}, the model {want}: set --model.*")


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Which of `n` samples make up batch `step`: (batch_size,) int64 on the CPU.

    The batches cut one endless row of shuffled epochs, so every batch is full and each epoch holds every
    sample once; a batch that crosses a border may hold a sample twice.
    Raises: ValueError unless n and batch_size are positive and seed and step not negative.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"need n >= 1, batch_size >= 1, step >= 0; got n={n}, batch_size={batch_size}, step={step}")
    first, end = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n, (end - 1) // n + 1)
    # cat copies, so that the caller can't write into the cached permutation
    return torch.cat([_permutation(n, seed, e)[max(first - e * n, 0) : end - e * n] for e in epochs])


def prepare(
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(images / 255 - mean) / std: (B, C, H, W) uint8 on any device to `dtype` on `device`.

    mean, std: one number a channel, for images scaled to 0..1.
    Raises: ValueError on an empty batch, another shape or dtype, or a std that is not positive.
    """
    _check_images(images)
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(f"need {images.shape[1]} numbers, one a channel, got mean={mean}, std={std}")
    if not all(s > 0 for s in std):
        raise ValueError(f"std must be positive in every channel, got {std}; drop channels that never vary")
    images = send(images, device)
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 has too few digits to compute in
    scale, shift = _scale_shift(tuple(mean), tuple(std), images.device, exact)
    return torch.addcmul(shift, images.to(exact), scale).to(dtype)


def augment(images: Tensor, *, pad: int, flip: bool, seed: int, step: int) -> Tensor:
    """Each image shifted by up to `pad` pixels (what comes in is black) and, by a coin, mirrored.

    images: (B, C, H, W) uint8; returns the same shape, dtype and device, or its input for pad=0, flip=False.
    The draws are made on the CPU from (seed, step), so they are the same on every device.
    Raises: ValueError on an empty batch, another shape or dtype, a negative pad, seed or step.
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
    # Indexed as (B, 1, 1), (B, H, 1), (B, 1, W) around the slice of channels: comes out as (B, H, W, C).
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, (pad, pad, pad, pad))
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Loader:
    """Training batches of `split` by step number: shuffled, augmented, normalised by `data`'s mean and std.

    The images stay where they are; only a batch goes to `device`. pad, flip: as in `augment`.
    Raises: ValueError on a batch_size below 1, a negative seed or pad, or an empty split.
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
        _check(split, data.classes, (data.channels, *data.train.images.shape[2:]), data.name)
        if batch_size < 1 or pad < 0 or seed < 0:
            raise ValueError(f"need batch_size >= 1, pad >= 0, seed >= 0; got {batch_size}, {pad}, {seed}")
        self.split, self.data, self.batch_size = split, data, batch_size
        self.seed, self.device, self.pad, self.flip = seed, torch.device(device), pad, flip

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch number `step` >= 0 on the device: x (batch_size, C, H, W) float32, labels (batch_size,).

        Raises: ValueError on a negative step.
        """
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
    """(3, count) int64: the coin for mirroring, 0 or 1; the crop's top and left edge, 0..2 pad."""
    generator = torch.Generator().manual_seed(key)
    coin = torch.randint(2, (1, count), generator=generator)
    return torch.cat([coin, torch.randint(2 * pad + 1, (2, count), generator=generator)])


@lru_cache(maxsize=8)
def _scale_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x -> x scale + shift, each (C, 1, 1); cached, as making them anew waits for the GPU."""
    constants = [[1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]
    scale, shift = torch.tensor(constants, device=device, dtype=dtype)[:, :, None, None]
    return scale, shift


def _val_count(n: int, fraction: float) -> int:
    count = round(n * fraction) if 0 < fraction < 1 else 0
    if not 0 < count < n:
        raise ValueError(f"val_fraction={fraction} of {n} images leaves an empty split; take one within 0..1")
    return count


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel / 255, from exact counts, so the same on any number of threads."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(images[:, c].flatten(), minlength=256).double() for c in range(images.shape[1])]
    means = [(values @ count / count.sum()).item() for count in counts]
    squares = [((values - m).square() @ count / count.sum()).item() for m, count in zip(means, counts, strict=True)]
    return tuple(means), tuple(square**0.5 for square in squares)


def _check(split: Split, classes: int, shape: tuple[int, ...], where: str) -> None:
    """Raise ValueError unless `split` has images of `shape` (C, H, W), each with a label in 0..classes-1."""
    images, labels = split.images, split.labels
    if not labels.numel():
        raise ValueError(f"{where} is empty; every split needs at least one image")
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"{where}: labels must be (N,) int64, got {tuple(labels.shape)} {labels.dtype}")
    if images.dtype != torch.uint8 or images.shape != (len(labels), *shape):
        expected = f"({len(labels)} labels, {', '.join(map(str, shape))}) uint8"
        raise ValueError(f"{where}: images must be {expected}, got {tuple(images.shape)} {images.dtype}")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"{where}: labels must be in 0..{classes - 1}, got {low}..{high}; check its source")


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or not images.numel() or images.dtype != torch.uint8:
        raise ValueError(f"need a batch (B, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
