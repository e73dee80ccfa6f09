"""Labels for image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .data import ImageData, prepare
from .evaluation import Walker
from .partition import step_levels
from .training import Session


def predict(session: Session, data: ImageData, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """For each image file, its name, label and probability, by the session's averaged weights.

    data: the data set the model was trained on, for its normalisation.

    Raises: ValueError if a file is no image, or not of the size the model was trained on.
    """
    config = session.config
    pixels = torch.stack([read_image(path, data.channels, data.image_size) for path in images])
    x = prepare(pixels, data.mean, data.std, device=session.device)
    walker = Walker(session.model, session.residency, walk_start=config.method.walk_start)
    levels = step_levels(session.model.partition, config.walk_steps, kind=config.method.levels)
    with session.residency.averages(), torch.no_grad():
        logits, _ = walker.walk(x, levels, sampler=config.sampler, seed=config.seed)
    for path, p in zip(images, logits.softmax(-1), strict=True):
        yield {"file": str(path), "label": int(p.argmax()), "probability": float(p.max())}


def read_image(path: Path, channels: int, size: int) -> Tensor:
    """An image file as (C, S, S) uint8. Raises: ValueError if it can't be read or has another size."""
    try:
        image = Image.open(path).convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image file") from error
    if image.size != (size, size):
        raise ValueError(f"{path} is {image.width}x{image.height}, the model needs {size}x{size}; resize it first")
    return torch.from_numpy(numpy.array(image)).reshape(size, size, channels).permute(2, 0, 1).contiguous()
