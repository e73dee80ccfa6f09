"""EDM's arithmetic against the formulas of its table 1, written by hand in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionblocks.noise import edm

SIGMAS = [0.002, 0.01, 0.18, 0.5, 1.0, 3.7, 80.0]
# float32 has 24 bits; each scaling is at most five rounded operations.
FLOAT32 = 5 * 2.0**-24
FLOAT64 = 5 * 2.0**-53


def by_hand(sigma: float, s: float) -> dict[str, float]:
    total = sigma * sigma + s * s
    return {
        "c_skip": s * s / total,
        "c_out": sigma * s / math.sqrt(total),
        "c_in": 1 / math.sqrt(total),
        "c_noise": math.log(sigma) / 4,
    }


@pytest.mark.parametrize("s", [0.5, 1 / 8, 2.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bfloat16 levels must be widened before anything else: the exact level is the rounded one.
    [(torch.float64, FLOAT64), (torch.float32, FLOAT32), (torch.bfloat16, FLOAT32)],
)
def test_scalings_are_those_of_the_table(s, dtype, tolerance):
    sigma = torch.tensor(SIGMAS, dtype=dtype)
    got = edm.precondition(sigma, s)
    assert got.c_skip.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i, level in enumerate(sigma.double().tolist()):
        for name, want in by_hand(level, s).items():
            value = float(getattr(got, name)[i])
            assert value == pytest.approx(want, rel=tolerance, abs=tolerance if name == "c_noise" else 0), name


@given(sigma=st.floats(1e-3, 1e3), s=st.floats(0.05, 5))
def test_identities_that_make_the_network_see_unit_variances(sigma, s):
    c = edm.precondition(torch.tensor(sigma, dtype=torch.float64), s)
    # EDM's appendix B.6: unit input variance, unit target variance, and the least c_out.
    assert float(c.c_in**2 * (sigma**2 + s**2)) == pytest.approx(1, rel=1e-12)
    residual = (1 - c.c_skip) ** 2 * s**2 + c.c_skip**2 * sigma**2
    # 1 - c_skip loses digits to cancellation when sigma << s: (s / sigma)^2 roundings, 2.5e7 at these ranges.
    assert float(residual / c.c_out**2) == pytest.approx(1, rel=1e-8)
    w = edm.weight(torch.tensor(sigma, dtype=torch.float64), s)
    assert float(w * c.c_out**2) == pytest.approx(1, rel=1e-12)


def test_weight_is_the_tables():
    for sigma in SIGMAS:
        want = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        assert float(edm.weight(torch.tensor(sigma), 0.5)) == pytest.approx(want, rel=FLOAT32)
        assert float(edm.weight(torch.tensor(sigma).double(), 0.5)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("steps", [2, 3, 18, 50])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_levels_run_from_end_to_end(steps, rho):
    levels = edm.karras_sigmas(steps, 0.02, 50.0, rho)
    assert len(levels) == steps
    assert levels[0] == 50.0
    assert levels[-1] == pytest.approx(0.02, rel=1e-10)  # the root and its power undo each other, but for rounding
    assert all(a > b for a, b in itertools.pairwise(levels))
    roots = [s ** (1 / rho) for s in levels]
    gaps = [a - b for a, b in itertools.pairwise(roots)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-9)  # evenly spaced in sigma^(1/rho): equation 5


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
@pytest.mark.parametrize("rho", [0.01, 0.05, 0.1, 0.25, 0.5, 1e3, 1e6, 1e12, 1e15, 1e17, 1e300])
def test_karras_levels_fall_for_any_rho(rho, steps):
    levels = edm.karras_sigmas(steps, rho=rho)
    assert levels[0] == 80.0 and (steps == 1 or levels[-1] == 0.002) and len(levels) == steps
    assert all(a > b > 0 for a, b in itertools.pairwise(levels))
    if rho >= 1e6:  # evenly spaced logarithms, the limit
        want = [80 * (0.002 / 80) ** (t / max(1, steps - 1)) for t in range(steps)]
        assert levels == pytest.approx(want, rel=1e-4)


def test_levels_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="rho=1e-300 makes some of 5 noise levels equal"):
        edm.karras_sigmas(5, rho=1e-300)


def test_karras_levels_of_the_paper():
    # Equation 5 by hand for N = 4, rho = 7, the published range.
    want = [(80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)]
    assert edm.karras_sigmas(4) == pytest.approx(want, rel=1e-12)
    assert edm.karras_sigmas(1) == [80.0]


def test_expand_adds_trailing_axes_only():
    z = torch.zeros(2, 3, 4)
    assert edm.expand_as(torch.zeros(2), z).shape == (2, 1, 1)
    assert edm.expand_as(torch.zeros(2, 3), z).shape == (2, 3, 1)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *[(lambda s=s: edm.precondition(torch.ones(1), s), "sigma_data") for s in (0.0, -1.0, NAN, INF)],
        *[(lambda s=s: edm.weight(torch.ones(1), s), "sigma_data") for s in (0.0, NAN)],
        *[(lambda n=n: edm.karras_sigmas(n), "steps") for n in (0, -3)],
        *[(lambda r=r: edm.karras_sigmas(5, rho=r), "rho") for r in (0.0, -7.0, NAN, INF)],
        *[
            (lambda a=a, b=b: edm.karras_sigmas(5, a, b), "sigma_min")
            for a, b in ((0, 1), (-1, 1), (1, 1), (2, 1), (NAN, 1), (0.1, NAN), (0.1, INF))
        ],
        *[(lambda s=s: edm.check_sigma(torch.tensor([1.0, s])), "sigma") for s in (0.0, -1.0, NAN, INF)],
    ],
)
def test_bad_arguments_are_refused_by_name(call, name):
    with pytest.raises(ValueError, match=name):
        call()
