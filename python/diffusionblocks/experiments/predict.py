"""Labels for image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks import DiffusionBlocks
from ..noise.partition import step_levels
from .data.batches import prepare
from .data.folder import read_image
from .metrics.classification import trajectory
from .tasks.base import Task
from .tasks.vit import ViTTask


def predict(task: Task, model: DiffusionBlocks, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield file, label, its name where classes have names, and probability of each image file.

    Raises: ValueError if the run is no classifier's; and, after the others' labels, if files are no images, or not of
        the model's size.
    """
    if not isinstance(task, ViTTask):
        raise ValueError(f"a {task.config.architecture} run gives no labels; see `dblocks sample`")
    if not images:
        raise ValueError("name the image files to label")
    if folders := [str(path) for path in images if path.is_dir()]:
        raise ValueError(f"{folders[0]} is a folder: name the image files in it, e.g. {folders[0]}/*.png")
    config, facts = task.config, task.facts
    pixels, faults = {}, []
    for path in images:
        try:
            pixels[path] = read_image(path, facts["channels"], facts["image_size"], config.resize)
        except (OSError, ValueError) as error:
            faults.append(str(error))
    if pixels:
        yield from _labels(task, model, pixels)
    if faults:
        raise ValueError("; ".join(faults))


def _labels(task: ViTTask, model: DiffusionBlocks, pixels: dict[Path, Tensor]) -> Iterator[dict[str, Any]]:
    config, facts = task.config, task.facts
    x = prepare(torch.stack([*pixels.values()]), tuple(facts["mean"]), tuple(facts["std"]), device=model.device)
    how = task.trajectory()
    levels = step_levels(model.partition, config.sampling_steps, kind=how.pop("levels"))
    steps = trajectory(model, x, levels, **how)
    for path, p in zip(pixels, steps[-1]["logits"].softmax(-1), strict=True):
        label = int(p.argmax())
        name = {"name": facts["class_names"][label]} if facts["class_names"] else {}
        yield {"file": str(path), "label": label, **name, "probability": float(p.max())}
