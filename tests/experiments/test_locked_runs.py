"""Two processes on one run folder: the second touches nothing; reading commands work beside a training."""

from __future__ import annotations

import json

import pytest

import tiny
from diffusionblocks.checkpoint import files as checkpoint
from diffusionblocks.checkpoint.files import CheckpointError
from diffusionblocks.checkpoint.lock import LOCK, RunLocked, run_lock
from diffusionblocks.experiments import commands, results
from diffusionblocks.experiments.config import to_yaml
from diffusionblocks.experiments.run_folder import write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_process_touches_nothing(tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(RunLocked):
            commands.start(tiny.config(tmp_path))
        assert names(tmp_path) == [LOCK]
        write(tmp_path / "config.yaml", to_yaml(tiny.config(tmp_path)))
        for second in (
            lambda: commands.resume(tmp_path, lr=1.0),
            lambda: commands.start(tiny.config(tmp_path), overwrite=True),
        ):
            with pytest.raises(RunLocked):
                second()
        assert names(tmp_path) == [LOCK, "config.yaml"] and "lr: 1.0\n" not in (tmp_path / "config.yaml").read_text()


def test_a_run_holds_its_folder_while_it_trains_and_no_longer(tmp_path, monkeypatch):
    seen = []

    def trying(task):
        with pytest.raises(RunLocked), run_lock(task.config.out):
            pass
        (task.config.out / "checkpoint").mkdir(exist_ok=True)
        seen.append(task)
        return {}

    monkeypatch.setattr(commands, "carry_on", trying)
    commands.start(tiny.config(tmp_path / "run"))
    commands.resume(tmp_path / "run")
    assert len(seen) == 2
    with run_lock(tmp_path / "run"):
        pass


def test_no_folder_that_holds_no_run_gets_a_lock(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        commands.resume(tmp_path)
    assert not (tmp_path / LOCK).exists()


@pytest.fixture
def run(tmp_path):
    commands.start(tiny.config(tmp_path / "run"))
    return tmp_path / "run"


def test_a_reader_takes_the_newer_checkpoint_if_one_is_saved_meanwhile(run, monkeypatch):
    folder, load, calls = run / "checkpoint", checkpoint.load_part, []

    def loading(where, part, **rest):
        calls.append(part)
        if len(calls) == 2:  # a training commits another save, whose sweep removes what the manifest named
            manifest = checkpoint.read_state(folder)
            parts = {name: load(folder, name, manifest=manifest) for name in manifest.parts}
            checkpoint.save(folder, parts, manifest.state)
        return load(where, part, **rest)

    monkeypatch.setattr(checkpoint, "load_part", loading)
    _, model = commands.open_run(run)
    assert len(calls) > 2 + len(model.parts()) - 1


def test_a_missing_file_of_a_checkpoint_nobody_replaces_is_an_error(run):
    next((run / "checkpoint").glob("block_0*")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        commands.open_run(run)


def test_a_resume_sweeps_what_a_kill_left(run):
    folder = run / "checkpoint"
    for name in ("block_0.save99.safetensors", "block_1.save99.safetensors.tmp", "manifest.json.tmp"):
        (folder / name).write_text("left")
    (folder / "mine.txt").write_text("not ours")
    commands.open_run(run)
    assert (folder / "manifest.json.tmp").exists()  # a reader removes nothing: a training may be at work
    commands.resume(run)
    left = [path.name for path in folder.iterdir() if "99" in path.name or path.name.endswith(".tmp")]
    assert left == [] and (folder / "mine.txt").exists()


def test_a_row_being_written_is_not_read(run):
    rows = results.read_run(run).rows
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"run": "block-wise", "step": 99})[:-4])
    assert results.read_run(run).rows == rows
