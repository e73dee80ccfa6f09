"""What a step keeps of its forward pass for the backward pass: all of it, or each layer's input alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..blocks import DiffusionBlocks
from ..denoiser import Block
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
        trained.call = compiled if config.compile else _Checkpointed(saved)
    unchanged = config.checkpoint_layers and config.compile
    try:
        with (
            saved.count() if saved else contextlib.nullcontext(),
            _unchanged(trained) if unchanged else contextlib.nullcontext(),
        ):
            yield saved
    finally:
        trained.__dict__.pop("call", None)


@contextlib.contextmanager
def _unchanged(trained: Block) -> Iterator[None]:
    """Raise ValueError if a forward pass changes buffers of layers: compiled, the second one would read the new ones.

    But those of batch and instance norm, which training doesn't read."""
    places = [
        (f"layers.{at}.{name}", module._buffers, name)
        for at, module in trained.layers.named_modules()
        for name in module._buffers
        if not isinstance(module, nn.modules.batchnorm._NormBase)
    ]
    given = [(path, own, name, t, t._version) for path, own, name in places if (t := own[name]) is not None]
    yield
    if changed := [path for path, own, name, t, version in given if own[name] is not t or t._version != version]:
        raise ValueError(
            f"compile=True with checkpoint_layers=True: layers change buffers ({', '.join(changed[:3])}) in their "
            "forward pass, which in backward would begin with the changed ones; leave one of the two out"
        )


def compiled(layer: nn.Module, h: Any, cond: Any) -> Any:
    """Return layer(h, cond), which keeps its inputs alone and runs once more in backward, where all is compiled."""
    return checkpoint(layer, h, cond, use_reentrant=False)


class _Checkpointed:
    """`compiled`, with the same dropout and the same buffers in backward.

    saved: Counts what is recomputed, if given."""

    def __init__(self, saved: SavedTensors | None):
        self.saved = saved

    def __call__(self, layer: nn.Module, h: Any, cond: Any) -> Any:
        return checkpoint(layer, h, cond, use_reentrant=False, context_fn=lambda: self._contexts(Buffers(layer)))

    def _contexts(self, buffers: Buffers) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        if self.saved is None:
            return contextlib.nullcontext(), buffers.again()
        self.saved.add({id(copy): copy for _, _, copy in buffers.before if copy is not None}.values())
        return self.saved.recomputed(), buffers.again()


class Buffers:
    """Copies of a layer's buffers, some of which its forward pass may change: the second pass must read what the first
    one read, and leave what that left. Tensors' versions don't tell which change: batch norm's don't."""

    def __init__(self, layer: nn.Module):
        places = [(module._buffers, name) for module in layer.modules() for name in module._buffers]
        copies = {id(t): t.clone() for own, name in places if (t := own[name]) is not None}  # what is one stays one
        self.before = [(own, name, copies.get(id(own[name]))) for own, name in places]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Put the copies in their place for as long."""
        after = [own[name] for own, name, _ in self.before]
        copies = {id(copy): copy.clone() for _, _, copy in self.before if copy is not None}  # for another backward
        for own, name, copy in self.before:
            own[name] = copies.get(id(copy))
        try:
            yield
        finally:
            for (own, name, _), tensor in zip(self.before, after, strict=True):
                own[name] = tensor
