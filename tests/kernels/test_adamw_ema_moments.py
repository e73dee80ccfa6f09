"""adamw_ema_step with bfloat16 moments: the definition's bits, in the mean those of float64, and what they share with
float32 moments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from dbkernels.philox import round_moments, round_stochastically
from numerics import EPSILON
from test_adamw_ema import SETTINGS, SHAPES, copies
from test_adamw_ema_numbers import numbers

BF16 = torch.bfloat16
KINDS = [("nearest", torch.float32), ("nearest", torch.float16), ("nearest", BF16), ("masters", torch.float16),
         ("masters", BF16), ("stochastic", BF16)]  # fmt: skip


def flat(lists):
    return [tensor for tensors in lists for tensor in tensors]


def equal(lists, others):
    return all(torch.equal(a, b) for a, b in zip(flat(lists), flat(others), strict=True))


def lists_of(kind, dtype, shapes=SHAPES, values=lambda shape: torch.randn(shape)):
    """params, grads, exp_avgs, exp_avg_sqs, emas, masters"""
    params, grads = ([values(shape).to(dtype) for shape in shapes] for _ in range(2))
    moments = [[values(shape).abs().to(BF16) for shape in shapes] for _ in range(2)]
    return [
        params,
        grads,
        *moments,
        *([p.to(torch.float32, copy=True) for p in params] for _ in range(2 if kind == "masters" else 1)),
    ]


def run(lists, kind, function=dbkernels.adamw_ema_step, *, averaged=True, **given):
    """One step; lists as lists_of gives them."""
    emas, decay, masters = lists[4] if averaged else None, 0.875 if averaged else None, [*lists[5:], None][0]
    given = dict(step=3, lr=2.0**-7, max_norm=None, seed=2**63 + 5, offset=7) | given
    if function is dbkernels.adamw_ema_step:
        given |= dict(betas=(0.875, 0.9375), eps=2.0**-27, weight_decay=0.1, ema_decay=decay, masters=masters)
        return function(*lists[:4], emas, stochastic_rounding=kind == "stochastic", **given)
    step, lr, max_norm, seed, offset = given.values()
    return function(
        *lists[:4], emas or [], step, lr, 0.875, 0.9375, 2.0**-27, [0.1] * len(lists[0]), max_norm, decay,
        masters or [], kind == "stochastic", seed - 2**64 if seed >= 2**63 else seed, offset,
    )  # fmt: skip


def few_digits(shape):
    """Values whose moments float32 computes without rounding."""
    return torch.randint(0, 128, shape) / 64


@pytest.mark.parametrize("kind,dtype", KINDS)
def test_moments_have_the_definitions_bits(kind, dtype):
    lists = lists_of(kind, dtype, [(5,), (0,), (8195,), (3, 17)], few_digits)
    twin, before = copies(lists), copies(lists)
    run(lists, kind)
    run(twin, kind, dbkernels.adamw_ema_step_reference)
    assert equal(lists[2:4], twin[2:4])
    for i, weight in ((2, 0.125), (3, 0.0625)):
        moved = zip(before[i], lists[1], strict=True)
        exact = torch.cat([m.float().lerp(g.float() ** (i - 1), weight).flatten() for m, g in moved])
        ours = torch.cat([m.float().flatten() for m in lists[i]])
        assert ((ours - exact).abs() <= 2.0**-7 * exact).all() and 0.2 < (ours > exact).float().mean() < 0.6


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    kind=st.sampled_from(KINDS),
    averaged=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_shapes_agree_with_the_definition(shapes, kind, averaged, seed):
    kind, dtype = kind
    lists = lists_of(kind, dtype, shapes)
    twin = copies(lists)
    for function, each in ((dbkernels.adamw_ema_step, lists), (dbkernels.adamw_ema_step_reference, twin)):
        norm = run(each, kind, function, max_norm=1.0, averaged=averaged, seed=seed)
        assert norm.dtype == torch.float32
    for i, (ours, theirs) in enumerate(zip(lists, twin, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            # A last place of float32 changes a rounding once in 2^13, or rarer.
            apart, rounding = (a.double() - b.double()).abs(), 2 * EPSILON[a.dtype] * b.double().abs()
            assert (apart <= rounding + 1e-2 * EPSILON[dtype] + 1e-6).all(), i
            assert a.dtype == torch.float32 or (apart > 0).sum() <= 1 + a.numel() // 500, i


@pytest.mark.parametrize("kind,dtype", KINDS)
def test_an_update_takes_moments_before_they_are_rounded(kind, dtype):
    """Params, averages and masters are those of the float32 moments of the same values, bit for bit."""
    lists = lists_of(kind, dtype)
    wide = copies(lists)
    wide[2:4] = [[m.float() for m in moments] for moments in wide[2:4]]
    run(lists, kind)
    run(wide, kind, **({} if kind == "stochastic" else {"seed": None}))
    assert equal([lists[0], *lists[4:]], [wide[0], *wide[4:]]) and not equal(lists[2:3], wide[2:3])


def test_stored_moments_are_unbiased():
    """After 1,500 steps the mean over elements and seeds is the float64 recursion's, within five standard errors; a
    second moment rounded to nearest stops where a step is half a place."""
    count, steps, (beta1, beta2) = 2048, 1500, (0.9, 0.999)
    gradients = 1 + torch.rand(steps, generator=torch.Generator().manual_seed(1)).double()
    gradients = gradients.float().double()
    exact, drawn = [0.0, 0.0], []
    for g in gradients.tolist():
        exact = [beta1 * exact[0] + (1 - beta1) * g, beta2 * exact[1] + (1 - beta2) * g * g]
    for seed in (0, 1):
        params, moments = [torch.zeros(count)], [[torch.zeros(count, dtype=BF16)] for _ in range(2)]
        for step, g in enumerate(gradients.tolist(), 1):
            grads = [torch.full((count,), g)]
            dbkernels.adamw_ema_step(params, grads, *moments, None, step=step, lr=1e-3, seed=seed, offset=step)
        drawn.append(torch.stack([m[0].double() for m in moments]))
    for values, wanted, noise in zip(torch.cat(drawn, dim=1), exact, (0.01, 0.04), strict=True):
        assert abs(values.mean() - wanted) < 5 * values.std() / len(values) ** 0.5
        assert 0.2 * noise < values.std() / wanted < noise
    stuck = torch.zeros((), dtype=BF16)
    for g in gradients.tolist():
        stuck = (stuck.double() * beta2 + (1 - beta2) * g * g).to(BF16)
    assert stuck == 1 < 0.6 * exact[1]


def test_a_moments_bits_are_its_own():
    """Ups and downs of both moments, of the parameter, and of neighbours are unrelated."""
    n = 200_000
    half = torch.full((n,), 1.0 + 2.0**-8)  # up in half of the cases
    drawn = [*round_moments(half, half, 3, seed=1, offset=2), round_stochastically(half, 3, seed=1, offset=2)]
    drawn += round_moments(half, half, 3, seed=1, offset=3) + round_moments(half, half, 3, seed=2, offset=2)
    up = [(value > 1).double() * 2 - 1 for value in drawn]
    for i, ours in enumerate(up):
        assert abs(ours.mean()) < 5 / n**0.5
        assert all(abs((ours * other).mean()) < 5 / n**0.5 for other in up[:i])
        assert all(abs((ours[lag:] * ours[:-lag]).mean()) < 5 / n**0.5 for lag in (1, 2, 3, 4, 8, 16))


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("kind,dtype", KINDS)
def test_tensors_give_the_bits_of_numbers(kind, dtype, step):
    plain, tensors = numbers(step)
    for each in (plain, tensors):
        del each["ema_decay"]
    lists = lists_of(kind, dtype)
    twin = copies(lists)
    assert torch.equal(run(lists, kind, **plain), run(twin, kind, **tensors)) and equal(lists, twin)
    assert tensors["step"] == step + 1


def test_repeats_bit_for_bit_whatever_the_threads():
    start = lists_of("masters", BF16, [(300, 70), (5,), (20_000,)])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(copies(start))
            run(results[-1], "masters", max_norm=1.0)
    finally:
        torch.set_num_threads(threads)
    assert all(equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("function", [dbkernels.adamw_ema_step, dbkernels.adamw_ema_step_reference])
@pytest.mark.parametrize("kind,dtype", KINDS)
def test_skips_when_the_norm_is_not_finite(kind, dtype, function):
    lists = lists_of(kind, dtype)
    lists[1][4][2, 1, 1] = float("inf")
    before, step = copies(lists), torch.tensor(2)
    assert not torch.isfinite(run(lists, kind, function, step=step))
    assert equal(lists, before) and step == 2


def test_strided_moments_are_updated():
    lists = lists_of("nearest", torch.float32, [(6, 5)])
    twin = copies(lists)
    twin[2:4] = [[m.t().contiguous().t() for m in moments] for moments in twin[2:4]]
    for each in (lists, twin):
        run(each, "nearest")
    assert equal(lists, twin) and not twin[2][0].is_contiguous()


def test_opcheck():
    lists = lists_of("masters", BF16, [(4, 3), (5,)])
    arguments = (*lists[:5], 2, 1e-3, 0.9, 0.99, 1e-8, [0.1, 0.0], 1.0, 0.9, lists[5], False, 7, 1, None)
    torch.library.opcheck(torch.ops.dbkernels.adamw_ema_step.default, arguments)
    given = tuple(numbers(3)[1].values())
    torch.library.opcheck(torch.ops.dbkernels.adamw_ema_step.capturable, (*arguments, *given))


def test_compiles_whole_and_once_over_changing_offsets(compile_counter):
    def step(params, grads, exp_avgs, exp_avg_sqs, offset):
        return dbkernels.adamw_ema_step(
            params, grads, exp_avgs, exp_avg_sqs, None, step=4, seed=2**63, offset=offset, **SETTINGS
        )

    compiled = torch.compile(step, fullgraph=True, backend=compile_counter)
    for offset in range(2, 6):
        lists = lists_of("nearest", torch.float32)[:4]
        twin = copies(lists)
        assert torch.equal(compiled(*lists, offset), step(*twin, offset)) and equal(lists, twin)
    assert compile_counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind,dtype", KINDS)
def test_gpu_has_the_definitions_bits(kind, dtype):
    shapes = [(1000, 333), (7,), (0,), *[(64, 9)] * 80]  # more tensors than one launch holds
    lists = lists_of(kind, dtype, shapes, few_digits)
    there = [[t.cuda() for t in tensors] for tensors in lists]
    for each in (lists, there):
        run(each, kind)
    assert equal(lists[2:4], [[t.cpu() for t in tensors] for tensors in there[2:4]])


@pytest.mark.gpu
def test_gpu_takes_tensors_in_random_places():
    """Random values, unaligned: both moments within one rounding, nearly all in the same place."""
    lists = [[torch.cat([t[:1].flatten()[:1], t.flatten()])[1:] for t in tensors]
             for tensors in lists_of("nearest", torch.float32, [(4099,), (70_001,)])]  # fmt: skip
    there = [[torch.cat([t.new_zeros(1), t]).cuda()[1:] for t in tensors] for tensors in lists]
    for each in (lists, there):
        run(each, "nearest", max_norm=1.0)
    for a, b in zip(flat(lists[2:4]), flat(there[2:4]), strict=True):
        assert ((a.float() - b.cpu().float()).abs() <= 2.0**-7 * a.float()).all()
        assert (a != b.cpu()).sum() <= 1 + a.numel() // 500
