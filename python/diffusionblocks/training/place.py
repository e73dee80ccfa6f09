"""What a CUDA graph of a step holds for good: addresses of tensors, and what Python made of the layers' settings."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn

from ..offload.part import Part

SETTINGS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
# Attributes of a module that no step depends on: hooks, which `hooked` refuses, and the function that compile() leaves,
# another one for each block.
KEPT = {"training", "_parameters", "_buffers", "_modules"}
SKIPPED = (vars(nn.Module()).keys() - KEPT) | {"_compiled_call_impl"}
HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")


class Same:
    """Equals what holds the same object. Keeps it alive, so that its identity isn't another's later."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def place_of(parts: Iterable[Part]) -> Hashable:
    """Return a key that is equal for parts whose steps do the same with the same addresses."""
    tensors = {f"{i}/{name}": t for i, part in enumerate(parts) for name, t in part.tensors().items()}
    moving = {id(t) for t in tensors.values()}
    where = tuple((name, t.data_ptr(), t.dtype, t.shape, t.stride()) for name, t in tensors.items())
    seen: dict[int, int] = {}
    return where, *((_described(p.module, moving, seen), _groups(p)) for p in parts)


def _groups(part: Part) -> Hashable:
    """Return the settings of a part's optimizer but its learning rate, which a graph reads anew."""
    groups = part.optimizer.param_groups if part.optimizer else []
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr", *_unread(group))} for group in groups]
    return tuple(_described(s, set(), {}) for s in settings), tuple(p.data_ptr() for g in groups for p in g["params"])


def _unread(group: dict[str, Any]) -> list[str]:
    """Return the settings of BlockAdamW that an update doesn't read: a seed, where nothing is rounded at random."""
    return ["seed"] if group.get("moments") == "float32" and group.get("masters") else []


def _described(value: Any, moving: set[int], seen: dict[int, int]) -> Hashable:
    """Return settings by value, a module by its attributes, and any other object by its identity.

    moving: Ids of the tensors that come with a block, which are told apart by their addresses.
    seen: Ids of what was met so far, by order: one thing in two places isn't two things.
    """
    if isinstance(value, SETTINGS):
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, nn.Module):
        return type(value), *(
            (name, v if isinstance(v, SETTINGS) else _described(v, moving, seen))
            for name, v in vars(value).items()
            if name not in SKIPPED
        )
    if isinstance(value, dict):
        return dict, *((name, _described(v, moving, seen)) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *(_described(v, moving, seen) for v in value)
    return value.requires_grad if id(value) in moving else Same(value)


def hooked(parts: Iterable[Part]) -> str | None:
    """Return which hooks a step of the parts runs, if any: Python's code, which a graph doesn't repeat."""
    for part in parts:
        for name, module in part.module.named_modules():
            if any(getattr(module, hooks) for hooks in HOOKS):
                return f"{name or 'a part'} has hooks"
        for name, p in part.module.named_parameters():
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                return f"{name} has hooks"
        if part.optimizer and (part.optimizer._optimizer_step_pre_hooks or part.optimizer._optimizer_step_post_hooks):
            return "an optimizer has hooks"
    return None
