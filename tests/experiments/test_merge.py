"""Runs of some blocks each, merged: the run that one process would have made, to the bit."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
import yaml

import tiny
from diffusionblocks.checkpoint import files
from diffusionblocks.checkpoint.files import CheckpointError
from diffusionblocks.experiments import cli, commands
from diffusionblocks.experiments.merge import merge_runs
from diffusionblocks.experiments.run_folder import read_config

SETTINGS = dict(shared="per_block", adapt=False)


def parts_of(folder):
    return {part: files.load_part(folder, part) for part in files.read_state(folder).parts}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, blocks in {"a": (0, 2), "b": (1,)}.items():
        assert commands.start(tiny.config(root / name, train_blocks=blocks, **SETTINGS)) == {}
    return root / "a", root / "b"


def test_a_merged_run_is_that_of_one_process(tmp_path, runs):
    commands.start(tiny.config(tmp_path / "one", **SETTINGS))
    assert merge_runs(runs, tmp_path / "c")
    expected, found = parts_of(tmp_path / "one" / "checkpoint"), parts_of(tmp_path / "c" / "checkpoint")
    assert found.keys() == expected.keys()
    for part, tensors in expected.items():
        assert found[part].keys() == tensors.keys()
        assert all(torch.equal(found[part][name], t) for name, t in tensors.items()), part
    one, whole = json.loads((tmp_path / "one" / "summary.json").read_text()), commands.resume(tmp_path / "c")
    assert whole["results"]["block-wise"]["test"] == one["results"]["block-wise"]["test"]
    assert read_config(tmp_path / "c").train_blocks is None
    longer = commands.resume(tmp_path / "c", steps=14)
    assert (
        longer["results"]["block-wise"]["test"]
        == commands.resume(tmp_path / "one", steps=14)["results"]["block-wise"]["test"]
    )


def test_parts_are_lengthened_before_they_are_merged(tmp_path):
    for name, blocks in {"a": (0, 2), "b": (1,), "one": None}.items():
        commands.start(tiny.config(tmp_path / name, train_blocks=blocks, steps=5, **SETTINGS))
        commands.resume(tmp_path / name, steps=8, lr=1e-3)
    merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    expected, found = (parts_of(tmp_path / name / "checkpoint") for name in ("one", "c"))
    assert all(torch.equal(found[part][name], t) for part, tensors in expected.items() for name, t in tensors.items())
    assert (tmp_path / "c" / "changes.jsonl").read_text() == (tmp_path / "one" / "changes.jsonl").read_text()
    rows = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows) and rows


def test_by_the_command(tmp_path, runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dblocks", "merge", *map(str, runs), "--out", str(tmp_path / "c")])
    cli.main()
    assert f"dblocks resume {tmp_path / 'c'}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["dblocks", "merge", str(runs[0]), "--out", str(tmp_path / "d")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "none has block_1 of the model's 3 blocks" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    checkpoints = [str(folder / "checkpoint") for folder in runs]
    monkeypatch.setattr(sys, "argv", ["dblocks", "merge", *checkpoints, "--out", str(tmp_path / "e")])
    with pytest.raises(SystemExit):  # their extra values are two runs' seconds
        cli.main()
    assert "differ in their extra: seconds" in capsys.readouterr().err


def test_a_run_of_some_blocks_is_not_evaluated(runs):
    with pytest.raises(CheckpointError, match="dblocks merge"):
        commands.open_run(runs[0])
    assert not (runs[0] / "summary.json").exists() and not (runs[0] / "waiting").exists()


def damage(folder, name):
    if name == "data":
        facts = json.loads((folder / "facts.json").read_text())
        facts["splits"]["train"]["sha256"] = "0" * 64
        (folder / "facts.json").write_text(json.dumps(facts))
    elif name == "changes":
        (folder / "changes.jsonl").write_text('{"step": 3, "lr": 0.1}\n')
    elif name == "no run":
        (folder / "config.yaml").unlink()
    else:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"batch_size": 8, "overlap": 0.1}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data", "trained on other data: compare their facts.json"),
        ("changes", "resumed with other settings"),
        ("no run", "is not a run folder"),
        ("config", "different runs, by batch_size, overlap"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, runs, name, message):
    other = shutil.copytree(runs[1], tmp_path / "b")
    damage(other, name)
    with pytest.raises(CheckpointError, match=message):
        merge_runs([runs[0], other], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_library_merge_of_run_folders_names_the_command(tmp_path, runs):
    import diffusionblocks as db

    with pytest.raises(CheckpointError, match="is a run folder: use `dblocks merge`"):
        db.merge(runs, tmp_path / "c")


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [({}, "add --shared per_block --no-adapt"), ({"adapt": False}, "add --shared per_block$"),
     ({"shared": "per_block"}, "add --no-adapt$")],
)  # fmt: skip
def test_what_blocks_alone_need_is_said_at_once(settings, lacking, tmp_path):
    with pytest.raises(ValueError, match=rf"--train-blocks trains blocks apart, .* {lacking}"):
        commands.start(tiny.config(tmp_path / "run", train_blocks=(0,), **settings))
    assert not (tmp_path / "run").exists()
