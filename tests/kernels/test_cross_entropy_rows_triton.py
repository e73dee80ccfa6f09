"""The cross-entropy rows' kernel without a GPU: interpreted, and compiled ahead of time."""

import pytest

pytest.importorskip("triton")
from interpreter import run_interpreted


def test_interpreted():
    run_interpreted("interpreted_cross_entropy_rows.py")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("out", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("block", [256, 4096])
def test_compiles_without_spills(block, out, arch):
    import aot
    from dbkernels.triton.cross_entropy_rows import rows_kernel

    signature = ["*fp32:16", "*i64:16", "*fp32:16", "*fp32:16", f"*{out}:16", "i32:16", "i32:16", "i32"]
    built = aot.report(rows_kernel, signature, dict(GRADIENT=True, BLOCK=block), arch, 8)
    assert built.spilled_bytes == 0 and 150 < built.instructions < 4000, built.instructions
