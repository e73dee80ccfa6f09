"""What a step keeps of its forward pass for the backward pass: all of it, or each layer's input alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..blocks import DiffusionBlocks
from ..offload.memory import SavedTensors
from .config import TrainerConfig


@contextlib.contextmanager
def saving(model: DiffusionBlocks, block: int, config: TrainerConfig, *, count: bool) -> Iterator[SavedTensors | None]:
    """Return the context of a block's forward pass, in which it saves what the config lets it save.

    Args:
        model: The model.
        block: The block that is trained.
        config: checkpoint_layers decides.
        count: Whether to count what is saved; else it yields None.
    """
    trained = model.blocks[block]
    saved = SavedTensors([*trained.parameters(), *model.parts()["shared"].parameters()]) if count else None
    if config.checkpoint_layers:  # compiled code has no hooks between its operators: its recomputation isn't counted
        trained.call = checkpointed if saved is None or config.compile else _Counted(saved)
    try:
        with saved.count() if saved else contextlib.nullcontext():
            yield saved
    finally:
        trained.__dict__.pop("call", None)


def checkpointed(layer: nn.Module, h: Any, cond: Any) -> Any:
    """Return layer(h, cond), which keeps its inputs alone and runs once more, with the same dropout, in backward."""
    return checkpoint(layer, h, cond, use_reentrant=False)


class _Counted:
    """`checkpointed`, counting what is recomputed."""

    def __init__(self, saved: SavedTensors):
        self.saved = saved

    def __call__(self, layer: nn.Module, h: Any, cond: Any) -> Any:
        return checkpoint(layer, h, cond, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return self.saved.recomputed(), contextlib.nullcontext()
