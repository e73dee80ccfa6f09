"""What a run is: a dataclass that becomes the command line and the run folder's config.yaml."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from ..noise.partition import spread_layers

CONFIGS: dict[str, type[TrainConfig]] = {}
RESOLVED = ("method",)  # keys of `resolved`


@dataclass(frozen=True)
class TrainConfig:
    """What the runs of all architectures have in common; each adds its data and its model.

    Steps, learning rate and warm-up are counted in end-to-end steps: block-wise training takes B times as many, each
    through 1/B of the layers."""

    architecture: ClassVar[str]
    """Its adapter's name."""

    out: Path = Path("runs/run")
    """Run folder; must not hold another run."""
    blocks: int = 3
    split: tuple[int, ...] = ()
    """Layers of each block, from the input on; none given: spread evenly."""
    shared: Literal["shared", "per_block", "frozen"] = "shared"
    overlap: float = 0.05
    branch: float = 0.0
    """Share of the steps in which block 0 trains for all noise; then every block begins as its copy."""
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
    """Steps from the highest noise to none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    store: Literal["auto", "host", "disk"] = "auto"
    """Where waiting blocks are; auto: the host's memory, or disk where the host itself trains."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    baseline: tuple[Literal["end-to-end", "checkpointing", "shallow"], ...] = ("end-to-end",)
    tune_lr: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """End-to-end learning rates to choose from on the validation split."""
    tune_warmup: tuple[float, ...] = (0.05, 0.2)
    device: str = "auto"
    seed: int = 0
    model: Any = None

    def __init_subclass__(cls) -> None:
        CONFIGS[cls.architecture] = cls

    def __post_init__(self) -> None:
        check_finite(self)
        check_at_least(self, 1, "blocks", "steps", "visit", "batch_size", "accumulate")
        check_at_least(self, 1, "walk_steps", "checkpoint_every")
        if self.blocks > self.model.layers:
            raise ValueError(
                f"blocks={self.blocks} exceeds the model's {self.model.layers} layers; use at most one each"
            )
        if self.split and (len(self.split), sum(self.split)) != (self.blocks, self.layers):
            raise ValueError(f"split={self.split} must share {self.layers} layers among {self.blocks} blocks")
        if min(self.split, default=1) < 1:
            raise ValueError(f"split={self.split} must give every block a layer")
        if self.walk_steps < self.blocks:
            raise ValueError(
                f"walk_steps={self.walk_steps} must be at least blocks={self.blocks}: every block must run"
            )
        if not 0 <= self.warmup < 1 or not self.lr > 0:
            raise ValueError(f"need lr > 0 and 0 <= warmup < 1, got lr={self.lr}, warmup={self.warmup}")
        if not 0 <= self.branch < 1:
            raise ValueError(f"branch must be a share of the steps in [0, 1), got {self.branch}")
        if not self.tune_lr or not self.tune_warmup:
            raise ValueError("tune_lr and tune_warmup need a value each: what the baselines choose from")
        if min(self.tune_lr) <= 0 or not all(0 <= warmup < 1 for warmup in self.tune_warmup):
            raise ValueError(f"need tune_lr > 0 and 0 <= tune_warmup < 1, got {self.tune_lr} and {self.tune_warmup}")
        for name in ("overlap", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.clip < 0:
            raise ValueError(f"clip must not be negative, got {self.clip}; 0 clips nothing")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")

    @property
    def layers(self) -> int:
        """Layers that are trained, all blocks together."""
        return int(self.model.layers)

    @property
    def block_counts(self) -> range:
        """The numbers of blocks that the network can be cut into."""
        return range(1, self.model.layers + 1)

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Layers of each block."""
        return self.split or spread_layers(self.layers, self.blocks)

    def in_blocks(self, blocks: int, **changes: Any) -> TrainConfig:
        """The same in so many blocks, with steps of the walk enough to visit all."""
        split = self.split if blocks == self.blocks else ()
        steps = max(blocks, self.walk_steps)
        return dataclasses.replace(self, **{"blocks": blocks, "split": split, "walk_steps": steps, **changes})

    def in_one_block(self, layers: int | None = None) -> TrainConfig:
        """The same network in one block, all of it trained; with so many layers, if not with all."""
        model = self.model if layers is None else dataclasses.replace(self.model, layers=layers)
        return dataclasses.replace(self, blocks=1, split=(), shared="shared", model=model)

    def resolved(self) -> dict[str, Any]:
        """What the config stands for besides its fields; written to config.yaml, and part of a run's identity."""
        return {}

    @property
    def votes(self) -> bool:
        """Whether noise is drawn first and a batch goes to the block that most of it belongs to (published ViT)."""
        return False

    @property
    def total_steps(self) -> int:
        """Steps of block-wise training: as many layer evaluations as `steps` end-to-end steps."""
        return self.steps * self.blocks

    @property
    def trunk_steps(self) -> int:
        """Steps of block 0 for all blocks, before they branch."""
        return min(round(self.branch * self.total_steps), self.total_steps - 1)


def to_yaml(config: TrainConfig) -> str:
    """The config, for people and for `from_yaml`."""
    return yaml.safe_dump(to_dict(config) | config.resolved(), sort_keys=False)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config in plain values."""
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {"architecture": config.architecture, **values}


def from_yaml(text: str) -> TrainConfig:
    """The config that `to_yaml` wrote. Raises: ValueError on anything else."""
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not a run's config.yaml: {error}") from error
    kind = CONFIGS.get(values.pop("architecture", None)) if isinstance(values, dict) else None
    if kind is None:
        raise ValueError(f"not a run's config.yaml: its architecture must be one of {', '.join(CONFIGS)}")
    types, names = typing.get_type_hints(kind), [f.name for f in dataclasses.fields(kind)]
    if not set(names) <= set(values) <= {*names, *RESOLVED}:
        raise ValueError("not a run's config.yaml: its keys are not those of a training run")
    return kind(**{name: _typed(types[name], values[name]) for name in names})


def _typed(type_: Any, value: Any) -> Any:
    """A value read from YAML as its field's type."""
    if dataclasses.is_dataclass(type_):
        return typing.cast(Any, type_)(**value)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in (type_, *typing.get_args(type_)) else value


def check_finite(config: Any) -> None:
    """Raise ValueError unless every float of a config is finite."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} must be finite, got {number}")


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raise ValueError unless these fields are as much."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
