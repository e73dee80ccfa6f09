"""adamw_ema_step's Triton kernels without a GPU: interpreted, compiled ahead of time, and launched on a fake one."""

import re
import shutil

import pytest

pytest.importorskip("triton")
import triton.language as tl

import aot
from dbkernels.triton.adamw_ema import NEAREST, STOCHASTIC, WITH_MASTER, decide_kernel, update_kernel
from dbkernels.triton.total_norm import BLOCK, CHUNK
from fake_gpu import run_faked
from interpreter import run_interpreted

TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
LISTS = ["*i64:16", "*fp64:16", "i32"]  # table, scratch, tensors
SHORTEST = 200  # a stub is shorter
# dtypes of params and moments, average, where the parameter goes, and the streams of 16-byte accesses an element block
# has: loads, stores. A thread has 8 elements: two accesses a stream in float32, four in float64; halves move 8 bytes.
UPDATES = [
    ("fp32", "fp32", True, NEAREST, 10, 8), ("bf16", "fp32", True, WITH_MASTER, 8, 8),
    ("bf16", "fp32", True, STOCHASTIC, 6, 6), ("fp16", "fp32", False, NEAREST, 4, 4),
    ("fp64", "fp64", True, NEAREST, 20, 16), ("fp32", "bf16", True, NEAREST, 6, 4),
    ("bf16", "bf16", True, WITH_MASTER, 4, 4), ("bf16", "bf16", True, STOCHASTIC, 2, 2),
]  # fmt: skip


def wide(dtype):
    return TYPES["fp64" if dtype == "fp64" else "fp32"]


def test_interpreted():
    run_interpreted("interpreted_adamw_ema.py")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake driver")
def test_launches_and_functions():
    run_faked("faked_adamw_ema.py")


@pytest.mark.parametrize(
    "dtype,moments,averaged,store,loads,stores,arch",
    [*((*case, 90) for case in UPDATES), *((*case, 80) for case in UPDATES[::3])],
)
def test_update_compiles_to_wide_accesses(dtype, moments, averaged, store, loads, stores, arch):
    """The whole kernel, with its loops for unaligned and last blocks, is at most 2200 instructions; 8 elements of 40
    bytes go through some 600 of them, 75 an element: an H100 has time for 380 while the bytes move. With random words
    for params and both moments it is some 2400, at most 150 an element of 22 bytes, which leave time for 200."""
    types = dict(TYPE=TYPES[dtype], WIDE=wide(dtype), MOMENT=TYPES[moments], CHUNK=CHUNK, BLOCK=BLOCK)
    report = aot.report(update_kernel, LISTS, dict(**types, AVERAGED=averaged, STORE=store.value), arch, stages=1)
    assert report.spilled_bytes == 0 and report.registers <= 168
    most = 2500 if (moments, store) == ("bf16", STOCHASTIC) else 2200
    assert SHORTEST < report.instructions < most, report.instructions
    assert len(re.findall(r"LDG\.E\.128", report.sass)) == loads
    assert len(re.findall(r"STG\.E\.128", report.sass)) == stores


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("state", ["fp32", "fp64"])
def test_decide_compiles(state, given):
    norms = [f"*{state}:16", f"*{state}:16"]
    pointers = ["*i64:16", "*fp64:16", "*fp64:16", *norms, "*i64", "*fp64", "*fp64", "*i64", "*i64"]
    numbers = ["i64", "fp64", "fp64", "i64", "i64", "i32", "i32", *["fp64"] * 4]
    switches = dict.fromkeys(("STEP", "LR", "EMA_DECAY", "SEEDED", "MOVED"), True)
    constants = dict(**switches, GIVEN=given, CLIPPED=True, BLOCK=1024)
    report = aot.report(decide_kernel, pointers + numbers, constants, 90, stages=1)
    assert report.spilled_bytes == 0 and SHORTEST < report.instructions < 1000
