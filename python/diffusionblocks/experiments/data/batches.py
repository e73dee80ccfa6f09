"""Training batches of images by step: their order, normalisation and augmentation.

Stateless: order and augmentation are functions of (seed, step), so resuming needs only the step.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...noise.rng import stream
from ...targets.devices import send
from .images import ImageData, Split, check_images, check_split


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
    check_images(images)
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
    check_images(images)
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
        check_split(split, data.num_classes, (data.channels, *data.train.images.shape[2:]), data.name)
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
