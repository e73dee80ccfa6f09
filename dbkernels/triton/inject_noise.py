"""z = c_in·(y + sigma·eps) in Triton. Definition: dbkernels/inject_noise.py; the arithmetic is that of
csrc/philox.h.

Instructions are the limit, not memory: Philox's rounds are shared by four elements, the logarithm, root and angle by
two, and a noise level is read once per program where possible.
"""

import triton
import triton.language as tl

from dbkernels.triton.launch import Kinds, Launch
from dbkernels.triton.philox import address, key_and_offset, normals_of_groups

GROUPS = 512  # groups of four elements per program: 16 elements per thread with 4 warps
GIVEN, PER_ROW, PER_GROUP, PER_ELEMENT = range(4)  # sources of a noise level
MOST_ROWS = 65535  # of a grid: its second dimension
_launches = Kinds()


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset", "inner"])
def inject_noise_kernel(
    y_ptr, sigma_ptr, z_ptr, seed_ptr, offset_ptr, seed_low, seed_high, offset, level: tl.float64,
    numel, inner, sigma_data: tl.float64,
    CLEAN: tl.constexpr, NOISY: tl.constexpr, SCALED: tl.constexpr, MODE: tl.constexpr,
    SEED_AT: tl.constexpr, OFFSET_AT: tl.constexpr, ROUNDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Noise GROUPS groups of four consecutive elements per program. CLEAN: there is a y; NOISY: there is noise. inner:
    groups or elements per noise level, by MODE; for PER_ROW there is one level per row of the grid."""
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    first_group = program * GROUPS
    first = first_group * 4
    at = tl.arange(0, 4 * GROUPS)
    inside = at < numel - first
    wide: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    if MODE == 0:
        sigma = tl.full((), level, wide)
    elif MODE == 1:
        sigma = tl.load(sigma_ptr + tl.program_id(1)).to(wide)
    elif MODE == 2:
        # 64-bit division once per program, 32-bit within it.
        row, group = first_group // inner, tl.arange(0, GROUPS)
        within = (first_group - row * inner).to(tl.int32) + group
        sigma = tl.load(sigma_ptr + row + within // inner, mask=group * 4 < numel - first, other=1.0).to(wide)
    else:
        sigma = tl.load(sigma_ptr + (first + at) // inner, mask=inside, other=1.0).to(wide)
    scale = sigma
    if SCALED:
        data = tl.full((), sigma_data, wide)
        scale = tl.rsqrt(sigma * sigma + data * data)
    if MODE == 2:
        sigma = tl.broadcast_to(sigma[:, None], (GROUPS, 4)).reshape(4 * GROUPS)
        scale = tl.broadcast_to(scale[:, None], (GROUPS, 4)).reshape(4 * GROUPS)
    if NOISY:
        key0, key1, word = key_and_offset(seed_ptr, offset_ptr, seed_low, seed_high, offset, SEED_AT, OFFSET_AT)
        z = sigma * normals_of_groups(first_group, key0, key1, word, GROUPS, ROUNDS).to(wide)
        if CLEAN:
            z += tl.load(y_ptr + first + at, mask=inside).to(wide)
    else:
        z = tl.load(y_ptr + first + at, mask=inside).to(wide)
    if SCALED:
        z = z * scale
    tl.store(z_ptr + first + at, z.to(z_ptr.dtype.element_ty), mask=inside)


def mode_of(numel, levels):
    """Return the mode of a noise level's index, its divisor and the grid, for `levels` levels over `numel` elements.
    0 levels: one, passed as a number."""
    programs = triton.cdiv(numel, 4 * GROUPS)
    if levels <= 1:
        return (PER_ROW if levels else GIVEN), 1, (programs, 1)
    inner = numel // levels
    if inner % (4 * GROUPS) == 0 and levels <= MOST_ROWS:
        return PER_ROW, 1, (programs // levels, levels)
    # Beyond 2^31 elements per level, the 32-bit arithmetic within a program would overflow.
    mode = (PER_GROUP, inner // 4) if inner % 4 == 0 and inner < 2**31 else (PER_ELEMENT, inner)
    return *mode, (programs, 1)


def launch(y, sigma, z, sigma_data, seed, offset, rounds=10):
    """Fill z. y: None for 0. sigma: a float, or levels of any floating dtype, in z's order. seed, offset: ints, or
    0-dim tensors; seed None: no noise. All contiguous, on one device."""
    numel = z.numel()
    if numel == 0:
        return
    levels, level = (0, sigma) if isinstance(sigma, float) else (sigma.numel(), 0.0)
    tensors, words, form = address(0 if seed is None else seed, offset, z)
    key = (numel, levels, sigma_data, y is not None, seed is not None, *form, rounds, z.get_device())
    # A kernel is compiled for its pointers' dtypes, and a prepared launch doesn't check them.
    kind = (z.dtype, sigma.dtype if levels else None, *(t.dtype for t in tensors), *key)
    prepared = _launches.get(kind) or _launches.keep(kind, _prepare(*key))
    prepared(z if y is None else y, sigma if levels else z, z, *tensors, varying=(*words, level))


def _prepare(numel, levels, sigma_data, clean, noisy, seed_at, offset_at, rounds, device):
    mode, inner, grid = mode_of(numel, levels)
    return Launch(
        inject_noise_kernel, grid, device, (numel, inner, float(sigma_data or 0.0)),
        CLEAN=clean, NOISY=noisy, SCALED=sigma_data is not None, MODE=mode,
        SEED_AT=seed_at, OFFSET_AT=offset_at, ROUNDS=rounds, GROUPS=GROUPS,
    )  # fmt: skip
