"""A run's config: a dataclass that becomes the command line and the run folder's config.yaml."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from tyro.conf import Suppress, arg

from ..noise.partition import spread_layers
from ..training.config import TrainerConfig, check_at_least

T = TypeVar("T")
if typing.TYPE_CHECKING:
    Hidden = Annotated[T, ""]
else:

    class Hidden:
        """Type of an option that is taken, but isn't shown in the help, which stays short."""

        shown = True  # False while the help is printed: what tyro suppresses it doesn't take either

        def __class_getitem__(cls, type_: Any) -> Any:
            return type_ if cls.shown else Suppress[type_]


EMPTY = arg(help_behavior_hint="(default: none)")  # of a setting that is an empty tuple
CONFIGS: dict[str, type[TrainConfig]] = {}
RESOLVED = ("method",)  # keys of `resolved`


@dataclass(frozen=True)
class TrainConfig(TrainerConfig):
    """Settings that the runs of all tasks have in common; each adds its data and its model.

    Steps, learning rate and warm-up are counted in end-to-end steps: block-wise training takes B times as many, each
    through 1/B of the layers."""

    architecture: ClassVar[str]
    """Its task: a key of TASKS."""

    out: Path = Path("runs/run")
    """Run folder; must not hold another run."""
    blocks: int = 3
    """Blocks that the layers are cut into."""
    split: Annotated[tuple[int, ...], EMPTY] = ()
    """Layers of each block, from the input on; none given: spread evenly."""
    shared: Literal["shared", "per_block", "frozen"] = "shared"
    """Stem and head: one that every block trains, one per block, or one that nobody trains."""
    overlap: Hidden[float] = 0.05
    """Share of its width in ln sigma by which each block's range of noise is widened in training."""
    steps: int | None = 1000
    """End-to-end steps; block-wise training takes B times as many, for the same number of layer evaluations."""
    batch_size: int = 32
    """Samples of a batch."""
    lr: float = 2e-3
    warmup: float = 0.2
    """Share of the steps over which the learning rate rises."""
    sampling_steps: int = 8
    """Steps of the sampling trajectory, from the highest noise to none."""
    offload: Literal["cpu", "disk", "auto"] | None = "auto"
    """Where waiting blocks are: in host memory, on disk, or (None) on the device; auto: disk if that is the CPU."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    checkpoint_minutes: Hidden[float] = 10.0
    """Minutes after which a checkpoint is written, too."""
    baseline: tuple[Literal["end-to-end", "checkpointing", "shallow"], ...] = ("end-to-end",)
    """Networks to train beside, for comparison; the option alone, without a name, trains none. shallow: one block's
    layers, with end-to-end's steps, so with one block's share of the compute."""
    tune_lr: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """End-to-end learning rates to choose from on the validation split; the best with each of --tune-warmup."""
    tune_warmup: Hidden[tuple[float, ...]] = (0.05, 0.2)
    """End-to-end warm-ups to choose from, at the best rate."""
    weight_decay: Hidden[float] = 0.01
    compile: Hidden[bool] = False
    mesh: Suppress[tuple[int, int] | None] = None
    train_blocks: Hidden[tuple[int, ...] | None] = None
    adapt: Hidden[bool] = True
    capture: Hidden[bool | None] = None
    pin: Hidden[bool] = True
    checkpoint_layers: Hidden[bool] = False
    folder: Suppress[Path | None] = None
    log_folder: Suppress[Path | None] = None
    log_every: Hidden[int] = 25
    slots: Hidden[Literal[1, 2]] = 1
    moments: Hidden[Literal["float32", "bfloat16"]] = "float32"
    loggers: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Where the rows of block-wise training's log go: always into the run folder's metrics.jsonl; tensorboard: also
    into files in its folder logs; wandb: also to Weights & Biases."""
    model: Any = None
    """Sizes of the network."""

    def __init_subclass__(cls) -> None:
        CONFIGS[cls.architecture] = cls

    def __post_init__(self) -> None:
        if self.steps is None:
            raise ValueError("steps must be a whole number, got None: only a Trainer can go on for any number of steps")
        super().__post_init__()
        check_at_least(self, 1, "blocks", "steps", "batch_size", "sampling_steps", "checkpoint_every")
        check_at_least(self, 0, "overlap")
        if self.mesh is not None:
            raise ValueError("mesh: the command trains in one process: use --train-blocks, or a Trainer of your own")
        if not self.checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes must be positive, got {self.checkpoint_minutes}")
        if self.blocks > self.model.layers:
            raise ValueError(
                f"blocks={self.blocks} exceeds the model's {self.model.layers} layers; use at most one each"
            )
        if self.split and (len(self.split), sum(self.split)) != (self.blocks, self.layers):
            raise ValueError(f"split={self.split} must share {self.layers} layers among {self.blocks} blocks")
        if min(self.split, default=1) < 1:
            raise ValueError(f"split={self.split} must give every block a layer")
        if self.sampling_steps < self.blocks:
            raise ValueError(
                f"sampling_steps={self.sampling_steps} must be at least blocks={self.blocks}: every block must run"
            )
        if not self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be a share of the steps in [0, 1)")
        if not self.tune_lr or not self.tune_warmup:
            raise ValueError("tune_lr and tune_warmup need a value each: what the baselines choose from")
        if min(self.tune_lr) <= 0 or not all(0 <= warmup < 1 for warmup in self.tune_warmup):
            raise ValueError(f"need tune_lr > 0 and 0 <= tune_warmup < 1, got {self.tune_lr} and {self.tune_warmup}")

    @property
    def log_to(self) -> Path:
        return self.out / "logs"

    @property
    def layers(self) -> int:
        """Layers that are trained, all blocks together."""
        return int(self.model.layers)

    @property
    def block_counts(self) -> range:
        """Numbers of blocks that the network can be cut into."""
        return range(1, self.model.layers + 1)

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Layers of each block."""
        return self.split or spread_layers(self.layers, self.blocks)

    def in_blocks(self, blocks: int, **changes: Any) -> TrainConfig:
        """Return the same run in so many blocks, with enough sampling steps to visit all."""
        split = self.split if blocks == self.blocks else ()
        steps = max(blocks, self.sampling_steps)
        return dataclasses.replace(self, **{"blocks": blocks, "split": split, "sampling_steps": steps, **changes})

    def in_one_block(self, layers: int | None = None) -> TrainConfig:
        """Return the same network in one block, all of it trained; with so many layers, if not with all."""
        model = self.model if layers is None else dataclasses.replace(self.model, layers=layers)
        return dataclasses.replace(self, blocks=1, split=(), shared="shared", model=model)

    def resolved(self) -> dict[str, Any]:
        """Return derived settings, saved to config.yaml and part of a run's identity."""
        return {}

    @property
    def end_to_end_steps(self) -> int:
        """Steps of the end-to-end network."""
        assert self.steps is not None
        return self.steps

    @property
    def total_steps(self) -> int:
        """Steps of block-wise training: as many layer evaluations as `steps` end-to-end steps."""
        return self.end_to_end_steps * self.blocks

    @property
    def warmup_steps(self) -> int:
        return max(1, round(self.warmup * self.total_steps))


