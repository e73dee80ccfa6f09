"""Uniforms by address in Triton. Definition: dbkernels/philox.py."""

import triton
import triton.language as tl

from dbkernels.triton.philox import address_words, uniforms_of_groups

GROUPS = 256  # groups of four elements a program takes


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset"])
def philox_uniform_kernel(out_ptr, numel, seed_low, seed_high, offset, GROUPS: tl.constexpr):
    first_group = tl.program_id(0).to(tl.int64) * GROUPS
    first = first_group * 4
    at = tl.arange(0, 4 * GROUPS)
    u = uniforms_of_groups(first_group, seed_low, seed_high, offset, GROUPS)
    tl.store(out_ptr + first + at, u, mask=at < numel - first)


def launch(out, seed, offset):
    """Fill out: float32, contiguous."""
    numel = out.numel()
    if numel:
        grid = (triton.cdiv(numel, 4 * GROUPS),)
        philox_uniform_kernel[grid](out, numel, *address_words(seed, offset), GROUPS=GROUPS)
