"""Philox4x32-10 and Box-Muller by element index, in Triton. Definition and addressing: dbkernels/philox.py; the
arithmetic is that of csrc/philox.h.

Address arithmetic is 64-bit in the scalar part, 32-bit within a program: a program's first group is a multiple of
GROUPS, a power of two, so the low word of its group numbers never carries within it.
"""

import triton
import triton.language as tl


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


@triton.jit
def words_of_groups(first_group, seed_low, seed_high, offset, STREAM: tl.constexpr, GROUPS: tl.constexpr):
    """The four words of each of GROUPS groups from `first_group` (int64) on."""
    low = (first_group & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, GROUPS)
    high = (first_group >> 32).to(tl.uint32)
    key0, key1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    return philox4x32(low, high, offset.to(tl.uint32), high * 0 + STREAM, key0, key1)


@triton.jit
def in_element_order(a0, a1, a2, a3, GROUPS: tl.constexpr):
    """The four values of each group as one block of 4·GROUPS."""
    return tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(4 * GROUPS)


@triton.jit
def normals_of_groups(first_group, seed_low, seed_high, offset, GROUPS: tl.constexpr):
    """Standard normals of GROUPS groups, in element order, float32."""
    x0, x1, x2, x3 = words_of_groups(first_group, seed_low, seed_high, offset, 0, GROUPS)
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return in_element_order(n0, n1, n2, n3, GROUPS)


@triton.jit
def uniforms_of_groups(first_group, seed_low, seed_high, offset, GROUPS: tl.constexpr):
    """Uniforms in (0, 1) of GROUPS groups, in element order, float32."""
    x0, x1, x2, x3 = words_of_groups(first_group, seed_low, seed_high, offset, 1, GROUPS)
    word = in_element_order(x0, x1, x2, x3, GROUPS)
    return ((word >> 9).to(tl.float32) + 0.5) * 2.0**-23


def _signed(word):
    """A 32-bit word as a signed int: Triton types an int argument by its value, and one type means one
    compilation."""
    return word - 2**32 if word >= 2**31 else word


def address_words(seed, offset):
    """(seed, offset), the seed signed or not, as the three words a kernel takes."""
    seed %= 2**64
    return _signed(seed & 0xFFFFFFFF), _signed(seed >> 32), _signed(offset)
