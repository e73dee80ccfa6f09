"""Truncated log-normal noise levels by address in Triton. Definition: dbkernels/sample_sigma.py; the arithmetic is that
of csrc/cpu/sample_sigma.cpp.

A batch's levels are few, so float64 costs nothing that shows, and makes every device round to the same float32.
"""

import triton
import triton.language as tl

from dbkernels.triton.launch import Kinds, Launch
from dbkernels.triton.philox import address, key_and_offset, uniforms_of_groups

GROUPS = 64  # groups of four elements a program takes: two elements a thread, since they are few
_launches = Kinds()


@triton.jit
def upper_quantile(p):
    """x >= 0 with P(N(0, 1) > x) = p, for p in [1e-302, 1/2]: see csrc/cpu/sample_sigma.cpp."""
    t = tl.sqrt(-tl.log(p))
    n = t * 0.033580086600995714 + 2.0421168150091753
    n = n * t + 27.77268253803557
    n = n * t + 102.77359772225746
    n = n * t + 73.01997122565713
    n = n * t - 56.514609291104556
    n = n * t - 45.52366798008869
    n = n * t - 22.173741152457826
    n = n * t - 3.3863239657602824
    d = t * 0.02374449996167523 + 1.4440791864416036
    d = d * t + 19.71367881417226
    d = d * t + 75.9595822132304
    d = d * t + 83.6157203517707
    d = d * t + 37.769705129553174
    d = d * t + 11.73095888548876
    d = d * t + 1.0
    return n / d


# The types are written out because Triton takes a Python float for float32.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset"])
def sample_sigma_kernel(
    out_ptr, seed_ptr, offset_ptr, seed_low, seed_high, offset, numel,
    below: tl.float64, inside: tl.float64, above: tl.float64, P_mean: tl.float64, P_std: tl.float64,
    low: tl.float64, high: tl.float64,
    SEED_AT: tl.constexpr, OFFSET_AT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first_group = tl.program_id(0).to(tl.int64) * GROUPS
    first = first_group * 4
    at = tl.arange(0, 4 * GROUPS)
    key0, key1, word = key_and_offset(seed_ptr, offset_ptr, seed_low, seed_high, offset, SEED_AT, OFFSET_AT)
    u = uniforms_of_groups(first_group, key0, key1, word, GROUPS).to(tl.float64)
    lower, upper = below + u * inside, above + (1.0 - u) * inside
    x = upper_quantile(tl.minimum(lower, upper))
    sigma = tl.exp(P_mean + P_std * tl.where(lower < upper, -x, x))
    sigma = tl.minimum(tl.maximum(sigma, low), high)
    tl.store(out_ptr + first + at, sigma.to(tl.float32), mask=at < numel - first)


def launch(out, plan, seed, offset):
    """Fill out: float32, contiguous. plan: the seven numbers of dbkernels.sample_sigma.plan. seed, offset: ints, or
    0-dim tensors."""
    numel = out.numel()
    if numel == 0:
        return
    tensors, words, form = address(seed, offset, out)
    key = numel, tuple(plan), form, out.get_device()
    kind = (*key, *(t.dtype for t in tensors))  # a prepared launch doesn't look at its pointers' dtypes
    found = _launches.get(kind) or _launches.keep(kind, _prepare(*key))
    found(out, *tensors, varying=words)


def _prepare(numel, plan, form, device):
    grid = (triton.cdiv(numel, 4 * GROUPS),)
    return Launch(sample_sigma_kernel, grid, device, (numel, *plan), SEED_AT=form[0], OFFSET_AT=form[1], GROUPS=GROUPS)
