"""Two processes on one run folder: the second is told who holds it; readers work beside a training."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from diffusionblocks.checkpoint import files as checkpoint
from diffusionblocks.checkpoint.files import CheckpointError
from diffusionblocks.checkpoint.lock import LOCK, RunLocked, run_lock
from diffusionblocks.experiments import commands as jobs
from diffusionblocks.experiments import results as runfiles
from diffusionblocks.experiments import snapshots
from diffusionblocks.experiments.tasks import adapter_of

HERE = Path(__file__).parents[1]
HOLD = """
import sys, pathlib, time
from diffusionblocks.checkpoint.lock import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_holds_it_until_that_one_dies(tmp_path, holder):
    tiny_run = tiny.config(tmp_path)
    jobs.write(tmp_path / "config.yaml", jobs.to_yaml(tiny_run))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RunLocked, match=rf"is being trained by process {holder.pid} on \S+ since .*wait for it"):
        jobs.resume(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run_lock(tmp_path):  # released by the kernel
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "):
            jobs.resume(tmp_path)


def test_two_starts_at_once(tmp_path, holder):
    with pytest.raises(RunLocked):
        jobs.start(tiny.config(tmp_path))
    assert not (tmp_path / "config.yaml").exists()


def test_a_run_holds_its_folder_while_it_trains_and_no_longer(tmp_path, monkeypatch):
    seen = []

    def trying(adapter):
        with pytest.raises(RunLocked):
            with run_lock(adapter.config.out):
                pass
        seen.append(adapter)
        return {}

    monkeypatch.setattr(jobs, "carry_on", trying)
    jobs.start(tiny.config(tmp_path / "run"))
    jobs.resume(tmp_path / "run")
    assert len(seen) == 2
    with run_lock(tmp_path / "run"):
        pass


def test_no_folder_that_holds_no_run_gets_a_lock(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        jobs.resume(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\)"), run_lock(tmp_path):
        pass


def test_a_reader_takes_the_newer_checkpoint_if_one_is_saved_meanwhile(tmp_path, monkeypatch):
    config = tiny.config(tmp_path / "run")
    jobs.start(config)
    folder, load, calls = tmp_path / "run" / "checkpoint", checkpoint.load_part, []

    def loading(where, part, **rest):
        calls.append(part)
        if len(calls) == 2:  # a training commits another save, whose sweep removes what the manifest named
            manifest = checkpoint.read_state(folder)
            parts = {name: load(folder, name, manifest=manifest) for name in manifest.parts}
            checkpoint.save(folder, parts, manifest.state)
        return load(where, part, **rest)

    monkeypatch.setattr(checkpoint, "load_part", loading)
    _, walker = jobs.open_run(tmp_path / "run")
    assert len(calls) > 2 + len(walker.model.parts()) - 1


def test_a_missing_file_of_a_checkpoint_nobody_replaces_is_an_error(tmp_path):
    jobs.start(tiny.config(tmp_path / "run"))
    next((tmp_path / "run" / "checkpoint").glob("block_0*")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        jobs.open_run(tmp_path / "run")


def test_a_resume_sweeps_what_a_kill_left(tmp_path):
    jobs.start(tiny.config(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoint"
    for name in ("block_0.save99.safetensors", "block_1.save99.safetensors.tmp", "manifest.json.tmp"):
        (folder / name).write_text("left")
    (folder / "mine.txt").write_text("not ours")
    jobs.open_run(tmp_path / "run")
    assert (folder / "manifest.json.tmp").exists()  # a reader removes nothing: a training may be at work
    jobs.resume(tmp_path / "run")
    left = [path.name for path in folder.iterdir() if "99" in path.name or path.name.endswith(".tmp")]
    assert left == [] and (folder / "mine.txt").exists()


def test_a_row_being_written_is_not_read(tmp_path):
    jobs.start(tiny.config(tmp_path / "run"))
    rows = runfiles.read_run(tmp_path / "run").rows
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"run": "block-wise", "step": 99})[:-4])
    assert runfiles.read_run(tmp_path / "run").rows == rows


def test_the_state_of_a_run_is_its_own(tmp_path):
    """What a lock leaves behind is no part of a run."""
    jobs.start(tiny.config(tmp_path / "run"))
    adapter = adapter_of(jobs.read_config(tmp_path / "run"))
    assert snapshots.read(tmp_path / "run" / "checkpoint", adapter.config).saves > 0
