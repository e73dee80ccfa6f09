"""What an architecture adds to the library: five methods, and an end-to-end control where it has one of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ...blocks import DiffusionBlocks
from ...noise.partition import Partition
from ...sampling.sampler import Walker
from ..session import Batches

Row = dict[str, Any]
Options = TypeVar("Options")


@dataclass(frozen=True)
class Metric:
    """What an architecture is judged by: its key in the results, how tables call it, and whether more is better."""

    key: str
    label: str
    higher: bool = True

    def better(self, value: float, than: float) -> bool:
        """Whether `value` beats `than`; a value that isn't a number never does."""
        return value > than if self.higher else value < than


class Adapter(ABC):
    """One architecture, bound to a run's config: what is x, y, the walk, the loss.

    x is what the network is given, y the target that noise hides, both as `batches` makes them.
    """

    metric: ClassVar[Metric]
    data: Any = None  # the splits, where a data set is read; they have a fingerprint()

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def batches(self, device: torch.device) -> Batches:
        """Training data: batch number `step`, (x, y), on the device."""

    @abstractmethod
    def example(self) -> tuple[Tensor, Tensor]:
        """A batch's shapes and dtypes without its data: what a plan of the memory is made from."""

    @abstractmethod
    def blocks(self, partition: Partition | None = None) -> DiffusionBlocks:
        """The network cut into config.blocks denoisers, initialised from the config's seed.

        partition: who owns which noise and which layers, if not as the config says.
        """

    @abstractmethod
    def evaluate(self, walker: Walker, split: str, *, steps: int | None = None) -> Row:
        """What a model is worth on "val" or "test", `metric` among it. steps: of the walk, if not the config's."""

    @abstractmethod
    def sample(self, walker: Walker, folder: Path, *, count: int, seed: int, **options: Any) -> list[Path]:
        """Write `count` samples and what shows how they came about; returns the files."""

    def network(self) -> nn.Module:
        """The same network to be trained end to end: one block of all layers, unless there is an ordinary one.

        It has `layers` and loss(x, y, seed=, step=).
        """
        return Whole(self.whole().blocks())

    def score(self, network: nn.Module, split: str, device: torch.device) -> Row:
        """`evaluate` for what `network` made."""
        assert isinstance(network, Whole)
        return self.whole().evaluate(Walker(network.model), split)

    def whole(self) -> Adapter:
        """The same architecture in one block."""
        return type(self)(self.config.in_one_block())


def taken(kind: type[Options], options: Row, what: str) -> Options:
    """What was asked for of samples as a dataclass. Raises: ValueError if `what` doesn't have all of it."""
    known: Any = kind
    unknown = options.keys() - {field.name for field in fields(known)}
    if unknown:
        raise ValueError(f"{what} take no {', '.join(sorted(unknown))}; leave it out")
    return kind(**options)


class Whole(nn.Module):
    """One block of all layers, to be trained like any network."""

    def __init__(self, model: DiffusionBlocks):
        super().__init__()
        self.model = model

    @property
    def layers(self) -> nn.ModuleList:
        """All layers."""
        return self.model.blocks[0].layers

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """The denoising loss over the whole range of noise."""
        return self.model.loss(0, x, y, seed=seed, step=step).loss
