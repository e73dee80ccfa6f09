"""Comparisons shared by the kernel tests."""

import os

import torch

EPSILON = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def thinned(cases):
    """Return every N-th of the cases that one test goes through, where pytest runs with `--thin N`."""
    return list(cases)[:: int(os.environ.get("THIN", "1"))]


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
