"""sample_sigma: noise levels of a block's range, ln sigma ~ N(P_mean, P_std) truncated to it, drawn by address.

The definition first, then the op and the public function. The kernels are csrc/cpu/sample_sigma.cpp and
dbkernels/triton/sample_sigma.py. All compute in float64 and round once, so for P_std up to 100 they agree to
float32's last bit or the one before.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbkernels._address import SCHEMA, Number, checked, define_at, joined, on_host, signed, split
from dbkernels._direct import direct
from dbkernels._levels import as_defined
from dbkernels._library import define, register_triton
from dbkernels.philox import sizes_of, uniform_reference

LEAST_MASS = 1e-290  # smaller probabilities lose digits, then underflow; this one is 36 standard deviations out
LEAST_SHARE = 1e3 * 2.0**-52  # of the tail a range lies in: with fewer steps of float64 its draws would be a few levels


class Plan(NamedTuple):
    """What a draw needs to know of its range: the probability below, inside and above it, each with all its digits
    where it is small; the density; the range's outermost float32 numbers."""

    below: float
    inside: float
    above: float
    P_mean: float
    P_std: float
    low: float
    high: float


@functools.lru_cache(maxsize=256)  # a run has a handful of ranges, and asks for one every step
def plan(low: float, high: float, P_mean: float, P_std: float) -> Plan:
    """The range as the kernels take it. Raises: ValueError as `sample_sigma` says."""
    if not (math.isfinite(P_mean) and 0.0 < P_std < math.inf):
        raise ValueError(f"P_mean={P_mean} must be finite and P_std={P_std} positive and finite")
    first, last = _float32_within(low, high)
    a, b = (math.log(low) - P_mean) / P_std, (math.log(high) - P_mean) / P_std
    below, above = _upper_tail(-a), _upper_tail(b)
    inside = _upper_tail(a) - above if a > 0 else _upper_tail(-b) - below
    tail = min(below, above) + inside
    if not (tail > LEAST_MASS and inside > LEAST_SHARE * tail):
        raise ValueError(
            f"block_range=({low}, {high}) has no mass that float64 can tell from zero: it lies {a:.4g} to {b:.4g} "
            f"standard deviations from the mean of ln sigma ~ N({P_mean}, {P_std}): choose a range or a density that "
            "meet"
        )
    return Plan(below, inside, above, P_mean, P_std, first, last)


def _upper_tail(x: float) -> float:
    """P(N(0, 1) > x)."""
    return math.erfc(x / math.sqrt(2)) / 2


def _float32_within(low: float, high: float) -> tuple[float, float]:
    """The smallest float32 >= low and the largest <= high."""
    if not 2.0**-126 <= low < high <= 2.0**127:
        raise ValueError(f"block_range=({low}, {high}) must rise, within float32's normal positive numbers")
    near = struct.unpack("2f", struct.pack("2f", low, high))
    bits = struct.unpack("2i", struct.pack("2f", *near))  # positive numbers sort as their bits
    first, last = struct.unpack("2f", struct.pack("2i", bits[0] + (near[0] < low), bits[1] - (near[1] > high)))
    if first > last:
        raise ValueError(f"block_range=({low}, {high}) holds no float32 number: widen it")
    return first, last


def _draw(p: Plan, u: Tensor) -> Tensor:
    # Counted from the nearer tail, where neither probability nor quantile loses digits.
    lower, upper = p.below + u * p.inside, p.above + (1 - u) * p.inside
    x = torch.special.ndtri(torch.minimum(lower, upper))
    sigma = torch.exp(p.P_mean + p.P_std * torch.where(lower < upper, x, -x))
    return sigma.clamp(p.low, p.high).float()


def _definition(out: Tensor, packed: Tensor, seed: Number, offset: Number) -> None:
    u = uniform_reference(out.shape, seed=seed, offset=offset, device=out.device).double()
    out.copy_(_draw(Plan(*packed.tolist()), u))


def sample_sigma_reference(
    block_range: tuple[float, float],
    shape: Sequence[int],
    P_mean: float,
    P_std: float,
    seed: Number,
    offset: Number,
    device: torch.device | str | None = None,
) -> Tensor:
    """The definition: the truncated normal's inverse distribution function at `philox_uniform`."""
    u = uniform_reference(shape, seed=seed, offset=offset, device=device).double()
    return _draw(plan(*block_range, P_mean, P_std), u)


