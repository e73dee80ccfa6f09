"""Random numbers by address: Philox4x32 as plain PyTorch, the definition every kernel is tested against.

A number is a function of (seed, offset, flat index) alone: no generator state, nothing to save, the same on every
device, for any split of the work. Element i is word i % 4 of the block cipher at

    counter = (i // 4 mod 2^32, i // 4 div 2^32, offset, stream)    key = (seed mod 2^32, seed div 2^32)

where stream is 0 for normals, 1 for uniforms, 2 for stochastic rounding and 3 for that of an optimizer's moments, so
that equal (seed, offset) never ties a noise level to its noise. The cipher has ten rounds. Normals may be drawn with
seven, the fewest that pass BigCrush (Salmon et al., table 2): other numbers, for fewer instructions.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (the generator); Box and Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbkernels._address import SCHEMA, Number, check_address, checked, define_at, joined, on_host, signed, split
from dbkernels._direct import direct
from dbkernels._levels import as_defined
from dbkernels._library import define, register_triton

__all__ = ["check_address", "philox_uniform", "signed"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
NORMAL_STREAM, UNIFORM_STREAM, ROUNDING_STREAM, MOMENT_STREAM = 0, 1, 2, 3
_LOW = 0xFFFFFFFF


def philox_4x32(
    counter: Sequence[Tensor | int], key: tuple[Number, Number], rounds: int = ROUNDS
) -> tuple[Tensor, ...]:
    """Compute Philox4x32 of four counter words under a key of two; words are int64 in [0, 2^32), element by element.

    A 32 x 32-bit product overflows int64's sign but wraps to the same 64 bits, so shift and mask recover both halves.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def random_words(groups: Tensor, seed: Number, offset: Number, stream: int, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of each group of four elements. groups: int64, flat index // 4. The seed may be
    signed."""
    # The zero is added to a tensor so that counter words made of constants live on the groups' device.
    zero = torch.zeros((), dtype=torch.int64, device=groups.device)
    counter = (groups & _LOW, groups >> 32 & _LOW, zero + offset & _LOW, zero + stream)
    return philox_4x32(counter, (seed & _LOW, seed >> 32 & _LOW), rounds)


def box_muller(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent normals from two random words: exact to float64, rounded to float32.

    The radius takes all 32 bits, rounded to the float32 grid (so |eps| reaches 6.76); the angle takes 24,
    reduced to a quadrant in integers (so sin and cos are exact where they are zero).
    """
    u = x0.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = torch.sqrt(-2.0 * torch.log(u.to(torch.float64)))
    angle = x1 >> 8
    quadrant = (angle + (1 << 21)) >> 22
    theta = (angle - (quadrant << 22)).to(torch.float64) * (math.pi / 2**23)
    cos, sin = torch.cos(theta), torch.sin(theta)
    swap, flip_cos, flip_sin = (quadrant & 1) == 1, ((quadrant + 1) & 2) == 2, (quadrant & 2) == 2
    cos, sin = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    cos, sin = torch.where(flip_cos, -cos, cos), torch.where(flip_sin, -sin, sin)
    return (radius * cos).to(torch.float32), (radius * sin).to(torch.float32)


def _groups(numel: int, device: torch.device | str | None) -> Tensor:
    return torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)


