"""Memory and first values for modules that were made on the meta device, a part at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def materialize(module: nn.Module) -> None:
    """Give parameters and buffers on the meta device memory on the host, and values by their modules' own
    `reset_parameters()`. Parameters stay the same objects: optimizers have them already.

    Raises: ValueError naming a module that has no reset_parameters.
    """
    empty = [m for m in module.modules() if any(t.is_meta for t in (*m.parameters(), *m.buffers()))]
    for owner in empty:
        own = [t for t in (*owner._parameters.values(), *owner._buffers.values()) if t is not None and t.is_meta]
        if own and _reset_of(owner) is None:
            name = next(name for name, m in module.named_modules() if m is owner)
            raise ValueError(
                f"{type(owner).__name__} {name!r} is on the meta device and has no reset_parameters(): define it, "
                "or make the module elsewhere"
            )
        for t in own:
            torch.utils.swap_tensors(t, _like(t))
    with torch.no_grad():
        for owner in reversed(empty):  # a module's own values come after its children's
            if reset := _reset_of(owner):
                reset()


def _reset_of(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _like(t: Tensor) -> Tensor:
    real = torch.empty_like(t, device="cpu")
    return nn.Parameter(real, t.requires_grad) if isinstance(t, nn.Parameter) else real
