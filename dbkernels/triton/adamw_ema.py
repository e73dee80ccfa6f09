"""Clipping by the global norm, AdamW and EMA over a list of tensors in Triton.

Definition: dbkernels/_adamw_ema_definition.py. Three kernels: the squares of each chunk of the gradients
(dbkernels/triton/total_norm.py; left out if a norm is given); one program that adds them up, decides and works out the
step's factors; and the update, which reads those from device memory. Tensors are found in a table of addresses
(dbkernels/triton/adamw_ema_list.py), so that a list of any length is one launch.
"""

import triton
import triton.language as tl

from dbkernels.triton.philox import in_element_order, words_of_groups
from dbkernels.triton.total_norm import locate, root_of_sum

# Rows of the table after START and NUMEL, one number per tensor; GRAD is ADDRESS to the norm's kernel. GROUP: that of
# the random words of the tensor's first eight elements.
GRAD, DECAY, PARAM, EXP_AVG, EXP_AVG_SQ, EMA, MASTER, GROUP = (tl.constexpr(row) for row in range(2, 10))
# Places in the step's scratch memory: the results of `decide` for the update, then a factor per tensor.
(CLIP, APPLIED, MINUS_STEP_SIZE, ROOT, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, EPS, ONE_MINUS_EMA, SEED, OFFSET,
 FACTORS) = (tl.constexpr(place) for place in range(12))  # fmt: skip
# How a new parameter is stored: rounded to nearest; in its float32 master, and rounded from there; rounded up or down
# at random.
NEAREST, WITH_MASTER, STOCHASTIC = (tl.constexpr(way) for way in range(3))


@triton.jit
def power(base, exponent):
    """Return base^exponent by squaring, as dbkernels/_adamw_ema_definition.py has it."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def quotient(a, b):
    """Return a / b, rounded once: `/` of float32 isn't."""
    if a.dtype == tl.float32:
        result = tl.div_rn(a, b)
    else:
        result = a / b
    return result


@triton.jit
def root_of(a):
    """Return sqrt(a), rounded once."""
    if a.dtype == tl.float32:
        result = tl.sqrt_rn(a)
    else:
        result = tl.sqrt(a)
    return result


