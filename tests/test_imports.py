"""What `import diffusionblocks` loads: torch, numpy, safetensors and the kernels, nothing heavy besides."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("matplotlib", "PIL", "yaml", "tyro", "rich", "sklearn", "transformers", "datasets", "triton", "torch._dynamo")
CODE = f"""
import torch, sys
before = set(sys.modules)
import diffusionblocks
loaded = set(sys.modules) - before
heavy = [name for name in {HEAVY!r} if name in loaded]
assert not heavy, heavy
assert not [name for name in loaded if name.startswith("diffusionblocks.experiments")]
import diffusionblocks.experiments.cli  # a positive control
assert "tyro" in sys.modules
"""


def test_the_library_loads_nothing_of_its_experiments_nor_a_compiler():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
