"""Diffusion Transformers as diffusion blocks: the image is denoised, given its class."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import dbkernels

from ...blocks import DiffusionBlocks
from ...denoiser import StemHead
from ...noise.density import LogNormal
from ...noise.partition import Partition, make_partition, step_levels
from ...noise.rng import stream
from ...sampling.sampler import Sampler
from ...sampling.samplers import SAMPLERS, Callback, guided
from ...targets.continuous import ContinuousTarget
from ..config import Hidden, TrainConfig
from ..data.batches import Loader, prepare
from ..data.images import ImageData, Split, check_model, read_data
from ..data.sources import stratified
from ..metrics import pretrained
from ..metrics.bound import held_out_loss
from ..metrics.frechet import judge
from ..models.dit import DiTConfig, DiTHead, DiTStem
from ..models.layers import Layer
from ..plotting.pictures import to_pixels, write_grid, write_trajectory
from .base import Batches, Metric, Row, Task, parse_options


@dataclass(frozen=True)
class DiTRun(TrainConfig):
    """A Diffusion Transformer that learns to make images of a class."""

    architecture: ClassVar[str] = "dit"

    data: str = "digits"
    """"digits", "fashion-mnist", "cifar100", "tiny-imagenet", "folder" or "idx" for files of one's own, or "hub:ID"."""
    data_folder: Path | None = None
    """Folder of the data's files; without it, installed or cached files of that name, or a download."""
    resize: Literal["crop", "stretch"] | None = None
    """Images of other sizes in a folder of one's own: cut out of their middle, or stretched; None refuses them."""
    out: Path = Path("runs/dit-digits")
    lr: float = 8e-3
    tune_lr: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2)
    tune_warmup: Hidden[tuple[float, ...]] = (0.2,)
    label_dropout: float = 0.1
    """Share of the images trained on without their class."""
    guidance: float = 1.25
    """Classifier-free guidance scale. 1 disables guidance and halves the cost; the paper uses 2."""
    cut: Literal["probability", "uniform", "log_uniform"] = "probability"
    """Cut of the noise into ranges: of equal probability, of equal width in sigma, or in ln sigma."""
    sampler: Literal["euler", "heun", "dpmpp_2m"] = "euler"
    """Solver of the sampling trajectory."""
    sampling_steps: int = 50
    draws: float = 4
    """Generated images per evaluation image (a fraction uses part of the split). More reduces the variance of the
    Fréchet distance."""
    model: DiTConfig = field(default_factory=DiTConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be a share in [0, 1), got {self.label_dropout}")
        if self.guidance != 1 and not self.label_dropout:
            raise ValueError(f"guidance={self.guidance} needs label_dropout > 0: no class must have been trained")
        if not 0 < self.draws < math.inf:
            raise ValueError(f"draws must be a positive number, got {self.draws}")


@dataclass(frozen=True)
class ImageOptions:
    """What can be asked for of images that are made: steps, guidance and sampler if not the config's, one class alone,
    and a judge."""

    steps: int | None = None
    guidance: float | None = None
    sampler: Literal["euler", "heun", "dpmpp_2m"] | None = None
    label: int | None = None
    judge: Literal["inception"] | None = None
    """Also judge.json, their distances from the test split."""

    def __post_init__(self) -> None:
        if self.judge not in (None, "inception"):
            raise ValueError(f"judge={self.judge!r} must be 'inception' for images")

    def labels(self, count: int, classes: int) -> tuple[Tensor, int]:
        """The class of each of `count` images, (count,), and how many stand in a row: whole classes, as many as make
        the grid nearly square, or ten of the one."""
        if self.label is None:
            each = -(-count // classes)
            return torch.arange(count) * classes // count, each * max(1, round(math.sqrt(count) / each))
        if not 0 <= self.label < classes:
            raise ValueError(f"label={self.label} must be one of the {classes} classes, 0 to {classes - 1}")
        return torch.full((count,), self.label), min(count, 10)


class DroppedLabels:
    """A loader's batches as (label, image), where a share of the labels is `none`; a function of the step."""

    def __init__(self, loader: Loader, share: float, none: int):
        self.loader, self.share, self.none = loader, share, none

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        images, labels = self.loader.batch(step)
        key = stream(self.loader.seed, "label dropout")
        u = dbkernels.philox_uniform(labels.shape, seed=key, offset=step, device=labels.device)
        return torch.where(u < self.share, self.none, labels), images


class DiTTask(Task):
    """x: labels. y: images in [-1, 1]."""

    metric = Metric("frechet", "Fréchet distance", higher=False)
    config: DiTRun

    @cached_property
    def data(self) -> ImageData:
        """The splits. Raises: ValueError if the model is for other images."""
        c, model = self.config, self.config.model
        data = read_data(c)
        check_model(data, model)
        half = (0.5,) * data.channels
        return replace(data, mean=half, std=half)  # black is -1, white 1

    def batches(self, device: torch.device) -> Batches:
        c, data = self.config, self.data
        if min(round(c.draws * len(split)) for split in (data.val, data.test)) < 2:
            raise ValueError(f"draws={c.draws} of {len(data.val)} validation images are fewer than two: take more")
        loader = Loader(data.train, data, c.batch_size, seed=c.seed, device=device)
        return DroppedLabels(loader, c.label_dropout, c.model.num_classes)

    def example(self) -> tuple[Tensor, Tensor]:
        c, size = self.config, self.config.model.image_size
        return torch.zeros(c.batch_size, dtype=torch.int64), torch.empty(c.batch_size, c.model.channels, size, size)

    def model(self, partition: Partition | None = None) -> DiffusionBlocks:
        c, model = self.config, self.config.model
        torch.manual_seed(stream(c.seed, "init") % 2**63)
        own = c.shared == "per_block"
        around = [StemHead(DiTStem(model), DiTHead(model)) for _ in range(c.blocks if own else 1)]
        if c.shared == "frozen":
            nn.init.xavier_normal_(around[0].head.linear.weight)  # a head of zeros would pass no gradient to the layers
        layers = [Layer(model, conditioned=True) for _ in range(model.layers)]
        partition = partition or make_partition(LogNormal(), c.layer_counts, by=c.cut, overlap=c.overlap)
        return DiffusionBlocks(
            around if own else around[0],
            layers,
            ContinuousTarget(shape=(model.channels, model.image_size, model.image_size)),
            partition,
            shared=c.shared,
        )

    def evaluate(self, model: DiffusionBlocks, split: str, *, steps: int | None = None) -> Row:
        """`draws` images for each of the split's, of its label, against the split; floor: real ones against it.

        The floor is as many training images, or all; layer_evaluations: layers run to make one image.
        """
        c, device, real = self.config, model.device, getattr(self.data, split)
        features = judge(c.data, c.data_folder, device, c.model.image_size if c.resize else None, c.resize)
        labels, levels = repeated(real.labels, c.draws), step_levels(model.partition, steps or c.sampling_steps)
        began = time.perf_counter()
        made = to_pixels(self.trajectory(model, labels.to(device), levels, seed=c.seed))
        seconds = time.perf_counter() - began
        train, y = self.data.train, prepare(real.images, self.data.mean, self.data.std, device=device)
        others = train.take(stratified(train.labels, min(len(train), len(labels)), stream(0, "floor"))[0])
        return {
            **features.compare(real, Split(made, labels)),
            "floor": features.compare(real, others)["frechet"],
            "sampling_seconds": seconds,
            "layer_evaluations": self.layer_evaluations(model.partition, levels),
            "images": len(labels),
            **held_out_loss(model, real.labels.to(device), y, seed=c.seed),
        }

    def sample(self, model: DiffusionBlocks, folder: Path, *, count: int, seed: int, **options: Any) -> list[Path]:
        """samples.png: `count` images, by class; trajectory.png: what each block made of some.

        options: ImageOptions'.
        """
        how = parse_options(ImageOptions, options, "images")
        c, partition = self.config, model.partition
        labels, columns = how.labels(count, c.model.num_classes)
        some = torch.linspace(0, count - 1, min(count, 5)).long()
        estimates: list[tuple[float, int, Tensor]] = []

        def watch(step: int, sigma: float, D: Tensor) -> None:
            estimates.append((sigma, int(partition.block_of(sigma)), to_pixels(D.cpu()[some])))

        guidance = c.guidance if how.guidance is None else how.guidance
        asked = type(self)(replace(c, guidance=guidance, sampler=how.sampler or c.sampler))
        levels = step_levels(partition, how.steps or c.sampling_steps)
        made = asked.trajectory(model, labels.to(model.device), levels, seed=seed, callback=watch)
        shown = [estimates[i] for i in spread_steps([block for _, block, _ in estimates])]
        files = [
            write_grid(to_pixels(made), folder / "samples.png", columns, labels.tolist()),
            write_trajectory(shown, folder / "trajectory.png", partition.blocks, labels[some].tolist()),
        ]
        if how.judge:
            found = pretrained.inception(to_pixels(made), self.data.test.images, device=model.device)
            files.append(folder / "judge.json")
            files[-1].write_text(json.dumps(found, indent=1) + "\n")
        return files

    def trajectory(
        self,
        model: DiffusionBlocks,
        labels: Tensor,
        levels: list[float],
        *,
        seed: int,
        callback: Callback | None = None,
    ) -> Tensor:
        """Images of `labels` (N,) from noise, (N, C, S, S), one block after another."""
        c, sizes = self.config, self.config.model
        zeros = torch.zeros(len(labels), sizes.channels, sizes.image_size, sizes.image_size, device=labels.device)
        z = dbkernels.inject_noise(zeros, levels[0], seed=stream(seed, "walk"), offset=0)
        none = torch.full_like(labels, sizes.num_classes)
        conditional, unconditional = (Sampler(model, x, prefetch=True) for x in (labels, none))
        denoise = guided(
            lambda z, sigma: conditional(z, sigma).denoised,
            lambda z, sigma: unconditional(z, sigma).denoised,
            c.guidance,
        )
        return SAMPLERS[c.sampler](denoise, z, levels, callback)

    def layer_evaluations(self, partition: Partition, levels: list[float]) -> float:
        """Return the layers run to make one image, by a trajectory that only counts."""
        run = []

        def denoise(z: Tensor, sigma: float) -> Tensor:
            run.append(partition.layers[int(partition.block_of(sigma))])
            return z

        SAMPLERS[self.config.sampler](guided(denoise, denoise, self.config.guidance), torch.zeros(1), levels)
        return float(sum(run))


def repeated(labels: Tensor, times: float) -> Tensor:
    """Labels (N,) so many times over; of what is less than once as many of each class as come to its share."""
    whole, count = int(times), round(times % 1 * len(labels))
    return torch.cat([labels.repeat(whole), labels[stratified(labels, count, stream(0, "labels"))[0]]])


def spread_steps(owners: list[int]) -> list[int]:
    """Steps to show, the same number of each block if it has them, its last one among them; at most about 12."""
    each = max(1, 12 // len(set(owners)))
    shown: set[int] = set()
    for block in set(owners):
        own = [i for i, owner in enumerate(owners) if owner == block]
        shown |= {own[round(k * (len(own) - 1) / each)] for k in range(1, each + 1)}
    return sorted(shown)
