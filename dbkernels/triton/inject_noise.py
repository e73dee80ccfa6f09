"""z = c_in·(y + sigma·eps) in Triton. Definition: dbkernels/inject_noise.py; the arithmetic is that of
csrc/philox.h.

What limits it is instructions, not memory: Philox's ten rounds are shared by four elements, the logarithm,
root and angle by two, and a noise level is read once a program where it can be.
"""

import triton
import triton.language as tl

from dbkernels.triton.philox import address_words, normals_of_groups

GROUPS = 512  # groups of four elements a program takes: 16 elements a thread with 4 warps
SINGLE, PER_PROGRAM, PER_GROUP, PER_ELEMENT = range(4)


@triton.jit(do_not_specialize=["inner", "seed_low", "seed_high", "offset"])
def inject_noise_kernel(
    y_ptr, sigma_ptr, z_ptr, numel, inner, sigma_data: tl.float64, seed_low, seed_high, offset,
    SCALED: tl.constexpr, MODE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS groups of four consecutive elements. inner: what shares a noise level, in programs,
    groups or elements as MODE says.
    """
    program = tl.program_id(0)
    first_group = program.to(tl.int64) * GROUPS
    group = tl.arange(0, GROUPS)
    eps = normals_of_groups(first_group, seed_low, seed_high, offset, GROUPS)

    first = first_group * 4
    at = tl.arange(0, 4 * GROUPS)
    inside = at < numel - first
    wide: tl.constexpr = sigma_ptr.dtype.element_ty
    y = tl.load(y_ptr + first + at, mask=inside).to(wide)
    if MODE == 0:
        sigma = tl.load(sigma_ptr)
    elif MODE == 1:
        sigma = tl.load(sigma_ptr + program // inner)
    elif MODE == 2:
        # 64-bit division once a program, 32-bit within it.
        row = first_group // inner
        within = (first_group - row * inner).to(tl.int32) + group
        sigma = tl.load(sigma_ptr + row + within // inner, mask=group * 4 < numel - first, other=1.0)
    else:
        sigma = tl.load(sigma_ptr + (first + at) // inner, mask=inside, other=1.0)
    scale = sigma
    if SCALED:
        data = tl.full((), sigma_data, wide)
        scale = tl.rsqrt(sigma * sigma + data * data)
    if MODE == 2:
        sigma = tl.broadcast_to(sigma[:, None], (GROUPS, 4)).reshape(4 * GROUPS)
        scale = tl.broadcast_to(scale[:, None], (GROUPS, 4)).reshape(4 * GROUPS)
    z = y + sigma * eps.to(wide)
    if SCALED:
        z = z * scale
    tl.store(z_ptr + first + at, z.to(z_ptr.dtype.element_ty), mask=inside)


def mode_of(numel, levels):
    """How a noise level is found, and the divisor that finds it, for `levels` levels over `numel`
    elements."""
    if levels == 1:
        return SINGLE, 1
    inner = numel // levels
    if inner % (4 * GROUPS) == 0:
        return PER_PROGRAM, inner // (4 * GROUPS)
    # Beyond 2^31 elements a level, the 32-bit arithmetic within a program wouldn't hold.
    return (PER_GROUP, inner // 4) if inner % 4 == 0 and inner < 2**31 else (PER_ELEMENT, inner)


def launch(y, sigma, z, sigma_data, seed, offset):
    """Fill z. y, sigma, z: contiguous, on one device; sigma in y's compute dtype."""
    numel = y.numel()
    if numel == 0:
        return
    mode, inner = mode_of(numel, sigma.numel())
    inject_noise_kernel[(triton.cdiv(numel, 4 * GROUPS),)](
        y, sigma, z, numel, inner, float(sigma_data or 0.0), *address_words(seed, offset),
        SCALED=sigma_data is not None, MODE=mode, GROUPS=GROUPS,
    )  # fmt: skip
