"""The two-stream kernels without a GPU: interpreted, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")
from interpreter import run_interpreted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUMBERS = ["i32"] * 5 + ["fp32"]
SHORTEST = 400  # a stub is shorter


def test_interpreted():
    run_interpreted("interpreted_two_stream_attention.py")


def built(kernel, pointers, strides, layout, arch, stored, D, **constants):
    """Compiled with all strides multiples of 16 elements, as in a model; no spills, no stub; products on the tensor
    cores where the dtype has them, by warp group on Hopper."""
    import aot
    from dbkernels.triton.two_stream_attention import block_of, precision

    rows, columns, warps, stages = layout
    constants |= dict(D=D, BLOCK_D=block_of(D), ROWS=rows, COLUMNS=columns, PRECISION=precision(DTYPES[stored]))
    signature = [*pointers, *["i32:16"] * strides, *NUMBERS]
    report = aot.report(kernel, signature, constants, arch, warps, stages)
    what = kernel.fn.__name__, stored, D, arch, constants
    assert report.spilled_bytes == 0, (*what, report.spilled_bytes)
    assert report.instructions > SHORTEST, (*what, report.instructions)
    return report


def pointers(stored, count, *rest):
    return [f"*{stored}:16"] * count + [f"*{kind}:16" for kind in rest]


# What is launched: the widths that models have, all types at one of them, and both kinds of group. Not float32 at 256,
# which spills whatever the tile.
WIDTHS = [("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 64), ("fp32", 128)]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("stored", "D"), WIDTHS)
def test_forward_compiles_without_spills(stored, D, arch):
    from dbkernels.triton.two_stream_attention import forward_kernel, forward_layout

    layout = forward_layout(D, DTYPES[stored], arch)
    for noisy, single, varlen in ((False, False, False), (True, True, False), (True, False, True)):
        report = built(forward_kernel, pointers(stored, 6, "fp32", "i32"), 18, layout, arch, stored, D, NOISY=noisy,
                       SINGLE=single, VARLEN=varlen)  # fmt: skip
        if stored != "fp32":
            assert ("HGMMA" if arch == 90 else "HMMA") in report.sass


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("stored", "D"), WIDTHS)
def test_the_queries_gradient_compiles_without_spills(stored, D, arch):
    from dbkernels.triton.two_stream_queries import layout, query_kernel

    given = [*pointers(stored, 6, "fp32", "fp32"), *pointers(stored, 1, "i32")]
    for noisy, single, varlen in ((False, False, False), (True, True, False), (True, False, True)):
        report = built(query_kernel, given, 21, layout(D, DTYPES[stored]), arch, stored, D, NOISY=noisy,
                       SINGLE=single, VARLEN=varlen)  # fmt: skip
        if stored != "fp32" and D <= 128:
            assert ("HGMMA" if arch == 90 else "HMMA") in report.sass


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("stored", "D"), WIDTHS)
def test_the_keys_gradients_compile_without_spills(stored, D, arch):
    from dbkernels.triton.two_stream_keys import clean_key_kernel, layout, noisy_key_kernel, own_layout

    tile = layout(D, DTYPES[stored], arch)
    both = [*pointers(stored, 6, "fp32", "fp32"), *pointers(stored, 2, "fp32", "fp32", "i32")]
    for streams, varlen in ((2, False), (2, True), (1, False)):
        report = built(clean_key_kernel, both, 24, tile, arch, stored, D, STREAMS=streams, VARLEN=varlen)
        if stored != "fp32" and D <= 128:
            assert ("HGMMA" if arch == 90 else "HMMA") in report.sass
    own = pointers(stored, 6, "fp32", "fp32", "i32")
    for group_size in (1, 4):
        tile = own_layout(D, DTYPES[stored], group_size)
        built(noisy_key_kernel, own, 18, tile, arch, stored, D, SINGLE=group_size == 1, VARLEN=False)