def normal_reference(
    shape: Sequence[int],
    *,
    seed: Number,
    offset: Number = 0,
    rounds: int = ROUNDS,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw standard normals by address, float32: the definition of the eps that `inject_noise` adds."""
    numel = math.prod(shape)
    x0, x1, x2, x3 = random_words(_groups(numel, device), seed, offset, NORMAL_STREAM, rounds)
    lanes = box_muller(x0, x1) + box_muller(x2, x3)
    return torch.stack(lanes, dim=-1).flatten()[:numel].view(tuple(shape))


def uniform_reference(
    shape: Sequence[int], *, seed: Number, offset: Number = 0, device: torch.device | str | None = None
) -> Tensor:
    """Draw uniforms in (0, 1) by address, float32: the definition of `philox_uniform`."""
    numel = math.prod(shape)
    words = random_words(_groups(numel, device), seed, offset, UNIFORM_STREAM)
    # 23 bits and a half fit float32 exactly, so no rounding can reach 0 or 1.
    lanes = [((word >> 9).to(torch.float32) + 0.5) * 2.0**-23 for word in words]
    return torch.stack(lanes, dim=-1).flatten()[:numel].view(tuple(shape))


def round_stochastically(value: Tensor, first_group: int, *, seed: int, offset: int) -> Tensor:
    """Round float32 to bfloat16, up or down with the probabilities that keep the mean.

    Element i takes bits 16·(i % 2) and up of word i // 2 % 4 of group first_group + i // 8.
    """
    groups = _groups((value.numel() + 1) // 2, value.device) + first_group
    words = torch.stack(random_words(groups, seed, offset, ROUNDING_STREAM), dim=-1)
    return _rounded(value, torch.stack((words & 0xFFFF, words >> 16), dim=-1))


def round_moments(exp_avg: Tensor, exp_avg_sq: Tensor, first_group: int, *, seed: int, offset: int) -> list[Tensor]:
    """Round two float32 tensors of one shape to bfloat16, as `round_stochastically` does, by random bits of their own.

    Element i takes word i % 4 of group 2·first_group + i // 4: exp_avg its lower half, exp_avg_sq its upper one.
    """
    groups = _groups(exp_avg.numel(), exp_avg.device) + 2 * first_group
    words = torch.stack(random_words(groups, seed, offset, MOMENT_STREAM), dim=-1)
    return [_rounded(exp_avg, words & 0xFFFF), _rounded(exp_avg_sq, words >> 16)]


def _rounded(value: Tensor, random: Tensor) -> Tensor:
    """Add 16 random bits below bfloat16's last place and cut them off: exact. random: at least one per element."""
    random = random.flatten()[: value.numel()].view(value.shape)
    bits = value.contiguous().view(torch.int32).to(torch.int64) & _LOW
    rounded = ((bits + random) >> 16 << 16).to(torch.int32).view(torch.float32)  # the cast wraps, as it should
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def _fill(out: Tensor, seed: Number, offset: Number) -> None:
    out.copy_(uniform_reference(out.shape, seed=seed, offset=offset, device=out.device))


def _fill_at(out: Tensor, *address: Any) -> None:
    seed, offset = joined(*address)
    if out.device.type == "cpu":
        torch.ops.dbkernels.philox_uniform(out, *on_host(seed, offset))
    else:
        _fill(out, seed, offset)


def _triton_kernel(out: Tensor, seed: Number, offset: Number) -> None:
    from dbkernels.triton.philox_uniform import launch

    launch(out, seed, offset)


# An op and not a bare chain of them: torch.compile must neither bake the seed in nor rearrange integer arithmetic
# (Inductor 2.13 miscompiles its 64-bit shifts on the CPU). It fills a tensor: the dispatcher picks the kernel by one.
define("philox_uniform(Tensor(a!) out, SymInt seed, SymInt offset) -> ()", _fill, lambda out, seed, offset: None)
register_triton("philox_uniform", _triton_kernel)
define_at(
    f"philox_uniform.at(Tensor(a!) out, {SCHEMA}) -> ()",
    _fill_at,
    lambda out, *address: None,
    lambda out, *address: _triton_kernel(out, *joined(*address)),
)


def sizes_of(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return `shape` as a tuple. Raises: ValueError if a size is negative."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape={sizes} has a negative size: pass sizes of 0 or more")
    return sizes


def philox_uniform(
    shape: int | Sequence[int], *, seed: Number, offset: Number = 0, device: torch.device | str | None = None
) -> Tensor:
    """Draw uniforms in the open interval (0, 1) by address: stateless, resumable, no host sync.

    Args:
        shape: of the result, an int or a sequence of ints.
        seed: in [0, 2^64); offset: in [0, 2^32), for example the step. Either may be a 0-dim tensor of integers on the
            result's device (the seed's 64 bits as a signed int): then a CUDA graph reads it anew in each replay, to the
            same bits as the int. Its range isn't checked on a GPU, which that would synchronise; the low bits count.
        device: of the result; the numbers are the same on each.

    Returns:
        float32 of `shape`, odd multiples of 2^-24: never 0, never 1, and the same bits everywhere.

    Raises:
        TypeError, ValueError: seed or offset isn't an int in its range or such a tensor, or a size is negative.

    Source: Salmon et al. 2011.
    """
    out = torch.empty(sizes_of(shape), dtype=torch.float32, device=device)
    seed, offset = checked(seed, offset, out.device)
    if as_defined():
        return uniform_reference(out.shape, seed=seed, offset=offset, device=out.device)
    if direct(out):
        _triton_kernel(out, seed, offset)
    elif isinstance(seed, Tensor) or isinstance(offset, Tensor):
        torch.ops.dbkernels.philox_uniform.at(out, *split(seed, offset))
    else:
        torch.ops.dbkernels.philox_uniform(out, signed(seed), offset)
    return out
