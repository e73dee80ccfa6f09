"""What a run is: dataclasses that become the command line and the run folder's config.yaml."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .models import ViTConfig
from .recipes import Recipe, resolve

Baseline = Literal["end-to-end", "checkpointing", "forward-forward"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Steps, learning rate and warm-up are counted in end-to-end steps: block-wise training takes
    B times as many, each through 1/B of the layers."""

    data: Literal["digits", "fashion-mnist", "cifar100", "tiny-imagenet"] = "digits"
    folder: Path | None = None
    """Where the data's files are; None: found or fetched by name."""
    out: Path = Path("runs/vit-digits")
    """Run folder; must not hold another run."""
    recipe: Literal["corrected", "published"] = "corrected"
    switch: tuple[str, ...] = ()
    """Fields of the recipe to take from the other one (ablation)."""
    blocks: int = 3
    shared: Literal["shared", "per_block", "frozen"] = "shared"
    overlap: float = 0.05
    steps: int = 1000
    visit: int = 25
    """Steps a block stays active before the next one's turn."""
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 2e-3
    warmup: float = 0.2
    """Share of the steps."""
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.99
    """Decay of the weights' moving average; 0 keeps none."""
    walk_steps: int = 8
    sampler: Literal["euler", "heun", "dpmpp_2m"] = "euler"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    store: Literal["auto", "host", "disk"] = "auto"
    """Where waiting blocks are; auto: the host's memory, or disk where the host itself trains."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    baseline: tuple[Baseline, ...] = ("end-to-end",)
    tune_lr: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """End-to-end learning rates to choose from on the validation split."""
    tune_warmup: tuple[float, ...] = (0.05, 0.2)
    augment: bool = False
    """Random crops and flips."""
    device: str = "auto"
    seed: int = 0
    model: ViTConfig = field(default_factory=ViTConfig)

    def __post_init__(self) -> None:
        _check_positive(self, "blocks", "steps", "visit", "batch_size", "accumulate", "walk_steps", "checkpoint_every")
        if self.blocks > self.model.layers:
            raise ValueError(
                f"blocks={self.blocks} exceeds the model's {self.model.layers} layers; use at most one each"
            )
        if self.walk_steps < self.blocks:
            raise ValueError(
                f"walk_steps={self.walk_steps} must be at least blocks={self.blocks}: every block must run"
            )
        if not 0 <= self.warmup < 1 or not self.lr > 0:
            raise ValueError(f"need lr > 0 and 0 <= warmup < 1, got lr={self.lr}, warmup={self.warmup}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.accumulate > 1 and self.method.block_choice == "vote":
            raise ValueError(f"accumulate={self.accumulate} needs --switch block_choice: batches may vote differently")
        if self.shared != "shared" and self.method.codebook == "learned":
            raise ValueError(f"shared={self.shared!r} needs a fixed codebook: add --switch codebook")

    @property
    def method(self) -> Recipe:
        """The recipe with its switches."""
        return resolve(self.recipe, self.switch)

    @property
    def total_steps(self) -> int:
        """Steps of block-wise training: as many layer evaluations as `steps` end-to-end steps."""
        return self.steps * self.blocks


def to_yaml(config: TrainConfig) -> str:
    """The config with its resolved recipe, for people and for `from_yaml`."""
    values = dataclasses.asdict(config)
    plain = {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return yaml.safe_dump({**plain, "method": dataclasses.asdict(config.method)}, sort_keys=False)


def from_yaml(text: str) -> TrainConfig:
    """The config that `to_yaml` wrote. Raises: ValueError on anything else."""
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not a run's config.yaml: {error}") from error
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if not isinstance(values, dict) or set(values) - known - {"method"}:
        raise ValueError("not a run's config.yaml: it holds other keys than a training run's")
    values.pop("method", None)
    for name in ("switch", "baseline", "tune_lr", "tune_warmup"):
        values[name] = tuple(values[name])
    values["folder"] = Path(values["folder"]) if values["folder"] else None
    return TrainConfig(**{**values, "out": Path(values["out"]), "model": ViTConfig(**values["model"])})


def _check_positive(config: TrainConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def augmentation(config: TrainConfig) -> dict[str, Any]:
    """Loader's `pad` and `flip` for a config: an eighth of the image's width; digits are never mirrored."""
    if not config.augment:
        return {"pad": 0, "flip": False}
    return {"pad": max(1, config.model.image_size // 8), "flip": config.data != "digits"}
