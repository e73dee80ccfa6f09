"""Comparisons and choices of cases shared by the kernel tests."""

import itertools
import os

import torch

EPSILON = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def thinned(cases):
    """Return every N-th of the cases that one test goes through, where pytest runs with `--thin N`."""
    return list(cases)[:: int(os.environ.get("THIN", "1"))]


def pairs(*values):
    """Return cases of a product, few, such that every two values of different lists come together in one."""
    cases = list(itertools.product(*(range(len(each)) for each in values)))

    def of(case):
        return set(itertools.combinations(enumerate(case), 2))

    wanted, chosen = set().union(*map(of, cases)), []
    while wanted:
        chosen.append(max(cases, key=lambda case: len(wanted & of(case))))
        wanted -= of(chosen[-1])
    return [tuple(each[i] for each, i in zip(values, case, strict=True)) for case in chosen]


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Count the float32 numbers between a and b; -0 and 0 are one."""

    def rank(x):
        bits = x.contiguous().view(torch.int32).to(torch.int64)
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (rank(a) - rank(b)).abs()


def assert_as_good_as_eager(ours, eager, exact, dtype):
    """Check that the error against float64 is at most twice eager PyTorch's at the same dtype, plus a rounding band.

    The band is one unit in the last place of the largest value: where eager happens to round exactly, ours
    may not.
    """
    assert ours.dtype == dtype and eager.dtype == dtype
    ours_error = (ours.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    band = EPSILON[dtype] * exact.abs().max().item()
    assert ours_error <= 2 * eager_error + band, f"ours {ours_error}, eager {eager_error}, band {band}"
