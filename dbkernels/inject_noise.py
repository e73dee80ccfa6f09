"""inject_noise: z = c_in · (y + sigma·eps), with eps drawn by element index and never stored.

The public functions. The definitions, ops and gradients are in dbkernels/_inject_noise.py and, for y as rows of a
table, dbkernels/inject_noise_table.py; the kernels in csrc/cpu/ and dbkernels/triton/ under the ops' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from dbkernels._address import Number, check_rounds
from dbkernels._dtypes import compute_dtype
from dbkernels._inject_noise import inject_noise_reference, noised, normals
from dbkernels._levels import check_sigma
from dbkernels.inject_noise_table import inject_noise_table_reference, noised_rows
from dbkernels.philox import ROUNDS, sizes_of

__all__ = ["inject_noise", "inject_noise_reference", "inject_noise_table_reference", "philox_normal"]

Rows = tuple[Tensor, Tensor]


@overload
def inject_noise(
    y: Tensor | Rows, sigma: float | Tensor, *, sigma_data: float | None = None, normalize: bool = False,
    return_c_noise: Literal[False] = False, seed: Number, offset: Number = 0, rounds: int = ROUNDS,
) -> Tensor: ...  # fmt: skip
@overload
def inject_noise(
    y: Tensor | Rows, sigma: float | Tensor, *, sigma_data: float | None = None, normalize: bool = False,
    return_c_noise: Literal[True], seed: Number, offset: Number = 0, rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def inject_noise(
    y: Tensor | Rows,
    sigma: float | Tensor,
    *,
    sigma_data: float | None = None,
    normalize: bool = False,
    return_c_noise: bool = False,
    seed: Number,
    offset: Number = 0,
    rounds: int = ROUNDS,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add noise to a target: z = y + sigma·eps, eps ~ N(0, 1); with `sigma_data`, z is scaled by the network's c_in.

    eps is a function of (seed, offset, flat index in z) alone: the same on every device and for every memory layout of
    y. It is never stored; sigma's gradient draws it again.

    Args:
        y: clean target, any shape, float16, bfloat16, float32 or float64. Arithmetic is float32 (float64 for
            float64). Or (indices, table), for y = table[indices] without storing it: indices int64 or int32 of any
            shape, table (K, d); the table gets the gradient, summed in the order of the indices. On the CPU an index
            outside [0, K) raises; on a GPU, and within torch.compile, its row of z is NaN, since checking would
            synchronise the device.
        sigma: noise std in y's units: a float, a 0-dim tensor, one per sample (B,) or one per token (B, N),
            broadcast over the trailing dimensions (which it may carry as ones); with a table, per index. The values
            of a tensor aren't checked, as that would synchronise the device: a NaN or negative level shows in z.
        sigma_data: the target's std in the same units. If given, z is multiplied by
            c_in = 1 / sqrt(sigma² + sigma_data²).
        normalize: scale the table's rows to unit length, as torch.nn.functional.normalize does, and the gradient
            through it. Off by default: a fixed codebook is normalised once.
        return_c_noise: also return c_noise = ln(sigma)/4, the network's noise conditioning.
        seed: in [0, 2^64); offset: in [0, 2^32), for example the step. Draw anew by changing either. Either may be a
            0-dim tensor of integers on y's device, as for `philox_uniform`: a CUDA graph reads it anew in each replay.
        rounds: of Philox4x32: 10, or 7, the fewest that pass BigCrush (Salmon et al. 2011, table 2). Other noise, and
            fewer instructions on a GPU, where they limit half types; on the CPU the definition draws it, more slowly.

    Returns:
        z: contiguous, y's shape (with a table, the indices' and d), dtype and device. With return_c_noise, (z,
        c_noise): the latter float32, of sigma's shape, -inf where sigma is 0.

    Raises:
        TypeError: y, table or sigma isn't floating point; indices aren't integers; seed or offset isn't an int or a
            tensor of integers.
        ValueError: sigma's shape or device doesn't fit y's; table isn't (K, d); an index is outside [0, K); normalize
            without a table; a float sigma or sigma_data is out of range; seed or offset is out of range or not
            0-dim on y's device; rounds is neither 10 nor 7.

    Source: Karras et al. 2022 (EDM), table 1; Salmon et al. 2011 (Philox4x32-10).
    """
    check_rounds(rounds)
    if isinstance(y, tuple):
        if len(y) != 2:
            raise ValueError(f"y as rows of a table must be (indices, table), got {len(y)} items")
        z = noised_rows(y, sigma, (sigma_data, normalize), seed, offset, rounds)
    elif normalize:
        raise ValueError("normalize=True needs y as (indices, table): normalise a target before noising it")
    else:
        z = noised((y,), sigma, (sigma_data,), seed, offset, rounds)
    if not return_c_noise:
        return z
    level = check_sigma(sigma, "y", z, compute_dtype(z.dtype))
    return z, (level.log() / 4).float().reshape(sigma.shape if isinstance(sigma, Tensor) else ())


def philox_normal(
    shape: int | Sequence[int],
    *,
    seed: Number,
    offset: Number = 0,
    rounds: int = ROUNDS,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw standard normals by address, float32: the eps of `inject_noise` at the same (seed, offset, rounds).

    Args:
        shape: of the result; seed, offset, device: as for `philox_uniform`; rounds: as for `inject_noise`.

    Returns:
        float32 of `shape`.

    Raises:
        TypeError, ValueError: seed or offset isn't an int in its range or a tensor of one; rounds is neither 10 nor 7.

    Source: Salmon et al. 2011; Box and Muller 1958.
    """
    check_rounds(rounds)
    return normals(sizes_of(shape), device, seed, offset, rounds)
