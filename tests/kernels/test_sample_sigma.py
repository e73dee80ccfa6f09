"""sample_sigma: against the definition and scipy's truncated normal, edges, far tails, torch.library's checks, compile,
errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from dbkernels.sample_sigma import _packed
from numerics import ulps

# Ranges in the middle, across it, wide, one float32 step, and far out on both sides (to 18 and 35 standard deviations).
RANGES = [(0.3, 0.4), (0.002, 80.0), (0.002, 0.05), (5.0, 80.0), (0.5, 0.5 + 2.0**-24), (1e-10, 1e-9), (1e8, 1e9),
          (1e-19, 1e-18), (1e17, 1e18)]  # fmt: skip


def definition(block_range, shape, seed=3, offset=0, P_mean=-1.2, P_std=1.2):
    return dbkernels.sample_sigma_reference(block_range, shape, P_mean, P_std, seed, offset)


@pytest.mark.parametrize("block_range", RANGES)
def test_against_the_definition(block_range):
    sigma = dbkernels.sample_sigma(block_range, (3, 1001), seed=3, offset=1)
    expected = definition(block_range, (3, 1001), 3, 1)
    assert sigma.shape == (3, 1001) and sigma.dtype == torch.float32
    # Before their one rounding they are 1e-9 apart, so they differ only beside a tie.
    distance = ulps(sigma, expected)
    assert distance.max() <= 1 and (distance > 0).float().mean() < 0.005


@pytest.mark.parametrize("block_range", RANGES)
def test_against_scipy_at_the_same_uniforms(block_range):
    """The definition and the kernel by scipy's own inverse of the truncated normal; 1e-7 is float32's rounding."""
    from scipy import stats  # a second to import: not at collection

    low, high = block_range
    u = dbkernels.philox_uniform(500, seed=5).double().numpy()
    a, b = (math.log(low) + 1.2) / 1.2, (math.log(high) + 1.2) / 1.2
    exact = torch.from_numpy(stats.truncnorm.ppf(u, a, b, loc=-1.2, scale=1.2)).exp()
    torch.testing.assert_close(dbkernels.sample_sigma(block_range, 500, seed=5).double(), exact, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(definition(block_range, (500,), 5).double(), exact, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("block_range,P_mean,P_std", [((0.002, 80.0), -1.2, 1.2), ((0.2, 0.5), -1.2, 1.2),
                                                      ((0.002, 0.01), -1.2, 1.2), ((1.0, 3.0), -6.0, 0.4)])  # fmt: skip
def test_kolmogorov_smirnov(block_range, P_mean, P_std):
    """The largest gap to scipy's distribution; 1.95/sqrt(n) is its 99.9 % point."""
    from scipy import stats

    n = 100_000
    a, b = ((math.log(sigma) - P_mean) / P_std for sigma in block_range)
    sigma = dbkernels.sample_sigma(block_range, n, P_mean=P_mean, P_std=P_std, seed=8).double()
    gap = stats.ks_1samp(sigma.log().numpy(), stats.truncnorm(a, b, loc=P_mean, scale=P_std).cdf).statistic
    assert gap < 1.95 / math.sqrt(n)


@given(
    ends=st.tuples(st.floats(1e-6, 1e4), st.floats(1e-6, 1e4)).filter(lambda e: e[0] < e[1] * (1 - 1e-6)),
    P_mean=st.floats(-3, 3),
    P_std=st.floats(0.5, 100.0),
    seed=st.integers(0, 2**64 - 1),
    shape=st.lists(st.integers(0, 20), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_any_range_stays_inside_and_agrees(ends, P_mean, P_std, seed, shape):
    sigma = dbkernels.sample_sigma(ends, shape, P_mean=P_mean, P_std=P_std, seed=seed)
    expected = definition(ends, shape, seed, 0, P_mean, P_std)
    assert sigma.shape == tuple(shape)
    assert ((sigma.double() >= ends[0]) & (sigma.double() <= ends[1])).all()  # the float64 ends, not their roundings
    # 1.3e-10·P_std in ln sigma is below a fifth of a unit, so one rounding apart at most.
    assert (ulps(sigma, expected) <= 1).all()


def test_ends_are_rounded_inwards():
    """float32(0.1) is above 0.1 and float32(0.3) above 0.3: only the first may be drawn."""
    sigma = dbkernels.sample_sigma((0.1, 0.3), 50_000, P_std=1e-3, P_mean=math.log(0.3) + 2e-3, seed=1)
    assert sigma.max().item() == torch.tensor(0.3).nextafter(torch.tensor(0.0)).item()
    sigma = dbkernels.sample_sigma((0.1, 0.3), 50_000, P_std=1e-3, P_mean=math.log(0.1) - 2e-3, seed=1)
    assert sigma.min().item() == torch.tensor(0.1).item()


def test_rises_with_the_uniform_and_is_a_prefix_of_longer_draws():
    sigma = dbkernels.sample_sigma((0.002, 80.0), 5000, seed=2, offset=9)
    order = dbkernels.philox_uniform(5000, seed=2, offset=9).argsort()
    assert (sigma[order].diff() >= 0).all()
    assert torch.equal(dbkernels.sample_sigma((0.002, 80.0), 77, seed=2, offset=9), sigma[:77])


def test_repeats_bit_for_bit_whatever_the_threads():
    threads, draws = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            draws.append(dbkernels.sample_sigma((0.1, 9.0), 20_001, seed=4))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(draw, draws[0]) for draw in draws)


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 63, 64, 65, 129])
def test_every_element_is_written_and_no_other(numel):
    out = torch.full((numel + 8,), float("nan"))
    torch.ops.dbkernels.sample_sigma(out[:numel], _packed(0.1, 9.0, -1.2, 1.2), 4, 0)
    assert torch.isfinite(out[:numel]).all() and torch.isnan(out[numel:]).all()


