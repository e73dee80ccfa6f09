"""The Triton kernels of inject_noise from a table without a GPU: interpreted, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")
from interpreter import run_interpreted

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def test_interpreted():
    run_interpreted("interpreted_inject_noise_table.py")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [64, 197, 4096])
@pytest.mark.parametrize("stored", DTYPES)
def test_compiles_without_spills(arch, width, stored):
    """What 16 elements a thread may cost (4 of float64, each six times as much): 60 instructions each for the noise,
    as in the dense kernel, and 35 for the rows; 130 where a row may begin anywhere, as each element is then loaded by
    itself. A stub is shorter than 400."""
    import aot
    from dbkernels.triton.inject_noise_table import inject_noise_table_kernel, tile_of

    wide = "fp64" if stored == "fp64" else "fp32"
    rows, groups = tile_of(width, DTYPES[stored])
    whole = "i32:16" if width % 16 == 0 else "i32"
    signature = ["*i64:16", f"*{stored}:16", f"*{wide}:16", f"*{stored}:16", "i32", "i32", whole, "i32", "fp64",
                 "i32", "i32", "i32"]  # fmt: skip
    constants = {"NORMALIZE": True, "SCALED": True, "ALIGNED": width % 4 == 0, "ROWS": rows, "GROUPS": groups}
    built = aot.report(inject_noise_table_kernel, signature, constants, arch)
    assert built.spilled_bytes == 0
    longest = (95 if width % 16 == 0 else 190) * 16 * (1.5 if stored == "fp64" else 1)
    assert 400 < built.instructions <= longest, built.instructions


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("stored", DTYPES)
def test_the_gradients_sums_compile_without_spills(arch, stored):
    import aot
    from dbkernels.triton.inject_noise_table import SUM_COLUMNS, SUM_ROWS, row_sums_kernel

    wide = "fp64" if stored == "fp64" else "fp32"
    signature = [f"*{stored}:16", "*i64:16", "*i64:16", f"*{wide}:16", f"*{wide}:16", "i32:16", "i32", "i32", "fp64"]
    constants = {"SCALED": True, "ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS}
    built = aot.report(row_sums_kernel, signature, constants, arch)
    assert built.spilled_bytes == 0 and 100 < built.instructions < 1000, built.instructions