# Compiled without fusing products into sums: factors have the bits that Python's arithmetic gives them.
@triton.jit(do_not_specialize=["step", "seed", "offset", "chunks", "tensors"])
def decide_kernel(
    table_ptr, scratch_ptr, sums_ptr, norm_ptr, given_ptr, step_ptr, lr_ptr, ema_decay_ptr, seed_ptr, offset_ptr,
    step: tl.int64, lr: tl.float64, ema_decay: tl.float64, seed: tl.int64, offset: tl.int64,
    chunks, tensors, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, max_norm: tl.float64,
    STEP: tl.constexpr, LR: tl.constexpr, EMA_DECAY: tl.constexpr, SEEDED: tl.constexpr, MOVED: tl.constexpr,
    GIVEN: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the norm, whether to update, and the factors. One program. STEP, LR, EMA_DECAY, SEEDED, MOVED, GIVEN:
    whether step, lr, ema_decay, seed, offset and the norm are read from memory."""
    wide: tl.constexpr = norm_ptr.dtype.element_ty
    if GIVEN:
        norm = tl.load(given_ptr)
    else:
        norm = root_of_sum(sums_ptr, chunks, BLOCK).to(wide)
    tl.store(norm_ptr, norm)
    applied = tl.abs(norm) < float("inf")
    if STEP:
        step = tl.load(step_ptr)
        tl.store(step_ptr, step + applied.to(tl.int64))
    if LR:
        lr = tl.load(lr_ptr)
    if EMA_DECAY:
        ema_decay = tl.load(ema_decay_ptr)
    if SEEDED:
        seed = tl.load(seed_ptr)
    if MOVED:
        offset = tl.load(offset_ptr)
    clip = tl.full((), 1.0, wide)
    if CLIPPED:
        # 1e-6 and the roundings of torch.nn.utils.clip_grads_with_norm_: a reciprocal, then a product.
        inverse = quotient(tl.full((), 1.0, wide), norm + tl.full((), 1e-6, wide))
        clip = tl.minimum(clip, inverse * tl.full((), max_norm, wide))
    tl.store(scratch_ptr + CLIP, clip.to(tl.float64))
    tl.store(scratch_ptr + APPLIED, applied.to(tl.float64))
    tl.store(scratch_ptr + MINUS_STEP_SIZE, -(lr / (1.0 - power(beta1, step))))
    tl.store(scratch_ptr + ROOT, tl.sqrt(1.0 - power(beta2, step)))
    tl.store(scratch_ptr + ONE_MINUS_BETA1, 1.0 - beta1)
    tl.store(scratch_ptr + BETA2, beta2)
    tl.store(scratch_ptr + ONE_MINUS_BETA2, 1.0 - beta2)
    tl.store(scratch_ptr + EPS, eps)
    tl.store(scratch_ptr + ONE_MINUS_EMA, 1.0 - ema_decay)
    zero = tl.full((), 0, tl.int64)  # the interpreter takes an int argument for as narrow as its value is
    tl.store(scratch_ptr + SEED, (zero + seed).to(tl.float64, bitcast=True))
    tl.store(scratch_ptr + OFFSET, (zero + offset).to(tl.float64, bitcast=True))
    for at in range(0, tensors, BLOCK):
        look = at + tl.arange(0, BLOCK)
        decay = tl.load(table_ptr + DECAY * tensors + look, mask=look < tensors, other=0).to(tl.float64, bitcast=True)
        tl.store(scratch_ptr + FACTORS + look, 1.0 - lr * decay, mask=look < tensors)


@triton.jit
def words_at(scratch_ptr, group, STREAM: tl.constexpr, GROUPS: tl.constexpr):
    """Return the random words of GROUPS groups in element order; the draws: dbkernels/philox.py."""
    seed = tl.load(scratch_ptr + SEED).to(tl.int64, bitcast=True)
    offset = tl.load(scratch_ptr + OFFSET).to(tl.int64, bitcast=True)
    x0, x1, x2, x3 = words_of_groups(group, seed & 0xFFFFFFFF, seed >> 32, offset, STREAM, GROUPS)
    return in_element_order(x0, x1, x2, x3, GROUPS)


@triton.jit
def rounded_by(value, random):
    """Return float32 values rounded up or down to bfloat16, by 16 random bits each, as the bits of a float32."""
    bits = value.to(tl.uint32, bitcast=True)
    special = tl.where(value != value, 0x7FC00000, bits)
    finite = (bits & 0x7F800000) != 0x7F800000
    return (tl.where(finite, bits + random, special) >> 16) << 16


@triton.jit
def update_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, ema_ptr, master_ptr, left, group,
    scratch_ptr, factor, clip, minus_step_size, root, one_minus_beta1, beta2, one_minus_beta2, eps, one_minus_ema,
    AVERAGED: tl.constexpr, STORE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK elements, the first `left` of them unless WHOLE. The pointers: their first elements."""
    wide: tl.constexpr = ema_ptr.dtype.element_ty
    narrow: tl.constexpr = param_ptr.dtype.element_ty
    moment: tl.constexpr = exp_avg_ptr.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = (at < left) | WHOLE
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(wide) * clip
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0).to(wide)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0).to(wide)
    if STORE == WITH_MASTER:
        param = tl.load(master_ptr + at, mask=inside, other=0.0)
    else:
        param = tl.load(param_ptr + at, mask=inside, other=0.0).to(wide)
    if AVERAGED:
        ema = tl.load(ema_ptr + at, mask=inside, other=0.0)  # before any store, so that all loads are under way
    # Fused where torch's AdamW and lerp fuse.
    exp_avg = tl.fma(one_minus_beta1, grad - exp_avg, exp_avg)
    exp_avg_sq = tl.fma(one_minus_beta2 * grad, grad, exp_avg_sq * beta2)
    denominator = quotient(root_of(exp_avg_sq), root) + eps
    param = tl.fma(param, factor, quotient(minus_step_size * exp_avg, denominator))
    if moment == wide:
        tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    else:
        words = words_at(scratch_ptr, 2 * group, 3, BLOCK // 4)
        exp_avg_bits, exp_avg_sq_bits = rounded_by(exp_avg, words & 0xFFFF), rounded_by(exp_avg_sq, words >> 16)
        tl.store(exp_avg_ptr + at, (exp_avg_bits >> 16).to(tl.uint16).to(moment, bitcast=True), mask=inside)
        tl.store(exp_avg_sq_ptr + at, (exp_avg_sq_bits >> 16).to(tl.uint16).to(moment, bitcast=True), mask=inside)
    if STORE == WITH_MASTER:
        tl.store(master_ptr + at, param, mask=inside)
    if STORE == STOCHASTIC:
        words = words_at(scratch_ptr, group, 2, BLOCK // 8)
        bits = rounded_by(param, tl.join(words & 0xFFFF, words >> 16).reshape(BLOCK))
        tl.store(param_ptr + at, (bits >> 16).to(tl.uint16).to(narrow, bitcast=True), mask=inside)
        param = bits.to(tl.float32, bitcast=True)
    else:
        stored = param.to(narrow)
        tl.store(param_ptr + at, stored, mask=inside)
        if STORE == NEAREST:
            param = stored.to(wide)
    if AVERAGED:
        # The average is of the master, or of the parameter as stored: a half type's rounding is part of it.
        tl.store(ema_ptr + at, tl.fma(one_minus_ema, param - ema, ema), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def update_kernel(
    table_ptr, scratch_ptr, tensors,
    TYPE: tl.constexpr, WIDE: tl.constexpr, MOMENT: tl.constexpr, AVERAGED: tl.constexpr, STORE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a chunk if `decide` allows it, one chunk per program. Backwards: the gradients that the norm read last are
    still in the cache."""
    chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    tensor, first, count = locate(table_ptr, tensors, chunk, CHUNK)
    row = table_ptr + tensor
    param, grad = tl.load(row + PARAM * tensors), tl.load(row + GRAD * tensors)
    exp_avg, exp_avg_sq = tl.load(row + EXP_AVG * tensors), tl.load(row + EXP_AVG_SQ * tensors)
    ema, master = tl.load(row + EMA * tensors), tl.load(row + MASTER * tensors)
    every = param | grad | exp_avg | exp_avg_sq | ema
    if STORE == WITH_MASTER:
        every = every | master
    group = first // 8
    if STORE == STOCHASTIC or MOMENT != WIDE:
        group += tl.load(row + GROUP * tensors)

    factor = tl.load(scratch_ptr + FACTORS + tensor).to(WIDE)
    clip, root = tl.load(scratch_ptr + CLIP).to(WIDE), tl.load(scratch_ptr + ROOT).to(WIDE)
    minus_step_size = tl.load(scratch_ptr + MINUS_STEP_SIZE).to(WIDE)
    one_minus_beta1 = tl.load(scratch_ptr + ONE_MINUS_BETA1).to(WIDE)
    beta2, one_minus_beta2 = tl.load(scratch_ptr + BETA2).to(WIDE), tl.load(scratch_ptr + ONE_MINUS_BETA2).to(WIDE)
    eps, one_minus_ema = tl.load(scratch_ptr + EPS).to(WIDE), tl.load(scratch_ptr + ONE_MINUS_EMA).to(WIDE)
    count = tl.where(tl.load(scratch_ptr + APPLIED) == 1.0, count, 0)
    # Blocks in the middle of aligned tensors move 16 bytes at a time, by the hints in their loop; halves move 8, so
    # that four elements a thread suit all and nothing is exchanged through shared memory.
    narrow: tl.constexpr = 8 if TYPE.primitive_bitwidth == 16 else 16
    moment: tl.constexpr = 8 if MOMENT.primitive_bitwidth == 16 else 16
    whole = tl.where(every % 16 == 0, count // BLOCK * BLOCK, 0)
    for at in range(0, whole, BLOCK):
        update_block(
            tl.multiple_of(param.to(tl.pointer_type(TYPE)), narrow) + first + at,
            tl.multiple_of(grad.to(tl.pointer_type(TYPE)), narrow) + first + at,
            tl.multiple_of(exp_avg.to(tl.pointer_type(MOMENT)), moment) + first + at,
            tl.multiple_of(exp_avg_sq.to(tl.pointer_type(MOMENT)), moment) + first + at,
            tl.multiple_of(ema.to(tl.pointer_type(WIDE)), 16) + first + at,
            tl.multiple_of(master.to(tl.pointer_type(WIDE)), 16) + first + at,
            count - at, group + at // 8, scratch_ptr, factor, clip, minus_step_size, root, one_minus_beta1, beta2,
            one_minus_beta2, eps, one_minus_ema, AVERAGED, STORE, True, BLOCK,
        )  # fmt: skip
    for at in range(whole, count, BLOCK):
        update_block(
            param.to(tl.pointer_type(TYPE)) + first + at, grad.to(tl.pointer_type(TYPE)) + first + at,
            exp_avg.to(tl.pointer_type(MOMENT)) + first + at, exp_avg_sq.to(tl.pointer_type(MOMENT)) + first + at,
            ema.to(tl.pointer_type(WIDE)) + first + at, master.to(tl.pointer_type(WIDE)) + first + at,
            count - at, group + at // 8, scratch_ptr, factor, clip, minus_step_size, root, one_minus_beta1, beta2,
            one_minus_beta2, eps, one_minus_ema, AVERAGED, STORE, False, BLOCK,
        )  # fmt: skip
