"""Labels for image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .adapters.base import Adapter
from .adapters.vit import ViTAdapter
from .classification import walk
from .data import prepare
from .evaluation import Walker
from .partition import step_levels
from .training import Session


def predict(adapter: Adapter, session: Session, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """For each image file, its name, label and probability, by the session's averaged weights.

    Raises: ValueError if the run is no classifier's, or a file is no image, or not of the model's size.
    """
    if not isinstance(adapter, ViTAdapter):
        raise ValueError(f"a {adapter.config.architecture} run gives no labels; see `dblocks sample`")
    config, data = adapter.config, adapter.data
    pixels = torch.stack([read_image(path, data.channels, data.image_size) for path in images])
    x = prepare(pixels, data.mean, data.std, device=session.device)
    how = adapter.walk()
    levels = step_levels(session.model.partition, config.walk_steps, kind=how.pop("levels"))
    with session.residency.averages():
        steps = walk(Walker(session.model, session.residency), x, levels, **how)
    for path, p in zip(images, steps[-1]["logits"].softmax(-1), strict=True):
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
