"""The address of random numbers: (seed, offset), each a Python int or a 0-dim tensor read on its device.

A CUDA graph repeats the ints that it was captured with, but reads memory anew: with the offset in a tensor, each replay
draws new noise. Each op that draws has, beside its schema for ints, an overload `.at` that takes either form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dbkernels._levels import readable
from dbkernels._library import HAS_TRITON, NAMESPACE, backend, lib

Number: TypeAlias = int | Tensor
ROUNDS = (10, 7)
SCHEMA = "Tensor? seed_at, Tensor? offset_at, SymInt seed, SymInt offset"  # of an overload: a tensor, or an int


def check_address(seed: int, offset: int) -> None:
    """Raise unless `seed` is an int in [0, 2^64) and `offset` an int in [0, 2^32)."""
    for name, value, bits in (("seed", seed, 64), ("offset", offset, 32)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be a Python int, got {type(value).__name__}: pass int({name})")
        if value < 0 or value >= 2**bits:
            raise ValueError(f"{name}={value} is outside [0, 2^{bits}): take it modulo 2**{bits}")


def check_rounds(rounds: int) -> None:
    """Raise unless `rounds` of Philox4x32 are known to pass the statistical tests."""
    if rounds not in ROUNDS:
        raise ValueError(f"rounds={rounds!r} must be 10 or 7: fewer fail statistical tests")


def signed(seed: int) -> int:
    """Return the seed's 64 bits as the signed int that an op's schema takes."""
    return seed - 2**64 if seed >= 2**63 else seed


def tensor_or_none(value: Any) -> Tensor | None:
    """Return `value` if it is a tensor."""
    return value if isinstance(value, Tensor) else None


def checked(seed: Number, offset: Number, device: torch.device) -> tuple[Number, Number]:
    """Return (seed, offset), with ints for tensors on the CPU. Values on another device aren't read, so not checked.

    Raises:
        TypeError: one is neither an int nor a tensor of integers.
        ValueError: an int is out of range; a tensor isn't 0-dim or not on `device`.
    """
    if seed.__class__ is int and offset.__class__ is int and 0 <= seed < 2**64 and 0 <= offset < 2**32:
        return seed, offset  # without the calls below, which take longer than the kernel's launch
    if isinstance(seed, Tensor):
        seed = _read("seed", seed, device)
        seed = seed % 2**64 if isinstance(seed, int) else seed  # a tensor holds the 64 bits as a signed int
    if isinstance(offset, Tensor):
        offset = _read("offset", offset, device)
    check_address(0 if isinstance(seed, Tensor) else seed, 0 if isinstance(offset, Tensor) else offset)
    return seed, offset


def _read(name: str, tensor: Tensor, device: torch.device) -> Number:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an int or a tensor of integers, got {tensor.dtype}: use torch.int64")
    if tensor.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but it is one number: pass a 0-dim tensor")
    if tensor.device.type != device.type or (tensor.device.index or 0) != (device.index or 0):
        raise ValueError(f"{name} is on {tensor.device} and the result on {device}: move {name} there, or pass an int")
    return int(tensor) if readable(tensor) else tensor


def split(seed: Number, offset: Number) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Return (seed, offset) as an overload takes them."""
    seed_at, offset_at = tensor_or_none(seed), tensor_or_none(offset)
    return seed_at, offset_at, 0 if isinstance(seed, Tensor) else signed(seed), 0 if offset_at is not None else offset  # type: ignore[return-value]


def joined(seed_at: Tensor | None, offset_at: Tensor | None, seed: int, offset: int) -> tuple[Number, Number]:
    """Undo `split`."""
    return seed if seed_at is None else seed_at, offset if offset_at is None else offset_at


def on_host(seed: Number, offset: Number) -> tuple[int, int]:
    """Return numbers on the CPU as the ints that an op's schema for ints takes."""
    return int(seed), int(offset)


def define_at(
    schema: str, definition: Callable[..., Any], fake: Callable[..., Any], kernel: Callable[..., Any] | None = None
) -> None:
    """Register an overload: its definition for every device, its shapes, and its launcher on CUDA."""
    lib.define(schema)
    name = schema.split("(", 1)[0]
    lib.impl(name, definition, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=lib)
    if kernel is not None and backend() != "reference" and HAS_TRITON:
        lib.impl(name, kernel, "CUDA")
