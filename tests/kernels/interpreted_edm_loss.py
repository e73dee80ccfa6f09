"""Run by test_edm_loss_triton.py in a process with TRITON_INTERPRET=1: the kernels on the CPU, against the
definition."""

import itertools

import torch
import triton
import triton.language as tl

from dbkernels import edm_loss_reference, philox_normal
from dbkernels.philox import NORMAL_STREAM, box_muller, random_words
from dbkernels.triton import edm_loss
from dbkernels.triton.edm_loss import BLOCK, forward, grid_of, normals_from, scale
from dbkernels.triton.philox import address_words, key_and_offset
from numerics import EPSILON, thinned, ulps

torch.manual_seed(0)
SEED, OFFSET = 2**63 + 5, 2**32 - 1
S_HALF = (torch.rand(4) + 0.1).bfloat16()
# Each way to find a level (the row's, by groups of four, by element), and rows that are no multiple of four or of a
# program.
SHAPES = {
    "one level": ((3, 50), ()),
    "a level a row, two programs": ((2, BLOCK + 4), (2,)),
    "rows not of fours": ((3, 7, 3), (3,)),
    "a level a group": ((2, 3, 8), (2, 3)),
    "a level an element": ((2, 3, 5), (2, 3)),
    "long levels of tokens": ((2, 2, BLOCK), (2, 2)),
}


def poisoned(launch, *arguments):
    """What a kernel doesn't write shows: new memory holds NaN."""
    empty = torch.empty
    torch.empty = lambda *sizes, **options: empty(*sizes, **options).fill_(float("nan"))
    try:
        return launch(*arguments)
    finally:
        torch.empty = empty


def exactly(inputs, sigma, reduction, rounds=10, z_scaled=False):
    """Return the loss, and the gradients of its sum, in float64."""
    leaves = [None if t is None else t.double().requires_grad_() for t in inputs]
    loss = edm_loss_reference(*leaves, sigma.double(), 0.5, reduction, SEED, OFFSET, rounds, z_scaled=z_scaled)
    loss.sum().backward()
    return loss.detach(), [None if t is None else t.grad for t in leaves]


def assert_close(ours, exact, unit, case):
    error = (ours.double() - exact).abs()
    assert (error <= unit * (exact.abs() + exact.abs().max())).all(), (case, error.max())