def test_opcheck():
    plan = _packed(0.1, 9.0, -1.2, 1.2)
    torch.library.opcheck(torch.ops.dbkernels.sample_sigma.default, (torch.empty(3, 4), plan, 7, 1))
    density = torch.tensor([0.1, 9.0, -1.2, 1.2], dtype=torch.float64)
    torch.library.opcheck(torch.ops.dbkernels.sample_sigma_plan.default, (density,))


def test_compiles_whole_and_once_over_changing_ranges(compile_counter):
    def draw(low, high, P_mean, P_std, step):
        return dbkernels.sample_sigma((low, high), (5,), P_mean=P_mean, P_std=P_std, seed=2**63 + 1, offset=step) * 2

    compiled = torch.compile(draw, fullgraph=True, backend=compile_counter)
    for step in range(2, 8):
        given = (0.01 * step, 0.5 * step, -1.0 - 0.1 * step, 1.0 + 0.1 * step, step)
        assert torch.equal(compiled(*given), draw(*given))
    assert compile_counter.frame_count <= 2  # once with the first numbers as constants, once with them as variables
    with pytest.raises(ValueError, match="block_range"):
        compiled(3.0, 2.0, -1.2, 1.2, 3)


def test_meta():
    sigma = dbkernels.sample_sigma((0.1, 0.2), (5, 6), seed=1, device="meta")
    assert sigma.shape == (5, 6) and sigma.device.type == "meta"


@pytest.mark.parametrize(
    "changes,error,words",
    [
        (dict(block_range=(2.0, 1.0)), ValueError, r"block_range=\(2.0, 1.0\) must rise"),
        (dict(block_range=(1.0, 1.0)), ValueError, "must rise"),
        (dict(block_range=(0.0, 1.0)), ValueError, "must rise"),
        (dict(block_range=(1.0, math.inf)), ValueError, "must rise"),
        (dict(block_range=(math.nan, 1.0)), ValueError, "must rise"),
        (dict(block_range=(0.1, 0.1 + 1e-12)), ValueError, "holds no float32 number"),
        (dict(block_range=(1e25, 1e26)), ValueError, "no mass"),
        (dict(block_range=(1e-26, 1e-25)), ValueError, "no mass"),
        (dict(P_std=1e13), ValueError, "no mass"),
        (dict(P_std=0.0), ValueError, "P_std=0.0"),
        (dict(P_mean=math.nan), ValueError, "P_mean=nan"),
        (dict(P_mean="0"), TypeError, "P_mean must be a float"),
        (dict(block_range=(torch.tensor(0.1), 1.0)), TypeError, "sigma_low must be a float"),
        (dict(shape=(2, -1)), ValueError, "shape"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(offset=2**32), ValueError, "offset"),
    ],
)
def test_errors_name_the_argument(changes, error, words):
    arguments = {"block_range": (0.5, 1.0), "shape": (3,), "seed": 0, **changes}
    with pytest.raises(error, match=words):
        dbkernels.sample_sigma(arguments.pop("block_range"), arguments.pop("shape"), **arguments)


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("block_range", RANGES)
def test_gpu_agrees_without_a_host_sync(block_range):
    dbkernels.sample_sigma(block_range, 10, seed=3, device="cuda")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sigma = dbkernels.sample_sigma(block_range, 100_003, seed=2**63 + 3, offset=1, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    distance = ulps(sigma.cpu(), definition(block_range, (100_003,), 2**63 + 3, 1))
    assert distance.max() <= 1 and (distance > 0).float().mean() < 0.005
