"""A task: data, model and evaluation of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...blocks import DiffusionBlocks
from ...noise.partition import Partition
from ...training.trainer import Trainer

Row = dict[str, Any]
Options = TypeVar("Options")


class Batches(Protocol):
    """Training data by address: batch number `step`, on the device."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]: ...


class Addresses:
    """Numbers of batches in order, of which `Trainer.fit` makes the batches that it trains on; the position is its
    state."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.position += 1
            yield self.position - 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@dataclass(frozen=True)
class Metric:
    """A task's measure: its key in the results, its label in tables, and whether more is better."""

    key: str
    label: str
    higher: bool = True

    def better(self, value: float, than: float) -> bool:
        """Return whether `value` beats `than`; NaN never does."""
        return value > than if self.higher else value < than


class Task(ABC):
    """One architecture and its data, bound to a run's config.

    x is the conditioning, y the target that noise hides, both as `batches` makes them.
    """

    metric: ClassVar[Metric]
    data: Any = None  # the splits, where a data set is read; they have facts()

    def __init__(self, config: Any, stored: Row | None = None):
        """stored: The facts of a run, so that its data need not be there."""
        self.config, self.stored = config, stored

    @cached_property
    def facts(self) -> Row:
        """Return what a trained model needs of its data, as JSON values: those stored, else read from the data."""
        if self.stored is not None:
            return self.stored
        return {} if self.data is None else self.data.facts()

    def check_data(self) -> None:
        """Raise ValueError, naming what changed, unless the data are those that the stored facts are of."""
        if not self.stored:
            return
        now = self.data.facts()
        names = [
            name
            for name in ("alphabet", "tokenizer", "class_names", "image_size", "channels")
            if self.stored.get(name) != now.get(name)
        ]
        for name, split in now["splits"].items():
            before = self.stored["splits"][name]
            if split["samples"] != before["samples"]:
                names.append(f"{name} split ({split['samples']} samples, were {before['samples']})")
            elif split != before:
                names.append(f"{name} split")
        if names:
            raise ValueError(
                f"the data are not those it was trained on, changed: {', '.join(names)}; put them back, or train anew"
            )

    @abstractmethod
    def batches(self, device: torch.device) -> Batches:
        """Return training data: batch number `step`, (x, y), on the device."""

    @abstractmethod
    def example(self) -> tuple[Tensor, Tensor]:
        """Return a batch's shapes and dtypes without its data, to plan memory from."""

    @abstractmethod
    def model(self, partition: Partition | None = None) -> DiffusionBlocks:
        """Return the network cut into config.blocks denoisers, initialised from the config's seed.

        partition: Each block's noise and layers, if not as the config says.
        """

    @abstractmethod
    def evaluate(self, model: DiffusionBlocks, split: str, *, steps: int | None = None) -> Row:
        """Evaluate a model on "val" or "test"; the row has `metric`. steps: of the trajectory, if not the config's."""

    @abstractmethod
    def sample(self, model: DiffusionBlocks, folder: Path, *, count: int, seed: int, **options: Any) -> list[Path]:
        """Write `count` samples and their trajectory; return the files."""

    def trainer(self, model: DiffusionBlocks, config: Any) -> Trainer:
        """Return a trainer of `model`."""
        return Trainer(model, config)

    def network(self) -> nn.Module | None:
        """Return the ordinary network of the end-to-end baseline, with `layers` and loss(x, y, seed=, step=).

        None where that is the same network in one block."""
        return None

    def score(self, network: nn.Module, split: str, device: torch.device) -> Row:
        """Evaluate the ordinary network as `evaluate` does a model in blocks."""
        raise NotImplementedError


def parse_options(kind: type[Options], options: Row, what: str) -> Options:
    """Parse sampling options into a dataclass; raise ValueError on options this task doesn't support."""
    known: Any = kind
    unknown = options.keys() - {field.name for field in fields(known)}
    if unknown:
        raise ValueError(f"{what} take no {', '.join(sorted(unknown))}; leave it out")
    return kind(**options)
