"""Labels for image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..noise.partition import step_levels
from ..sampling.sampler import Walker
from .data.images import prepare
from .data.sources import read_image
from .metrics.classification import walk
from .tasks.base import Adapter
from .tasks.vit import ViTAdapter


def predict(adapter: Adapter, walker: Walker, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """For each image file, its name, label and probability, by the walker's weights.

    Raises: ValueError if the run is no classifier's, or a file is no image, or not of the model's size.
    """
    if not isinstance(adapter, ViTAdapter):
        raise ValueError(f"a {adapter.config.architecture} run gives no labels; see `dblocks sample`")
    if not images:
        raise ValueError("name the image files to label")
    config, data = adapter.config, adapter.data
    pixels = torch.stack([read_image(path, data.channels, data.image_size) for path in images])
    x = prepare(pixels, data.mean, data.std, device=walker.device)
    how = adapter.walk()
    levels = step_levels(walker.model.partition, config.walk_steps, kind=how.pop("levels"))
    steps = walk(walker, x, levels, **how)
    for path, p in zip(images, steps[-1]["logits"].softmax(-1), strict=True):
        yield {"file": str(path), "label": int(p.argmax()), "probability": float(p.max())}
