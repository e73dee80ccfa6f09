"""Blocks in the place of a diffusers pipeline's transformer: each call goes to the block that owns its timestep."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from ..targets.scheduled import ScheduledTarget


class Routed(nn.Module):
    """What a pipeline takes for its transformer: `pipe.transformer = Routed(model)`, and `pipe(...)` works unchanged.

    It works on the model itself: one block is resident where blocks are offloaded, and weights are their averages where
    there are any (model.averages() around the pipeline's call exchanges them once and not at each step).

    Args:
        model: From `convert` with one of diffusers' networks.

    Attributes:
        config: The network's.
    """

    def __init__(self, model: DiffusionBlocks):
        super().__init__()
        assert model.origin is not None
        self.model = model
        self.config = importlib.import_module("diffusers.configuration_utils").FrozenDict(
            model.origin["network"]["config"]
        )

    def __repr__(self) -> str:  # diffusers prints it where a pipeline is saved
        assert self.model.origin is not None
        return f"Routed({self.model.origin['kind'].rpartition('.')[2]} in {len(self.model.blocks)} blocks)"

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, *, timestep: Tensor | float, return_dict: bool = True, **arguments: Any
    ) -> tuple[Tensor] | Any:
        """Return what the network would, computed by a block. timestep: one for all samples, or one for each, (B,).

        Raises: ValueError if timesteps aren't the network's, or those of one call belong to several blocks; TypeError
            on an argument that blocks can't serve, such as a ControlNet's residuals.
        """
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        if timestep.shape not in ((), (1,), (len(hidden_states),)):
            raise ValueError(f"timestep must be a number or one per sample, (B,), got {tuple(timestep.shape)}")
        timestep = timestep.expand(len(hidden_states))
        target = self.model.target
        assert isinstance(target, ScheduledTarget)
        owners = self.model.partition.block_of(target.sigma(timestep)).unique().tolist()
        if len(owners) > 1:
            raise ValueError(f"the timesteps of one call belong to blocks {owners}: call with those of one block")
        given = {name: value for name, value in arguments.items() if value is not None and value != {}}
        training = self.model.training
        self.model.eval()
        try:
            with self.model.averages():
                made = self._predict(owners[0], hidden_states, timestep, given)
        finally:
            self.model.train(training)
        output = importlib.import_module("diffusers.models.modeling_outputs").Transformer2DModelOutput
        return output(sample=made) if return_dict else (made,)

    def _predict(self, block: int, hidden_states: Tensor, timestep: Tensor, given: dict[str, Any]) -> Tensor:
        self.model.activate(block)
        around: Any = self.model.blocks[block].around(self.model.stem_head)
        stream = around.stem.start(hidden_states, timestep=timestep, **given)
        for layer in self.model.blocks[block].layers:
            stream = layer(stream, None)
        made: Tensor = around.head.features(stream)
        return made

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the blocks' folder: `to_original(load(folder))` gives this module back."""
        self.model.save_pretrained(folder)

    def cache_context(self, name: str, **arguments: Any) -> contextlib.AbstractContextManager[None]:
        """Return a context in which nothing is cached: pipelines of videos enter one around each call."""
        return contextlib.nullcontext()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # a pipeline's `to` moves all its parts; offloaded blocks are moved by their Offloader
        return self if self.model.offloader else super()._apply(fn, recurse)
