"""The decode kernel without a GPU: interpreted, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")
from fake_gpu import run_faked
from interpreter import run_interpreted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def test_interpreted():
    run_interpreted("interpreted_two_stream_decode.py")


def test_launches_on_a_fake_gpu():
    run_faked("faked_two_stream_decode.py")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("stored", "D"), [("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp32", 128)])
def test_compiles_without_spills(stored, D, arch):
    import aot
    from dbkernels.triton.two_stream_attention import block_of, precision
    from dbkernels.triton.two_stream_decode import decode_kernel, layout

    for rows, lengths in ((1, "i64"), (64, "i32")):
        tall, columns, warps, stages = layout(rows, D, DTYPES[stored])
        signature = [f"*{stored}:16"] * 5 + [f"*{lengths}:16", "*fp32:16", "*fp32:16"] + ["i32:16"] * 12
        constants = dict(D=D, BLOCK_D=block_of(D), ROWS=tall, COLUMNS=columns, LENGTHS=True,
                         PRECISION=precision(DTYPES[stored]))  # fmt: skip
        report = aot.report(decode_kernel, [*signature, *["i32"] * 5, "fp32"], constants, arch, warps, stages)
        assert report.spilled_bytes == 0, (rows, report.spilled_bytes)
        assert report.instructions > 400
