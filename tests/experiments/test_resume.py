"""Resuming is bit-exact: killed at random points the run ends with the same weights, metrics and noise."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
import tiny_all
from diffusionblocks.checkpoint import files as checkpoint
from diffusionblocks.checkpoint.files import CheckpointError
from diffusionblocks.experiments import commands
from diffusionblocks.experiments.config import to_yaml
from diffusionblocks.experiments.run_folder import write
from diffusionblocks.experiments.tasks import task_of
from diffusionblocks.training.finite import NonFiniteLoss

HERE = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "2"))  # of a run
# Forks trainings from one process, so that a restart costs no import: not torch's, nor what a run's data and its first
# step import. A line on stdin starts a child that trains; its exit status and its seconds of CPU are printed once it
# ends. SIGPROF, which nothing handles, ends it at once after so many of these seconds (0: never): the same point
# however busy the machine is.
SERVER = """
import os, signal, sys
import pathlib, pytest, sklearn.datasets, torch, torch._dynamo, spared, tiny_all
from diffusionblocks.experiments import commands
from diffusionblocks.experiments.metrics import frechet
from diffusionblocks.experiments.tasks import task_of
spared.spare(pytest.MonkeyPatch())
frechet.STEPS, frechet.EPOCHS = 20, 0
torch.set_num_threads(1)
for line in sys.stdin:
    name, folder, seconds = line.split()
    folder = pathlib.Path(folder)
    changes = {"vit": dict(branch=0.3), "recurrent": dict(steps=80)}.get(name, {})
    config = tiny_all.config(name, folder, **dict(offload="disk", steps=20, checkpoint_every=4) | changes)
    getattr(task_of(config), "data", None)  # a text is encoded, which children need not
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        signal.setitimer(signal.ITIMER_PROF, float(seconds))
        commands.resume(folder) if (folder / "config.yaml").exists() else commands.start(config)
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, flush=True)
"""


@pytest.fixture(scope="module")
def server():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    yield process
    process.stdin.close()
    process.wait()


def run(server, name, folder, kill_after=0.0):
    """Train until done, or killed after so many seconds of CPU; returns the exit status and the seconds taken."""
    server.stdin.write(f"{name} {folder} {kill_after}\n")
    server.stdin.flush()
    status, seconds = server.stdout.readline().split()
    return int(status), float(seconds)


def everything(folder):
    """All that a finished run holds: tensors by part, state, metrics without clocks, results without clocks."""
    manifest = checkpoint.read_state(folder / "checkpoint")
    tensors = {part: checkpoint.load_part(folder / "checkpoint", part) for part in manifest.parts}
    state = without_clocks(manifest.state)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "reserved")} for row in rows]
    result = json.loads((folder / "results/block-wise.json").read_text())
    return tensors, state, rows, without_clocks(result)


def without_clocks(result):
    """A result less all that tells how long something took."""
    if not isinstance(result, dict):
        return result
    return {k: without_clocks(v) for k, v in result.items() if "second" not in k}


def killed_often(server, name, folder, whole_run):
    """A run in spite of kills at random points of its time: how many, and the steps of the checkpoints they met."""
    dice, kills, steps = random.Random(folder.name), 0, set()
    wait = 0.3 * whole_run
    while run(server, name, folder, kill_after=wait)[0] != 0:
        kills += 1
        wait = dice.uniform(0.05, 0.5) * whole_run if kills < KILLS else 0.0
        if (folder / "checkpoint/manifest.json").exists():
            steps.add(checkpoint.read_state(folder / "checkpoint").state["step"])
    return kills, steps


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_all.CONFIGS)
def test_killed_at_random_points_a_run_ends_with_the_same_bits(name, server, tmp_path):
    """`KILLS=40 pytest tests/test_resume.py -k random` is the long form: 200 kills over all architectures."""
    status, whole_run = run(server, name, tmp_path / "whole")
    assert status == 0
    expected = everything(tmp_path / "whole")
    for attempt in range(10):  # a first run may take longer than the next, and clocks of CPU time are coarse
        folder = tmp_path / f"{name}{attempt}"
        kills, steps = killed_often(server, name, folder, whole_run)
        if kills >= 2 and steps:
            break
        whole_run *= 1.5 if kills >= 2 else 0.5  # they came too early, or too late
    assert kills >= 2, "the run ended before it could be killed often enough to mean anything"
    assert steps, "no kill met a checkpoint"
    tensors, state, rows, result = everything(folder)
    assert state == expected[1] and rows == expected[2] and result == expected[3]
    for part, ours in tensors.items():
        for key, t in ours.items():
            assert torch.equal(t, expected[0][part][key]), f"{part} {key}"


def interrupted(folder, stop_at, **changes):
    """A trainer whose run ended after `stop_at` steps, at its last checkpoint."""
    config, kept = tiny.config(folder, **changes), []
    write(folder / "config.yaml", to_yaml(config))

    class Stop(Exception):
        pass

    original = commands.RunLog.on_step_end

    def stop_after(log, trainer, output):
        original(log, trainer, output)
        if trainer.steps_done >= stop_at:
            kept.append(trainer)
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands.RunLog, "on_step_end", stop_after)
        with pytest.raises(Stop):
            commands.carry_on(task_of(config))
    return kept[0]


def back_at(config):
    """A fresh trainer of a run, at its last checkpoint."""
    return commands.open_trainer(task_of(config))[0]


@pytest.mark.parametrize("shared", ["shared", "per_block"])
def test_resumes_in_the_middle_of_a_visit(tmp_path, shared):
    left = interrupted(tmp_path / "a", stop_at=7, shared=shared)  # visits are 3 steps long
    assert left.steps_done == 7 and left.steps_done % left.config.visit != 0
    ours = {part: {n: t.clone() for n, t in left.offloader.tensors(part).items()} for part in left.offloader.parts}
    scalars = {name: part.scalars() for name, part in left.offloader.parts.items()}
    back = back_at(tiny.config(tmp_path / "a", shared=shared))
    assert back.steps_done == 7 and back.model.partition == left.model.partition
    for part, tensors in ours.items():
        theirs = back.offloader.tensors(part)
        assert tensors.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in tensors.items())
    assert torch.equal(left.meter.sums, back.meter.sums)
    assert scalars == {name: part.scalars() for name, part in back.offloader.parts.items()}
    assert left.loader.state_dict() == back.positions["loader"] == {"position": 7}


def test_only_changed_blocks_are_written_again(tmp_path):
    trainer = interrupted(tmp_path / "a", stop_at=7)
    first = {p: f.file for p, f in checkpoint.read_state(tmp_path / "a/checkpoint").parts.items()}
    trainer.changed = {"shared", "block_1"}
    trainer.save(tmp_path / "a/checkpoint")
    second = {p: f.file for p, f in checkpoint.read_state(tmp_path / "a/checkpoint").parts.items()}
    assert {p for p in first if first[p] != second[p]} == {"shared", "block_1", "noise"}


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    interrupted(tmp_path / "a", stop_at=7)
    for change in (dict(overlap=0.2), dict(batch_size=8), dict(ema=0.5)):
        with pytest.raises(CheckpointError, match="another config"):
            back_at(tiny.config(tmp_path / "a", **change))
    with pytest.raises(CheckpointError, match="saved with seed=0"):
        back_at(tiny.config(tmp_path / "a", seed=1))
    for change in (dict(offload="cpu", checkpoint_every=100), dict(sampling_steps=9, sampler="heun"), dict(lr=1e-2)):
        assert back_at(tiny.config(tmp_path / "a", **change)).steps_done == 7


def test_a_bad_loss_leaves_the_last_checkpoint_as_it_was(tmp_path):
    trainer = interrupted(tmp_path / "a", stop_at=7)
    before = checkpoint.read_state(tmp_path / "a/checkpoint")
    trainer.watch.first_bad.fill_(9)
    with pytest.raises(NonFiniteLoss, match="not finite at step 9"):
        trainer.save(tmp_path / "a/checkpoint")
    assert checkpoint.read_state(tmp_path / "a/checkpoint") == before


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    interrupted(tmp_path / "a", stop_at=7)
    manifest = checkpoint.read_state(tmp_path / "a/checkpoint")
    path = tmp_path / "a/checkpoint" / manifest.parts["block_1"].file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        back_at(tiny.config(tmp_path / "a"))


def test_a_run_is_not_started_over_another(tmp_path):
    interrupted(tmp_path / "a", stop_at=7)
    with pytest.raises(ValueError, match="already holds a run"):
        commands.start(tiny.config(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="not a run folder"):
        commands.resume(tmp_path / "empty")
