"""The context of a forward pass: bfloat16 where asked for, and a seed for dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def to_bfloat16(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Store trained matrices in bfloat16, in place: under autocast their products then need no cast in every step.

    Vectors (biases, norms) and frozen tensors (codebooks) stay as they are: small, and autocast computes with them in
    float32. Returns the parameters changed, and their data before.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1 and p.dtype == torch.float32]
    before = [(p, p.data) for p in matrices]
    for p, data in before:
        p.data = data.to(torch.bfloat16)
    return before


@contextlib.contextmanager
def stored(model: nn.Module, precision: str) -> Iterator[bool]:
    """Store a model's weights as a precision asks for; an error within the context restores them. Yields whether that
    made any half: a model that was half before stays what it is."""
    before = to_bfloat16(model) if precision == "bfloat16" else []
    try:
        yield bool(before)
    except BaseException:
        for p, data in before:
            p.data = data
        raise


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def generators_of(device: torch.device) -> list[torch.Generator]:
    """Return torch's own generators that layers on a device draw from."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


@contextlib.contextmanager
def seeded(key: int, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators within it; outside, the caller's random numbers go on untouched.

    By the generators themselves: torch.manual_seed formats a stack trace for every kind of device, 1 ms.
    """
    generators = generators_of(device)
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(key % 2**63)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
