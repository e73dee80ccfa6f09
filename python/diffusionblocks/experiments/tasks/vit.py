"""Vision Transformers as diffusion blocks: the label's embedding is denoised at the [CLS] token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks import DiffusionBlocks
from ...denoiser import StemHead
from ...noise.density import LogNormal
from ...noise.information import closed_form_density
from ...noise.partition import Partition, make_partition, spread_layers
from ...noise.rng import stream
from ...targets.labels import LabelTarget
from ...training.trainer import Trainer
from ..config import EMPTY, Hidden, TrainConfig
from ..data.batches import Loader, prepare
from ..data.images import ImageData, check_model, read_data
from ..metrics import classification
from ..models.vit import Head, Stem, ViT, ViTConfig
from ..published import BatchMeanBlocks, PublishedTarget, VotingTrainer
from ..recipes import CORRECTED, Recipe, resolve
from .base import Batches, Metric, Row, Task

OF_RECIPE = {name: getattr(CORRECTED, name) for name in ("gate_start", "z_gain", "silu_after")}
Baseline = Literal["end-to-end", "checkpointing", "shallow", "forward-forward", "local", "noprop"]


@dataclass(frozen=True)
class ViTRun(TrainConfig):
    """A Vision Transformer that learns to label images."""

    architecture: ClassVar[str] = "vit"

    data: str = "digits"
    """"digits", "fashion-mnist", "cifar100", "tiny-imagenet", "folder" or "idx" for files of one's own, or "hub:ID"."""
    data_folder: Path | None = None
    """Folder of the data's files; without it, installed or cached files of that name, or a download."""
    resize: Literal["crop", "stretch"] | None = None
    """Images of other sizes in a folder of one's own: cut out of their middle, or stretched; None refuses them."""
    out: Path = Path("runs/vit-digits")
    recipe: Literal["corrected", "published"] = "corrected"
    """Details of the method: ours, or those of the published code."""
    switch: Annotated[tuple[str, ...], EMPTY] = ()
    """Fields of the recipe to take from the other one (ablation)."""
    sampler: Hidden[Literal["euler", "heun", "dpmpp_2m"]] = "euler"
    """Solver of the sampling trajectory."""
    augment: bool = False
    """Random crops and flips."""
    baseline: tuple[Baseline, ...] = ("end-to-end",)  # type: ignore[assignment]  # more than others have
    model: ViTConfig = field(default_factory=ViTConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate > 1 and self.method.block_choice == "vote":
            raise ValueError(f"accumulate={self.accumulate} needs --switch block_choice: batches may vote differently")
        if self.train_blocks is not None and self.method.block_choice == "vote":
            raise ValueError("train_blocks needs --switch block_choice: batches choose their block by vote")
        others = {"forward-forward", "local", "noprop"} & set(self.baseline)
        if others and (self.accumulate, self.precision) != (1, "float32"):
            raise ValueError(f"{' and '.join(sorted(others))} know no accumulate and no bfloat16: leave them out")
        if self.model != replace(self.model, **OF_RECIPE):
            raise ValueError(f"{', '.join(OF_RECIPE)} of the model come with the recipe: choose them by --switch")
        if self.shared != "shared" and self.method.codebook == "learned":
            raise ValueError(f"shared={self.shared!r} needs a fixed codebook: add --switch codebook")

    @property
    def method(self) -> Recipe:
        """The recipe with its switches."""
        return resolve(self.recipe, self.switch)

    @property
    def layers(self) -> int:
        return sum(layers_of_blocks(self.model.layers, self.blocks, self.method))

    def resolved(self) -> dict[str, Any]:
        return {"method": dataclasses.asdict(self.method)}


class ViTTask(Task):
    """x: images. y: labels."""

    metric = Metric("accuracy", "accuracy %")
    config: ViTRun

    @cached_property
    def data(self) -> ImageData:
        """The splits. Raises: ValueError if the model is for other images."""
        data = read_data(self.config)
        if data.num_classes < 2:
            raise ValueError(
                f"{data.name} has one class, and a classifier needs more: put the images of each class in a sub-folder"
            )
        check_model(data, self.config.model)
        return data

    def batches(self, device: torch.device) -> Batches:
        config, data = self.config, self.data
        augment: Row = {"pad": max(1, data.image_size // 8), "flip": config.data != "digits"} if config.augment else {}
        return Loader(data.train, data, config.batch_size, seed=config.seed, device=device, **augment)

    def example(self) -> tuple[Tensor, Tensor]:
        config, size = self.config, self.config.model.image_size
        x = torch.empty(config.batch_size, config.model.channels, size, size)
        return x, torch.zeros(config.batch_size, dtype=torch.int64)

    def model(self, partition: Partition | None = None) -> DiffusionBlocks:
        c = self.config
        return vit_blocks(
            c.model,
            c.split or c.blocks,
            recipe=c.method,
            shared=c.shared,
            overlap=c.overlap,
            seed=c.seed,
            partition=partition,
        )

    def trainer(self, model: DiffusionBlocks, config: Any) -> Trainer:
        return (VotingTrainer if self.config.method.block_choice == "vote" else Trainer)(model, config)

    def evaluate(self, model: DiffusionBlocks, split: str, *, steps: int | None = None) -> Row:
        x, labels = self.inputs(split, model.device)
        steps = steps or self.config.sampling_steps
        return classification.evaluate(model, x, labels, steps=steps, **self.trajectory())

    def trajectory(self) -> Row:
        """Return the settings of the sampling trajectory, as `classification.evaluate` takes them."""
        config = self.config
        return {"levels": config.method.levels, "sampler": config.sampler, "seed": config.seed}

    def sample(self, model: DiffusionBlocks, folder: Path, *, count: int, seed: int, **options: Any) -> list[Path]:
        raise ValueError("a classifier makes no samples; for labels of images use `dblocks predict`")

    def network(self) -> nn.Module:
        """Return the ordinary ViT: [CLS], affine LayerNorm, no noise."""
        torch.manual_seed(stream(self.config.seed, "init") % 2**63)
        return ViT(self.config.model, conditioned=False)

    def score(self, network: nn.Module, split: str, device: torch.device) -> Row:
        return {"accuracy": classification.score(network, *self.inputs(split, device))}

    def inputs(self, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a whole split: normalised images and labels."""
        part = getattr(self.data, split)
        x = prepare(part.images, self.data.mean, self.data.std, device=device)
        return x, part.labels.to(device)


def vit_blocks(
    config: ViTConfig,
    blocks: int | tuple[int, ...],
    *,
    recipe: Recipe = CORRECTED,
    shared: str = "shared",
    overlap: float = 0.05,
    seed: int = 0,
    partition: Partition | None = None,
) -> DiffusionBlocks:
    """Return the reference ViT as denoising blocks, initialised from `seed`.

    Args:
        blocks: How many, or the layers of each.
        partition: Each block's noise and layers, if not by the recipe.

    Raises: ValueError if blocks exceeds the layers, or independent blocks get a learned codebook.
    """
    config = replace(config, gate_start=recipe.gate_start, z_gain=recipe.z_gain, silu_after=recipe.silu_after)
    counts = blocks if isinstance(blocks, tuple) else layers_of_blocks(config.layers, blocks, recipe)
    torch.manual_seed(stream(seed, "init") % 2**63)
    norm_eps = 1e-12 if recipe.readout == "edm" else None
    network = ViT(config, conditioned=True, head_norm_eps=norm_eps)
    around: StemHead | list[StemHead] = StemHead(network.stem, network.head)
    if shared == "per_block":
        around = [StemHead(Stem(config, True), Head(config, True, norm_eps)) for _ in counts]
    if shared == "frozen":
        nn.init.xavier_normal_(network.head.linear.weight)  # a head of zeros would pass no gradient to the layers
    ours = recipe == CORRECTED
    target = (
        LabelTarget(config.num_classes, config.dim) if ours else PublishedTarget(config.num_classes, config.dim, recipe)
    )
    if partition is None:
        density = LogNormal() if recipe.noise == "log_normal" else closed_form_density(target.embeddings())
        partition = make_partition(density, counts, overlap=overlap)
    kind = BatchMeanBlocks if recipe.weighting == "batch_mean" else DiffusionBlocks
    layers = list(network.layers)[: sum(counts)]
    return kind(around, layers, target, partition, shared=shared, context=recipe.context)


def layers_of_blocks(layers: int, blocks: int, recipe: Recipe = CORRECTED) -> tuple[int, ...]:
    """Return the layers of each block: spread evenly, or the remainder dropped."""
    return spread_layers(layers - layers % blocks if recipe.remainder == "dropped" else layers, blocks)
