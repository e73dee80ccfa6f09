"""z = c_in·(y + sigma·eps) in Triton. Definition: dbkernels/inject_noise.py; the arithmetic is that of
csrc/philox.h.

What limits it is instructions, not memory: Philox's ten rounds are shared by four elements, the logarithm,
root and angle by two, and a noise level is read once a program where it can be.
"""

import triton
import triton.language as tl

GROUPS = 512  # groups of four elements a program takes: 16 elements a thread with 4 warps
SINGLE, PER_PROGRAM, PER_GROUP, PER_ELEMENT = range(4)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 words."""
    for _ in tl.static_range(10):
        # One wide multiply gives both halves; umulhi and a product would be two instructions.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def minus_two_log(u):
    """-2·ln u for u in [2^-33, 1]: see csrc/philox.h."""
    bits = u.to(tl.uint32, bitcast=True)
    e = (bits - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    f = (bits - (e << 23).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, -0.076342255, 0.12761468)
    q = tl.fma(q, f, -0.13160233)
    q = tl.fma(q, f, 0.14201777)
    q = tl.fma(q, f, -0.16623354)
    q = tl.fma(q, f, 0.20001227)
    q = tl.fma(q, f, -0.25000823)
    q = tl.fma(q, f, 0.3333333)
    q = tl.fma(q, f, -0.5)
    exponent = e.to(tl.float32)
    whole = exponent * 0.693359375
    total = whole + f
    lost = (whole - total) + f
    return -2.0 * (total + tl.fma(f * f, q, tl.fma(exponent, -2.12194440e-4, lost)))


@triton.jit
def box_muller(x0, x1):
    """Two normals from two words: see csrc/philox.h."""
    square = minus_two_log(tl.fma(x0.to(tl.float32), 2.0**-32, 2.0**-33))
    # The root by one Newton step on the fast reciprocal root: right to the last bit but for rare ties, at a
    # third of the instructions of sqrt_rn. u = 1 gives 0, whose reciprocal root is infinite.
    reciprocal = tl.rsqrt(square)
    root = square * reciprocal
    root = tl.fma(tl.fma(-root, root, square), 0.5 * reciprocal, root)
    radius = tl.where(square > 0.0, root, 0.0)
    angle = (x1 >> 8).to(tl.int32, bitcast=True)
    quadrant = (angle + 2097152) >> 22
    t = (angle - (quadrant << 22)).to(tl.float32) * 2.0**-22
    t2 = t * t
    s = tl.fma(t2, -0.004604833, 0.07968141)
    s = tl.fma(s, t2, -0.6459636)
    s = tl.fma(s, t2, -4.371139e-08)
    s = tl.fma(t, 1.5707964, t * s)
    c = tl.fma(t2, 0.00090402155, -0.020860288)
    c = tl.fma(c, t2, 0.25366923)
    near = tl.fma(t2, -1.2337005, 1.0)
    lost = tl.fma(t2, -1.2337005, 1.0 - near)
    c = near + tl.fma(c * t2, t2, lost)
    swapped = (quadrant & 1) == 1
    cosine = tl.where(swapped, s, c).to(tl.uint32, bitcast=True)
    sine = tl.where(swapped, c, s).to(tl.uint32, bitcast=True)
    cosine = cosine ^ (((quadrant + 1) & 2) << 30).to(tl.uint32, bitcast=True)
    sine = sine ^ ((quadrant & 2) << 30).to(tl.uint32, bitcast=True)
    return radius * cosine.to(tl.float32, bitcast=True), radius * sine.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["inner", "seed_low", "seed_high", "offset"])
def inject_noise_kernel(
    y_ptr, sigma_ptr, z_ptr, numel, inner, sigma_data, seed_low, seed_high, offset,
    SCALED: tl.constexpr, MODE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS groups of four consecutive elements. inner: what shares a noise level, in programs,
    groups or elements as MODE says. Address arithmetic is 64-bit in the scalar part, 32-bit within the
    program.
    """
    program = tl.program_id(0)
    first_group = program.to(tl.int64) * GROUPS
    group = tl.arange(0, GROUPS)
    # A program's first group is a multiple of GROUPS, a power of two, so the low word never carries within
    # it.
    low = (first_group & 0xFFFFFFFF).to(tl.uint32) + group.to(tl.uint32)
    high = (first_group >> 32).to(tl.uint32)
    key0, key1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    x0, x1, x2, x3 = philox4x32(low, high, offset.to(tl.uint32), high * 0, key0, key1)
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    eps = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(4 * GROUPS)

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


def _signed(word):
    """A 32-bit word as a signed int: Triton types an int argument by its value, and one type means one
    compilation."""
    return word - 2**32 if word >= 2**31 else word


def launch(y, sigma, z, sigma_data, seed, offset):
    """Fill z. y, sigma, z: contiguous, on one device; sigma in y's compute dtype."""
    numel = y.numel()
    if numel == 0:
        return
    mode, inner = mode_of(numel, sigma.numel())
    words = _signed(seed & 0xFFFFFFFF), _signed(seed >> 32), _signed(offset)
    inject_noise_kernel[(triton.cdiv(numel, 4 * GROUPS),)](
        y, sigma, z, numel, inner, float(sigma_data or 0.0), *words,
        SCALED=sigma_data is not None, MODE=mode, GROUPS=GROUPS,
    )  # fmt: skip
