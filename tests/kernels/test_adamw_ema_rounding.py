"""adamw_ema_step on half types: float32 masters, and stochastic rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from dbkernels.philox import round_stochastically
from numerics import EPSILON
from test_adamw_ema import SETTINGS, SHAPES, copies, random_list, state_of

HALVES = [torch.float16, torch.bfloat16]
DECAY = [0.1] * len(SHAPES)


def flat(lists):
    return [tensor for tensors in lists if tensors for tensor in tensors]


def steps(lists, count=3, **options):
    """`count` steps with gradients of their own, in place; lists: params, exp_avgs, exp_avg_sqs, emas."""
    generator = torch.Generator().manual_seed(3)
    for step in range(1, count + 1):
        grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in lists[0]]
        dbkernels.adamw_ema_step(
            lists[0], grads, *lists[1:], step=step, max_norm=1.0, ema_decay=0.9, weight_decay=0.1, **SETTINGS, **options
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_masters_take_the_float32_step(dtype):
    """With gradients that float32 and the half type share, masters and moments are those of float32 parameters, bit for
    bit, and params are the masters rounded."""
    params = random_list(SHAPES, dtype)
    lists, masters = [params, *state_of(params)], [p.float() for p in params]
    twin = [[m.clone() for m in masters], *state_of(masters)]
    generator = torch.Generator().manual_seed(3)
    for step in (1, 2, 3):
        grads = [torch.randn(p.shape, generator=generator).to(dtype) for p in params]
        options = dict(step=step, max_norm=1.0, ema_decay=0.9, weight_decay=0.1, **SETTINGS)
        dbkernels.adamw_ema_step(lists[0], grads, *lists[1:], masters=masters, **options)
        dbkernels.adamw_ema_step(twin[0], [g.float() for g in grads], *twin[1:], **options)
    assert all(torch.equal(a, b) for a, b in zip(masters + flat(lists[1:]), flat(twin), strict=True))
    assert all(torch.equal(p, m.to(dtype)) for p, m in zip(params, masters, strict=True))


def test_masters_keep_what_rounding_would_lose():
    """Updates of a thousandth of a bfloat16 place: without masters nothing ever moves."""
    settings = dict(lr=1e-5, betas=(0.0, 0.0), eps=1e-8)
    moved = {}
    for kind in ("nearest", "masters", "stochastic"):
        params = [torch.ones(4096, dtype=torch.bfloat16)]
        moments, masters = state_of(params)[:2], [torch.ones(4096)] if kind == "masters" else None
        for step in range(1, 401):
            rounding = dict(stochastic_rounding=True, seed=5, offset=step) if kind == "stochastic" else {}
            grads = [torch.ones(4096, dtype=torch.bfloat16)]
            dbkernels.adamw_ema_step(params, grads, *moments, None, step=step, masters=masters, **settings, **rounding)
        moved[kind] = 1 - params[0].double().mean().item()
    # Exactly 400·1e-5 was asked for. Below 1 bfloat16's place is 2^-8: the master's rounding, and the chance's five
    # standard errors (each parameter's variance is at most the place times what it moved).
    assert moved["nearest"] == 0.0
    assert moved["masters"] == pytest.approx(4e-3, abs=2.0**-9)
    assert moved["stochastic"] == pytest.approx(4e-3, abs=5 * (2.0**-8 * 4e-3 / 4096) ** 0.5)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_stochastic_rounding_is_unbiased(seed):
    """The mean of many roundings is the value, within five standard errors, and only the two neighbours come up."""
    n = 100_000
    for value in (1.0, 1.0 + 2.0**-10, -3.14159, 1e-30, -1e-40, 65503.7, 0.0):
        wanted = torch.full((n,), value, dtype=torch.float32)
        drawn = round_stochastically(wanted, 0, seed=seed, offset=1).double()
        exact = wanted[0].double()
        low, high = drawn.min(), drawn.max()
        assert low <= exact <= high and set(drawn.unique().tolist()) <= {low.item(), high.item()}
        share = ((exact - low) / (high - low)).item() if high > low else 0.0
        error = (high - low).item() * (share * (1 - share) / n) ** 0.5
        assert abs(drawn.mean() - exact) <= 5 * error + 1e-15 * abs(exact)


def test_stochastic_rounding_of_values_that_bfloat16_holds_and_of_infinities():
    exact = torch.randn(1000).bfloat16()
    exact[:3] = torch.tensor([float("inf"), -float("inf"), 0.0])
    assert torch.equal(round_stochastically(exact.float(), 5, seed=1, offset=2), exact)
    assert round_stochastically(torch.tensor([float("nan")] * 9), 0, seed=1, offset=2).isnan().all()


def test_neighbouring_draws_are_unrelated():
    """Ups and downs of elements some places apart, and of the same element at other seeds and offsets."""
    n = 200_000
    half = torch.full((n,), 1.0 + 2.0**-8)  # up in half of the cases
    up = (round_stochastically(half, 0, seed=1, offset=0) > 1).double() * 2 - 1
    assert abs(up.mean()) < 5 / n**0.5
    for lag in (1, 2, 3, 4, 7, 8, 16):
        assert abs((up[:-lag] * up[lag:]).mean()) < 5 / n**0.5
    for seed, offset in ((2, 0), (1, 1), (1 + 2**32, 0)):
        other = (round_stochastically(half, 0, seed=seed, offset=offset) > 1).double() * 2 - 1
        assert abs((up * other).mean()) < 5 / n**0.5


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from(HALVES),
    kind=st.sampled_from(["masters", "stochastic"]),
    with_ema=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_shapes_agree_with_the_definition(shapes, dtype, kind, with_ema, seed):
    dtype = torch.bfloat16 if kind == "stochastic" else dtype
    params, grads = random_list(shapes, dtype), random_list(shapes, dtype)
    lists = [params, grads, *state_of(params), [p.float() for p in params]]
    twin = copies(lists)
    decay, stochastic = 0.9 if with_ema else None, kind == "stochastic"
    dbkernels.adamw_ema_step(
        *lists[:4], lists[4] if with_ema else None, step=1, weight_decay=0.1, max_norm=1.0, ema_decay=decay,
        masters=None if stochastic else lists[5], stochastic_rounding=stochastic, seed=seed if stochastic else None,
        offset=7, **SETTINGS,
    )  # fmt: skip
    dbkernels.adamw_ema_step_reference(
        *twin[:4], twin[4] if with_ema else [], 1, 1e-2, 0.9, 0.95, 1e-8, [0.1] * len(shapes), 1.0, decay,
        [] if stochastic else twin[5], stochastic, seed, 7,
    )  # fmt: skip
    for a, b in zip(flat(lists[2:]), flat(twin[2:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-2 * EPSILON[dtype] if a.numel() else 0)
    for a, b in zip(params, twin[0], strict=True):
        # Before rounding they differ by an ulp of float32 at most, which changes the rounding once in 2^13 or rarer.
        apart = (a.float() - b.float()).abs()
        assert (apart <= 2 * EPSILON[dtype] * b.float().abs()).all() and (apart > 0).sum() <= 1 + a.numel() // 500


def test_a_tensors_draws_depend_on_what_stands_before_it_in_the_list():
    """Two equal parameters of one list round differently; the same list repeats bit for bit."""
    results = []
    for _ in range(2):
        params = [torch.ones(1000, dtype=torch.bfloat16) for _ in range(2)]
        steps([params, *state_of(params)], 1, stochastic_rounding=True, seed=4)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(*results[0])


@pytest.mark.parametrize("options", [dict(stochastic_rounding=True, seed=2**63 + 1, offset=2), "masters"])
def test_repeats_bit_for_bit_whatever_the_threads(options):
    start = random_list([(300, 70), (5,), (20_000,)], torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = copies([start])[0]
            lists = [params, *state_of(params)]
            given = options if isinstance(options, dict) else dict(masters=[p.float() for p in params])
            steps(lists, **given)
            results.append(flat(lists))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("kind", ["masters", "stochastic"])
def test_skips_when_the_norm_is_not_finite(kind):
    params, grads = random_list(SHAPES, torch.bfloat16), random_list(SHAPES, torch.bfloat16)
    grads[4][2, 1, 1] = float("inf")
    lists, masters = [params, grads, *state_of(params)], [p.float() for p in params]
    before = copies([*lists, masters])
    options = dict(masters=masters) if kind == "masters" else dict(stochastic_rounding=True, seed=1)
    norm = dbkernels.adamw_ema_step(*lists, step=1, ema_decay=0.9, **options, **SETTINGS)
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(flat(before), flat([*lists, masters]), strict=True))


def test_strided_masters_are_updated():
    params = [torch.randn(6, 5).bfloat16()]
    masters = [params[0].float().t().contiguous().t()]
    before = masters[0].clone()
    steps([params, *state_of(params)], 1, masters=masters)
    assert not torch.equal(masters[0], before) and torch.equal(params[0], masters[0].bfloat16())


@pytest.mark.parametrize("kind", ["masters", "stochastic"])
def test_opcheck(kind):
    params, grads = random_list([(4, 3), (5,)], torch.bfloat16), random_list([(4, 3), (5,)], torch.bfloat16)
    masters = [p.float() for p in params] if kind == "masters" else []
    arguments = (params, grads, *state_of(params), 2, 1e-3, 0.9, 0.99, 1e-8, [0.1, 0.0], 1.0, 0.9, masters,
                 kind == "stochastic", 7, 1, None)  # fmt: skip
    torch.library.opcheck(torch.ops.dbkernels.adamw_ema_step.default, arguments)


@pytest.mark.kernels
def test_compiles_whole_and_once_over_changing_offsets(compile_counter):
    def step(params, grads, exp_avgs, exp_avg_sqs, offset):
        return dbkernels.adamw_ema_step(
            params, grads, exp_avgs, exp_avg_sqs, None, step=4, stochastic_rounding=True, seed=2**63, offset=offset,
            **SETTINGS,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=compile_counter)
    for offset in range(2, 6):
        params = random_list(SHAPES, torch.bfloat16)
        lists = [params, random_list(SHAPES, torch.bfloat16), *state_of(params)[:2]]
        twin = copies(lists)
        assert torch.equal(compiled(*lists, offset), step(*twin, offset))
        assert all(torch.equal(a, b) for a, b in zip(flat(lists), flat(twin), strict=True))
    assert compile_counter.frame_count <= 2


BF16, FP16 = [torch.ones(3, dtype=torch.bfloat16)], [torch.ones(3, dtype=torch.float16)]


@pytest.mark.parametrize(
    "changes,error,words",
    [
        (dict(masters=[torch.ones(3)], stochastic_rounding=True, seed=1), ValueError, "exclude each other"),
        (dict(masters=[torch.ones(3)], params=[torch.ones(3)], grads=[torch.ones(3)]), ValueError, "masters are for"),
        (dict(masters=[]), ValueError, "masters has 0 tensors"),
        (dict(masters=BF16), TypeError, r"masters\[0\] must be torch.float32"),
        (dict(masters=[torch.ones(4)]), ValueError, r"masters\[0\] has shape"),
        (dict(stochastic_rounding=True), ValueError, "seed and stochastic_rounding"),
        (dict(seed=1), ValueError, "seed and stochastic_rounding"),
        (dict(stochastic_rounding=True, seed=-1), ValueError, "seed=-1"),
        (dict(stochastic_rounding=True, seed=1, offset=2**32), ValueError, "offset="),
        (dict(stochastic_rounding=True, seed=1, params=FP16, grads=FP16), ValueError, "rounding is for bfloat16"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, error, words):
    one = [torch.ones(3)]
    given = dict(params=BF16, grads=BF16, exp_avgs=one, exp_avg_sqs=one, emas=None, step=1, lr=0.1)
    with pytest.raises(error, match=words):
        dbkernels.adamw_ema_step(**{**given, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["masters", "stochastic"])
def test_gpu_agrees_with_the_cpu(kind):
    shapes = [(1000, 333), (7,), (0,), *[(64, 9)] * 80]  # more tensors than one launch holds
    params, grads = random_list(shapes, torch.bfloat16), random_list(shapes, torch.bfloat16)
    lists = [params, grads, *state_of(params), [p.float() for p in params]]
    there = [[t.cuda() for t in tensors] for tensors in lists]
    stochastic = kind == "stochastic"
    for here in (lists, there):
        dbkernels.adamw_ema_step(
            *here[:5], step=2, weight_decay=0.1, max_norm=1.0, ema_decay=0.9, **SETTINGS,
            masters=None if stochastic else here[5], stochastic_rounding=stochastic, seed=3 if stochastic else None,
        )  # fmt: skip
    for a, b in zip(flat(lists[2:4] + lists[5:]), flat(there[2:4] + there[5:]), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-4)
    # Where a float32 value's last place made a parameter round the other way, its average takes a tenth of that.
    for a, b, p, q in zip(lists[4], there[4], params, there[0], strict=True):
        assert ((a - b.cpu()).abs() <= 1e-5 * a.abs() + 1e-4 + 0.11 * (p.float() - q.cpu().float()).abs()).all()
    apart = [(a.float() - b.cpu().float()).abs() for a, b in zip(params, there[0], strict=True)]
    assert sum((d > 0).sum().item() for d in apart) <= sum(d.numel() for d in apart) // 500
