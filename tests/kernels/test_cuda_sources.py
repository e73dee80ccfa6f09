"""The CUDA sources compile for sm_80 and sm_90a without spills, on a machine with nvcc and no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas", "-v"]
PHILOX = """
#include "philox.h"
__global__ void draw(float* out, unsigned long long seed, unsigned offset) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  dbk::normals_of_group<true>(i, seed, offset, out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
}
"""
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compiled(source, folder):
    """nvcc's report on each kernel: (architecture, registers, spilled bytes)."""
    include = Path(torch.__file__).parent / "include"
    archs = [flag for a in ("80", "90a") for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    command = [
        "nvcc",
        *FLAGS,
        *archs,
        f"-I{ROOT / 'csrc'}",
        f"-I{include}",
        "-c",
        source,
        "-o",
        f"{folder}/object.o",
    ]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    pattern = r"for '(sm_\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(pattern, run.stderr, flags=re.S)
    return [(arch, int(registers), int(stores) + int(loads)) for arch, stores, loads, registers in found]


@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.name)
def test_no_spills(source, tmp_path):
    kernels = compiled(source, tmp_path)
    assert {arch for arch, _, _ in kernels} == {"sm_80", "sm_90a"}
    assert all(spilled == 0 for _, _, spilled in kernels), kernels
    assert all(8 < registers <= 128 for _, registers, _ in kernels), kernels


def test_the_generators_header_serves_the_gpu(tmp_path):
    (tmp_path / "draw.cu").write_text(PHILOX)
    kernels = compiled(tmp_path / "draw.cu", tmp_path)
    assert len(kernels) == 2 and all(spilled == 0 for _, _, spilled in kernels)
