"""The CUDA sources compile for sm_80 and sm_90a without spills, on a machine with nvcc and no GPU.

The flags are setup.py's and those that torch's build extension adds. `DBKERNELS_TORCH_HEADERS=FOLDER` (the `include` of
another torch) compiles against these headers too; test_torch_names.py holds what the oldest torch offers.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import setup_script

ROOT = Path(__file__).parents[2]
HEADERS = [Path(torch.__file__).parent / "include"]
if "DBKERNELS_TORCH_HEADERS" in os.environ:
    HEADERS.append(Path(os.environ["DBKERNELS_TORCH_HEADERS"]))
PHILOX = """
#include "philox.h"
__global__ void draw(float* out, unsigned long long seed, unsigned offset) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  dbk::normals_of_group<true>(i, seed, offset, out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
}
"""
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def build_flags():
    """Return nvcc's flags in a build: torch's, then setup.py's."""
    return cpp_extension.COMMON_NVCC_FLAGS + setup_script.load().NVCC_FLAGS


def compiled(source, folder, headers=HEADERS[0]):
    """Return nvcc's report on each kernel: (architecture, registers, spilled bytes)."""
    archs = [flag for a in ("80", "90a") for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    include = [f"-I{ROOT / 'csrc'}", f"-I{headers}"]
    command = ["nvcc", *build_flags(), *archs, "-Xptxas", "-v", *include, "-c", source, "-o", f"{folder}/object.o"]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    pattern = r"for '(sm_\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(pattern, run.stderr, flags=re.S)
    return [(arch, int(registers), int(stores) + int(loads)) for arch, stores, loads, registers in found]


def test_torch_turns_implicit_conversions_of_halves_off():
    """Otherwise the test below proves less than a build does."""
    assert {"-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"} <= set(build_flags())


@pytest.mark.parametrize("headers", HEADERS, ids=lambda path: str(path))
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.name)
def test_no_spills(source, headers, tmp_path):
    kernels = compiled(source, tmp_path, headers)
    assert {arch for arch, _, _ in kernels} == {"sm_80", "sm_90a"}
    assert all(spilled == 0 for _, _, spilled in kernels), kernels
    assert all(8 < registers <= 128 for _, registers, _ in kernels), kernels


def test_the_generators_header_serves_the_gpu(tmp_path):
    (tmp_path / "draw.cu").write_text(PHILOX)
    kernels = compiled(tmp_path / "draw.cu", tmp_path)
    assert len(kernels) == 2 and all(spilled == 0 for _, _, spilled in kernels)
