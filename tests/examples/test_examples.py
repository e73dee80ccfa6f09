"""The scripts of examples/ run as a user runs them, briefly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "train_own_network.py": "sklearn",
    "own_loop.py": "torch",
    "convert_vit.py": "transformers",
    "ray_blocks.py": "ray",
    "accelerate_blocks.py": "accelerate",
    "lightning_blocks.py": "lightning",
}
TWICE = """
import runpy, sys
path, option, steps = sys.argv[1:]
for count in (int(steps) - 20, int(steps)):
    sys.argv[1:] = [option, str(count)]
    runpy.run_path(path, run_name="__main__")
"""  # in one process, since Lightning's import takes seconds


def run(name: str, folder: Path, steps: int, command: tuple[str, ...] = ()) -> str:
    pytest.importorskip(EXAMPLES[name])
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    arguments = *command, ROOT / "examples" / name, "--steps", str(steps)
    done = warm.run(*arguments, cwd=folder, env=environment, imports=warm.TRAINING)
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


@pytest.mark.parametrize("name", ["accelerate_blocks.py", pytest.param("lightning_blocks.py", marks=pytest.mark.slow)])
def test_blocks_within_another_trainer_are_resumed(name, tmp_path):
    output = run(name, tmp_path, 120, ("-c", TWICE))
    assert "after 100 steps" in output and "after 120 steps" in output
    assert accuracy(output) > 60  # chance is 33 %


def tasks_of(mark: str) -> list[int]:
    """Return the processes of Ray tasks that have `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = mark.encode() in (folder / "environ").read_bytes()
            if ours and (folder / "cmdline").read_bytes().startswith(b"ray::train"):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
def test_a_ray_task_that_dies_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("ray")
    path, mark = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]), str(tmp_path)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "ray_blocks.py"), "--steps", "1500", "--folder", "out"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TEST_OF": mark},
    )  # fmt: skip
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("block*/manifest.json")) and time.monotonic() < until:
        time.sleep(0.01)
    killed = tasks_of(mark)
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and accuracy(output) > 60