# The plan travels as a tensor on the CPU: torch.compile would make a float argument a constant and compile anew for
# every range. As the op fills a tensor, the dispatcher picks its kernel by that one's device.
define(
    "sample_sigma(Tensor(a!) out, Tensor plan, SymInt seed, SymInt offset) -> ()",
    _definition,
    lambda out, plan, seed, offset: None,
)
define(
    "sample_sigma_plan(Tensor density) -> Tensor",
    lambda density: _tensor(plan(*density.tolist())),
    lambda density: density.new_empty(len(Plan._fields)),
    has_kernels=False,
)


def _triton_kernel(out: Tensor, packed: Tensor, seed: Number, offset: Number) -> None:
    from dbkernels.triton.sample_sigma import launch

    launch(out, packed.tolist(), seed, offset)


def _definition_at(out: Tensor, packed: Tensor, *address: Any) -> None:
    seed, offset = joined(*address)
    if out.device.type == "cpu":
        torch.ops.dbkernels.sample_sigma(out, packed, *on_host(seed, offset))
    else:
        _definition(out, packed, seed, offset)


register_triton("sample_sigma", _triton_kernel)
define_at(
    f"sample_sigma.at(Tensor(a!) out, Tensor plan, {SCHEMA}) -> ()",
    _definition_at,
    lambda out, plan, *address: None,
    lambda out, plan, *address: _triton_kernel(out, plan, *joined(*address)),
)


def _tensor(p: Plan) -> Tensor:
    return torch.tensor([*p], dtype=torch.float64, device="cpu")  # from a list: twice as fast as from a tuple


def _packed(low: float, high: float, P_mean: float, P_std: float) -> Tensor:
    if not torch.compiler.is_compiling():
        return _tensor(plan(low, high, P_mean, P_std))
    # A float stays a variable of the compiled graph only where it meets a tensor in arithmetic.
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.ops.dbkernels.sample_sigma_plan(torch.stack([zero + low, zero + high, zero + P_mean, zero + P_std]))


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name} must be a float, got {type(value).__name__}: pass float({name})")


def sample_sigma(
    block_range: tuple[float, float],
    shape: int | Sequence[int],
    *,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    seed: Number,
    offset: Number = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training noise of one block: ln sigma ~ N(P_mean, P_std) truncated to the block's range, without a host sync.

    A level is a function of (seed, offset, flat index) alone: the range's inverse distribution function at
    `philox_uniform`, rising with it, the same on every device to float32's last bit or the one before.

    Args:
        block_range: (sigma_low, sigma_high), in the target's units.
        shape: of the result, an int or a sequence of ints: one level a sample (B,) or a token (B, N).
        P_mean, P_std: mean and standard deviation of ln sigma before truncation.
        seed: in [0, 2^64); offset: in [0, 2^32), for example the step; or 0-dim tensors, as for `philox_uniform`.
        device: of the result.

    Returns:
        float32 of `shape`, every level in [sigma_low, sigma_high] whatever the rounding.

    Raises:
        TypeError: a number isn't one; seed or offset isn't an int or a tensor of integers.
        ValueError: not 0 < sigma_low < sigma_high within float32's normal numbers, or none of them lies between (for a
            fixed level, torch.full does); P_std isn't positive; the range lies so far out (some 36 standard deviations)
            that its probability is zero in float64; seed or offset is out of range; a size is negative.

    Source: Karras et al. 2022 (EDM), table 1; arXiv 2506.14202, the blocks' ranges; Salmon et al. 2011.
    """
    low, high = block_range
    _check_numbers(sigma_low=low, sigma_high=high, P_mean=P_mean, P_std=P_std)
    out = torch.empty(sizes_of(shape), dtype=torch.float32, device=device)
    seed, offset = checked(seed, offset, out.device)
    if direct(out):
        from dbkernels.triton.sample_sigma import launch

        launch(out, plan(low, high, P_mean, P_std), seed, offset)
        return out
    if as_defined():
        return sample_sigma_reference((low, high), out.shape, P_mean, P_std, seed, offset, out.device)
    packed = _packed(low, high, P_mean, P_std)
    if isinstance(seed, Tensor) or isinstance(offset, Tensor):
        torch.ops.dbkernels.sample_sigma.at(out, packed, *split(seed, offset))
    else:
        torch.ops.dbkernels.sample_sigma(out, packed, signed(seed), offset)
    return out