def to_yaml(config: TrainConfig) -> str:
    """Return the config, for people and for `from_yaml`."""
    return yaml.safe_dump(to_dict(config) | config.resolved(), sort_keys=False)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the config in plain values."""
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {"architecture": config.architecture, **values}


def from_yaml(text: str, base: TrainConfig | None = None) -> TrainConfig:
    """Return the config that `to_yaml` wrote, or one written by hand: fields left out, its architecture among them, are
    those of `base`, or without one their defaults.

    Raises: ValueError on anything else.
    """
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not a run's config.yaml: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError("not a run's config.yaml: it must hold names and values, one a line")
    return from_dict(values, base)


def from_dict(values: dict[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """Return the config of `to_dict`'s values, or of some of them (see `from_yaml`). Raises: ValueError on anything
    else."""
    values = dict(values)
    kind = CONFIGS.get(values.pop("architecture", base.architecture if base else ""))
    if kind is None:
        raise ValueError(f"not a run's config.yaml: its architecture must be one of {', '.join(CONFIGS)}")
    if base and type(base) is not kind:
        raise ValueError(f"this is of a {kind.architecture} run: name a preset of that kind")
    for name in RESOLVED:
        values.pop(name, None)
    return typing.cast(TrainConfig, _typed(f"a {kind.architecture} run", kind, values, base))


def _typed(name: str, type_: Any, value: Any, base: Any = None) -> Any:
    """Return a value read from YAML as its field's type. base: What a dataclass takes fields left out from."""
    kinds = (type_, *typing.get_args(type_))
    if dataclasses.is_dataclass(type_):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must hold names and values, got {value!r}")
        types, names = typing.get_type_hints(type_), [f.name for f in dataclasses.fields(type_)]
        if unknown := sorted(set(map(str, value)) - set(names)):
            near = difflib.get_close_matches(unknown[0], names, 1)
            perhaps = f"; perhaps {near[0]}" if near else f"; known: {', '.join(names)}"
            raise ValueError(f"{name} has no {', '.join(unknown)}{perhaps}")
        given = {n: _typed(n, types[n], v, getattr(base, n, None)) for n, v in value.items()}
        return typing.cast(Any, type_)(**given) if base is None else dataclasses.replace(base, **given)
    if isinstance(value, list):
        return tuple(_typed(name, kinds[1] if len(kinds) > 1 else None, item) for item in value)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, str) and float in kinds:  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value!r}") from None
    return float(value) if float in kinds and type(value) is int else value
