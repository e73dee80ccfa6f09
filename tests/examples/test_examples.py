"""The scripts of examples/ run as a user runs them, briefly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "train_own_network.py": "sklearn",
    "own_loop.py": "torch",
    "convert_vit.py": "transformers",
    "ray_blocks.py": "ray",
}


def run(name: str, folder: Path, steps: int) -> str:
    pytest.importorskip(EXAMPLES[name])
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), "--steps", str(steps)],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


def accuracy(output: str) -> float:
    return float(output.split("accuracy ")[1].split("%")[0])


def test_own_network_is_resumed(tmp_path):
    assert accuracy(run("train_own_network.py", tmp_path, steps=150)) > 50  # chance is 10 %
    assert "after 160 steps" in run("train_own_network.py", tmp_path, steps=160)
    assert (tmp_path / "digits" / "model" / "model.safetensors.index.json").exists()


def test_own_loop_learns(tmp_path):
    assert accuracy(run("own_loop.py", tmp_path, steps=200)) > 60  # chance is 33 %


def test_converted_vit_is_loaded(tmp_path):
    assert "same output: True" in run("convert_vit.py", tmp_path, steps=12)


def test_blocks_of_ray_tasks_make_one_model(tmp_path):
    assert accuracy(run("ray_blocks.py", tmp_path, steps=300)) > 60  # chance is 33 %