def losses():
    """Float32 arithmetic over some 2000 terms, and float32 normals even in float64: 2^-18. The interpreter truncates
    where a GPU rounds to bfloat16: a whole unit."""
    cases = itertools.product(SHAPES.items(), ("read", "scaled", "drawn"), ("mean", "sum", "none", "sample"))
    for index, ((name, (shape, levels)), source, reduction) in thinned(enumerate(cases)):
        dtype = list(EPSILON)[(index + index // 4) % 4]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sigma = (torch.rand(levels) + 0.1).to(wide)
        F, y = torch.randn(2, *shape).to(dtype)
        z = None if source == "drawn" else y + sigma.view(*levels, *[1] * (y.dim() - len(levels))).to(dtype)
        wanted = (True, z is not None, True) if index % 5 else (False, False, False)
        # A power of two weighs the loss and the gradients, exactly; each way to hand over the address, the same bits.
        address = (torch.tensor(SEED - 2**64) if index % 2 else SEED), (torch.tensor(OFFSET) if index % 3 else OFFSET)
        rounds = 7 if index % 7 == 0 and z is None else 10
        scaled = source == "scaled"
        given = (F, z, y, sigma, 0.5, reduction, scaled, *address, rounds, 0.25, 2.0, *wanted)
        loss, *grads = poisoned(forward, *given)
        loss, grads = 4 * loss, [None if grad is None else 2 * grad for grad in grads]
        exact, exact_grads = exactly((F, z, y), sigma, reduction, rounds, scaled)
        case = (name, dtype, source, reduction)
        assert loss.dtype == wide and loss.shape == exact.shape, case
        assert_close(loss, exact, 2.0**-18, case)
        for grad, wish, expected in zip(grads, wanted, exact_grads, strict=True):
            if wish:
                assert_close(grad, expected, 2.0**-18 + (2.0**-7 if dtype == torch.bfloat16 else 0), case)
            else:
                assert grad is None, case


def mixed():
    """F in a half type, z and y in float32."""
    F, y, z = torch.randn(5, 6).bfloat16(), torch.randn(5, 6), torch.randn(5, 6)
    sigma = torch.rand(5) + 0.1
    loss, *grads = poisoned(forward, F, z, y, sigma, 0.5, "mean", False, 0, 0, 10, 1.0, 1.0, True, True, True)
    exact, exact_grads = exactly((F, z, y), sigma, "mean")
    assert_close(loss, exact, 2.0**-18, "mixed")
    for grad, like, expected in zip(grads, (F, z, y), exact_grads, strict=True):
        assert grad.dtype == like.dtype
        assert_close(grad, expected, 2.0**-7 if like is F else 2.0**-18, "mixed")


def numbers():
    """A level that is a number, a half type's levels, more samples than a partial sum each, a grid of many rows."""
    F, z, y = torch.randn(3, 4, 6)
    for sigma, reduction in ((0.3, "mean"), (0.3, "sample"), (torch.rand(4, 1) + 0.1, "none"), (S_HALF, "mean")):
        level = torch.full((), sigma) if isinstance(sigma, float) else sigma.squeeze(-1).float()
        rest = False, 0, 0, 10, 1.0, 1.0, True, False, False
        loss, grad, _, _ = poisoned(forward, F, z, y, sigma, 0.5, reduction, *rest)
        exact, exact_grads = exactly((F, z, y), level, reduction)
        assert_close(loss, exact, 2.0**-18, reduction)
        assert_close(grad, exact_grads[0], 2.0**-18, reduction)
    edm_loss.MOST_ROWS = 2  # a grid that counts its rows first
    edm_loss._plans.clear()
    again = forward(F, z, y, S_HALF, 0.5, "mean", *rest)
    edm_loss.MOST_ROWS = 65535
    edm_loss._plans.clear()
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[1])
    assert grid_of(65535, 3) == ((3, 65535), 1) and grid_of(65536, 3) == ((65536, 3), 0)


def kinds():
    """One input with z as it is and as a scaled one: another plan each, whichever came first."""
    F, z, y = torch.randn(3, 4, 6)
    edm_loss._plans.clear()
    for scaled in (False, True, False):
        loss, *_ = forward(F, z, y, 0.3, 0.5, "sum", scaled, 0, 0, 10, 1.0, 1.0, True, True, True)
        assert_close(loss, exactly((F, z, y), torch.tensor(0.3), "sum", z_scaled=scaled)[0], 2.0**-18, scaled)
    assert len(edm_loss._plans) == 2


def noise():
    """With F = y = 0 and hardly any noise, the gradient of F in a sum is 2·eps: inject_noise's eps, up to the 2 ulp
    that the interpreter's fma, which rounds twice, adds to each of the two kernels."""
    for shape in ((2, BLOCK), (3, 7)):
        zero = torch.zeros(shape)
        sigma = torch.full(shape[:1], 1e-30)
        rest = False, SEED, OFFSET, 10, 1.0, 1.0, True, False, False
        _, grad, _, _ = forward(zero, None, zero, sigma, 0.5, "sum", *rest)
        assert ulps(grad / 2, philox_normal(shape, seed=SEED, offset=OFFSET)).max() <= 4


@triton.jit
def far_kernel(out_ptr, first, seed_low, seed_high, offset, DRAW: tl.constexpr, BLOCK: tl.constexpr):
    first = first.to(tl.int64)
    key0, key1, word = key_and_offset(out_ptr, out_ptr, seed_low, seed_high, offset, False, False)
    tl.store(out_ptr + tl.arange(0, BLOCK), normals_from(first, key0, key1, word, DRAW, 10, BLOCK))


def far():
    """Elements across 2^34, where a group's number gets a second word."""
    for draw, first in ((1, 2**34 - 32), (2, 2**34 - 31)):
        out = torch.full((64,), float("nan"))
        far_kernel[(1,)](out, first, *address_words(SEED, OFFSET), DRAW=draw, BLOCK=64)
        groups = torch.arange(first // 4, (first + 64) // 4 + 1)
        x0, x1, x2, x3 = random_words(groups, SEED, OFFSET, NORMAL_STREAM)
        expected = torch.stack(box_muller(x0, x1) + box_muller(x2, x3), dim=-1).flatten()
        assert ulps(out, expected[first % 4 :][:64]).max() <= 4, draw


def scales():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for shape, factors in (
            ((3, BLOCK + 5), ()),
            ((3, BLOCK + 5), (3,)),
            ((4, 5), (4, 5)),
            ((1,), (1,)),
            ((0, 2), (0,)),
        ):
            x, by = torch.randn(shape).to(dtype), torch.randn(factors).to(wide)
            given = x.clone()
            if factors == (3,):
                by[1] = 1.0  # a row that is left alone
            expected = x.double() * by.double().view(*factors, *[1] * (x.dim() - len(factors)))
            before, twice = x.clone(), x.clone()
            scale(x, by)
            scale(twice, by / 3, 1 / 3)
            if x.numel():
                for ours in (x, twice):
                    assert_close(ours, expected, 3 * EPSILON[dtype], (dtype, shape, factors))
            # As expected, in one number that is expanded: not a bit changes, for all that 1/3 is rounded.
            third = torch.full((), 1 / 3, dtype=wide)
            scale(before, third.expand(factors), float(third))
            assert torch.equal(before, given), (dtype, shape, factors)


losses()
mixed()
numbers()
kinds()
noise()
far()
scales()
print("interpreted: ok")
