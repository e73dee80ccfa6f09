"""Uniforms by address in Triton. Definition: dbkernels/philox.py."""

import triton
import triton.language as tl

from dbkernels.triton.launch import Kinds, Launch
from dbkernels.triton.philox import address, key_and_offset, uniforms_of_groups

GROUPS = 256  # groups of four elements per program
_launches = Kinds()


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset"])
def philox_uniform_kernel(
    out_ptr, seed_ptr, offset_ptr, seed_low, seed_high, offset, numel,
    SEED_AT: tl.constexpr, OFFSET_AT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first_group = tl.program_id(0).to(tl.int64) * GROUPS
    first = first_group * 4
    at = tl.arange(0, 4 * GROUPS)
    key0, key1, word = key_and_offset(seed_ptr, offset_ptr, seed_low, seed_high, offset, SEED_AT, OFFSET_AT)
    u = uniforms_of_groups(first_group, key0, key1, word, GROUPS)
    tl.store(out_ptr + first + at, u, mask=at < numel - first)


def launch(out, seed, offset):
    """Fill out: float32, contiguous. seed, offset: ints, the seed signed or not, or 0-dim tensors."""
    numel = out.numel()
    if numel == 0:
        return
    tensors, words, form = address(seed, offset, out)
    key = numel, form, out.get_device()
    kind = (*key, *(t.dtype for t in tensors))  # a prepared launch doesn't check its pointers' dtypes
    prepared = _launches.get(kind) or _launches.keep(kind, _prepare(*key))
    prepared(out, *tensors, varying=words)


def _prepare(numel, form, device):
    grid = (triton.cdiv(numel, 4 * GROUPS),)
    return Launch(philox_uniform_kernel, grid, device, (numel,), SEED_AT=form[0], OFFSET_AT=form[1], GROUPS=GROUPS)
