"""The two-stream kernels without a GPU: interpreted, and compiled ahead of time."""

import re

import pytest
import torch

pytest.importorskip("triton")
from fake_gpu import run_faked
from interpreter import run_interpreted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORTEST = 400  # a stub is shorter
STRIDE, NUMBER, PITCH, SCALE = "i32:16", "i32", "i32:16", "fp32"


def test_interpreted():
    run_interpreted("interpreted_two_stream_attention.py")


def test_paths_with_a_stand_in_for_cudnn():
    run_interpreted("interpreted_two_stream_cudnn.py")


def test_launches_and_functions_on_a_fake_gpu():
    run_faked("faked_two_stream_attention.py")


def built(kernel, signature, layout, arch, stored, D, **constants):
    """Compiled with all strides multiples of 16 elements, as in a model; no spills, no stub; products on the tensor
    cores where the dtype has them, by warp group on Hopper."""
    import aot
    from dbkernels.triton.two_stream_attention import block_of, precision

    rows, columns, warps, stages = layout
    given = dict(D=D, BLOCK_D=block_of(D), ROWS=rows, COLUMNS=columns, PRECISION=precision(DTYPES[stored])) | constants
    names = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
    report = aot.report(kernel, signature, {name: given[name] for name in names}, arch, warps, stages)
    what = kernel.fn.__name__, stored, D, arch, constants
    assert report.spilled_bytes == 0, (*what, report.spilled_bytes)
    assert report.instructions > SHORTEST, (*what, report.instructions)
    return report


def pointers(stored, count, *rest):
    return [f"*{stored}:16"] * count + [f"*{kind}:16" for kind in rest]


# What is launched: the widths that models have, all types at one of them, and both kinds of group. Not float32 at 256,
# which spills whatever the tile.
WIDTHS = [("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 64), ("fp32", 128)]
ARCHS = [90, 80]
STREAMS = [dict(NOISY=False, SINGLE=False, VARLEN=False), dict(NOISY=True, SINGLE=True, VARLEN=False),
           dict(NOISY=True, SINGLE=False, VARLEN=True)]  # fmt: skip
KEYS = [dict(OWN=False, ADD=False, VARLEN=False, RATIO=1), dict(OWN=False, ADD=True, VARLEN=False, RATIO=4),
        dict(OWN=False, ADD=True, VARLEN=True, RATIO=1), dict(OWN=True, ADD=False, VARLEN=False, RATIO=1)]  # fmt: skip


def spread(kinds):
    """Each width on both architectures, the kinds in turn: each of them on both too, and two at each width."""
    return [(w, arch, kinds[(i + j) % len(kinds)]) for i, w in enumerate(WIDTHS) for j, arch in enumerate(ARCHS)]


def on_tensor_cores(report, arch):
    return ("wgmma.mma" if arch == 90 else "mma.sync") in report.ptx


@pytest.mark.parametrize(("width", "arch", "constants"), spread(STREAMS))
def test_forward_compiles_without_spills(width, arch, constants):
    from dbkernels.triton.two_stream_attention import forward_kernel, forward_layout

    stored, D = width
    layout = forward_layout(D, DTYPES[stored], arch)
    signature = [*pointers(stored, 6, "fp32", "i32"), *[STRIDE] * 18, *[NUMBER] * 5, SCALE]
    report = built(forward_kernel, signature, layout, arch, stored, D, **constants)
    assert stored == "fp32" or on_tensor_cores(report, arch)


@pytest.mark.parametrize(("width", "arch", "constants"), spread(STREAMS))
def test_the_queries_gradient_compiles_without_spills(width, arch, constants):
    from dbkernels.triton.two_stream_queries import layout, query_kernel

    stored, D = width
    given = [*pointers(stored, 7, "fp32"), *pointers(stored, 1, "fp32", "i32")]
    signature = [*given, *[STRIDE] * 24, *[NUMBER] * 4, PITCH, NUMBER, SCALE]
    report = built(query_kernel, signature, layout(D, DTYPES[stored], arch), arch, stored, D, **constants)
    assert stored == "fp32" or D > 128 or on_tensor_cores(report, arch)


@pytest.mark.parametrize(("width", "arch", "constants"), spread(KEYS))
def test_the_keys_gradients_compile_without_spills(width, arch, constants):
    from dbkernels.triton.two_stream_keys import key_kernel, layout

    stored, D = width
    tile = layout(D, DTYPES[stored], arch)
    given = pointers(stored, 6, "fp32", "i32")
    signature = [*given, *[STRIDE] * 18, *[NUMBER] * 3, PITCH, NUMBER, NUMBER, SCALE]
    report = built(key_kernel, signature, tile, arch, stored, D, **constants)
    assert stored == "fp32" or D > 128 or on_tensor_cores(report, arch)
    if arch == 90 and stored != "fp32" and D in (64, 128) and not constants["VARLEN"]:
        check_copies(report.sass, tile, D)


def check_copies(sass, tile, D):
    """A stage's rows come by copies of 16 bytes. Their numbers by one more copy a thread, of 4 bytes, where they are as
    many as threads; otherwise each thread copies its own, two rows' at a time: four for 32 rows."""
    rows, _, warps, stages = tile
    copies = re.findall(r"LDGSTS\S*", sass)
    wide = 2 * rows * D * 2 // (16 * 32 * warps)
    narrow = [copy for copy in copies if ".128" not in copy]
    assert len(copies) <= stages * (wide + (1 if 2 * rows >= 32 * warps else 4)), copies
    assert len(narrow) <= stages, copies


@pytest.mark.parametrize(("stored", "D", "arch"), [("bf16", 64, 90), ("fp16", 128, 90), ("bf16", 80, 80)])
def test_what_joins_two_parts_compiles_without_spills(stored, D, arch):
    from dbkernels.triton.two_stream_join import join_kernel, layout, separate_kernel
    from dbkernels.triton.two_stream_keys import ITSELF, itself_kernel

    rows, warps = layout(D)
    tile = rows, rows, warps, 1
    given = [*pointers(stored, 4, "fp32"), *pointers(stored, 1, "fp32")]
    built(join_kernel, [*given, *[STRIDE] * 15, *[NUMBER] * 4, SCALE], tile, arch, stored, D)
    given = [*pointers(stored, 5, "fp32"), *pointers(stored, 8)]
    for add, ratio in ((True, 1), (False, 4)):
        signature = [*given, *[STRIDE] * 39, *[NUMBER] * 3, SCALE]
        built(separate_kernel, signature, tile, arch, stored, D, ADD=add, RATIO=ratio)
    columns, warps, stages = ITSELF
    given = [*pointers(stored, 6, "fp32", "i32"), *[STRIDE] * 18, *[NUMBER] * 3, PITCH, SCALE]
    built(itself_kernel, given, (columns, columns, warps, stages), arch, stored, D, RATIO=2)
