"""Philox4x32 and Box-Muller by element index, in Triton. Definition and addressing: dbkernels/philox.py; the results
are those of csrc/philox.h.

Instructions limit the drawing of noise, so factors that are powers of two are moved into the polynomials' coefficients
(which changes no bit), and quadrants are read from the word itself.

Address arithmetic is 64-bit in the scalar part, 32-bit within a program: a program's first group is a multiple of
GROUPS, a power of two, so the low word of its group numbers never carries within it.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 10):
    """Compute Philox4x32 of ROUNDS rounds on uint32 words."""
    for _ in tl.static_range(ROUNDS):
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
    """Return -2·ln u for u = 2^e·(1 + f) in [2^-33, 1]: csrc/philox.h's polynomial in g = -2·f, plus -2·e·ln 2."""
    bits = u.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & 0xFF800000  # e, in the exponent bits of a float
    g = tl.fma((bits - exponent).to(tl.float32, bitcast=True), -2.0, 2.0)
    q = tl.fma(g, 0.076342255 * 2.0**-9, 0.12761468 * 2.0**-8)
    q = tl.fma(q, g, 0.13160233 * 2.0**-7)
    q = tl.fma(q, g, 0.14201777 * 2.0**-6)
    q = tl.fma(q, g, 0.16623354 * 2.0**-5)
    q = tl.fma(q, g, 0.20001227 * 2.0**-4)
    q = tl.fma(q, g, 0.25000823 * 2.0**-3)
    q = tl.fma(q, g, 0.3333333 * 2.0**-2)
    q = tl.fma(q, g, 0.25)
    e = exponent.to(tl.int32, bitcast=True).to(tl.float32)  # 2^23·e, exactly
    whole = e * (-0.693359375 * 2.0**-22)
    total = whole + g
    lost = (whole - total) + g
    return total + tl.fma(g * g, q, tl.fma(e, 2.12194440e-4 * 2.0**-22, lost))


@triton.jit
def box_muller(x0, x1):
    """Return two normals from two words: see csrc/philox.h."""
    square = minus_two_log(tl.fma(x0.to(tl.float32), 2.0**-32, 2.0**-33))
    # The root by one Newton step on the fast reciprocal root: right to the last bit but for rare ties, at a third of
    # the instructions of sqrt_rn. u = 1 gives 0, whose reciprocal root is infinite; the next square is 1.2e-7.
    reciprocal = tl.rsqrt(tl.maximum(square, 1e-30))
    root = square * reciprocal
    radius = tl.fma(tl.fma(-root, root, square), 0.5 * reciprocal, root)
    # The quadrant, rounded, is in the upper two bits; what remains, plus a half turn, fills a float's fraction.
    turned = x1 + 0x20000000
    t = (((turned >> 7) & 0x7FFFFE) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
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
    swapped = (turned & 0x40000000) != 0
    cosine = tl.where(swapped, s, c).to(tl.uint32, bitcast=True) ^ ((turned + 0x40000000) & 0x80000000)
    sine = tl.where(swapped, c, s).to(tl.uint32, bitcast=True) ^ (turned & 0x80000000)
    return radius * cosine.to(tl.float32, bitcast=True), radius * sine.to(tl.float32, bitcast=True)


@triton.jit
def key_and_offset(seed_ptr, offset_ptr, seed_low, seed_high, offset, SEED_AT: tl.constexpr, OFFSET_AT: tl.constexpr):
    """Return the address as unsigned words, the key's two and the offset: from memory with SEED_AT or OFFSET_AT."""
    if SEED_AT:
        seed = tl.load(seed_ptr).to(tl.int64)
        key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    else:
        key0, key1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    if OFFSET_AT:
        word = tl.load(offset_ptr).to(tl.uint32)
    else:
        word = offset.to(tl.uint32)
    return key0, key1, word


@triton.jit
def in_element_order(a0, a1, a2, a3, GROUPS: tl.constexpr):
    """Return the four values of each group as one block of 4·GROUPS."""
    return tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(4 * GROUPS)


@triton.jit
def words_of_groups(
    first_group, key0, key1, offset, STREAM: tl.constexpr, GROUPS: tl.constexpr, ROUNDS: tl.constexpr = 10
):
    """Return the four words of each of GROUPS groups from `first_group` (int64) on."""
    low = (first_group & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, GROUPS)
    high = (first_group >> 32).to(tl.uint32)
    key0, key1 = key0.to(tl.uint32), key1.to(tl.uint32)
    return philox4x32(low, high, offset.to(tl.uint32), high * 0 + STREAM, key0, key1, ROUNDS)


@triton.jit
def normals_of_groups(first_group, key0, key1, offset, GROUPS: tl.constexpr, ROUNDS: tl.constexpr = 10):
    """Draw standard normals of GROUPS groups, in element order, float32."""
    x0, x1, x2, x3 = words_of_groups(first_group, key0, key1, offset, 0, GROUPS, ROUNDS)
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return in_element_order(n0, n1, n2, n3, GROUPS)


@triton.jit
def uniforms_of_groups(first_group, key0, key1, offset, GROUPS: tl.constexpr):
    """Draw uniforms in (0, 1) of GROUPS groups, in element order, float32."""
    x0, x1, x2, x3 = words_of_groups(first_group, key0, key1, offset, 1, GROUPS)
    word = in_element_order(x0, x1, x2, x3, GROUPS)
    return ((word >> 9).to(tl.float32) + 0.5) * 2.0**-23


def _signed(word):
    """Return a 32-bit word as a signed int: Triton types an int by its value, and one type means one compilation."""
    return word - 2**32 if word >= 2**31 else word


def address_words(seed, offset):
    """Return (seed, offset), the seed signed or not, as the three words a kernel takes."""
    seed %= 2**64
    return _signed(seed & 0xFFFFFFFF), _signed(seed >> 32), _signed(offset)


def address(seed, offset, dummy):
    """Return (seed, offset), each an int (the seed signed or not) or a 0-dim tensor, as a kernel takes them: two
    tensors (`dummy` for an int), three words, and the constants (SEED_AT, OFFSET_AT)."""
    seed_at, offset_at = isinstance(seed, torch.Tensor), isinstance(offset, torch.Tensor)
    tensors = seed if seed_at else dummy, offset if offset_at else dummy
    return tensors, address_words(0 if seed_at else seed, 0 if offset_at else offset), (seed_at, offset_at)
