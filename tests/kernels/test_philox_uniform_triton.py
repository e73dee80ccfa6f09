"""The Triton kernel of philox_uniform without a GPU: interpreted, and compiled ahead of time."""

import pytest

pytest.importorskip("triton")
import aot
from interpreter import run_interpreted

ADDRESS = ["*i64:16", "*i64:16", "i32", "i32", "i32"]


def test_interpreted():
    run_interpreted("interpreted_philox_uniform.py")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("numel", ["i32", "i64"])  # i64: past 2^31 elements
def test_compile_without_spills(arch, numel):
    """Shortest: a stub is shorter. Longest: ten Philox rounds are 60 instructions per group; a uniform is three, four
    times four per thread."""
    from dbkernels.triton.philox_uniform import GROUPS, philox_uniform_kernel

    constants = dict(SEED_AT=arch == 90, OFFSET_AT=arch == 90, GROUPS=GROUPS)
    uniform = aot.report(philox_uniform_kernel, ["*fp32:16", *ADDRESS, numel], constants, arch)
    assert uniform.spilled_bytes == 0 and 150 < uniform.instructions < 500, uniform.instructions
