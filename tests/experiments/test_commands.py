"""Runs: started, overwritten, resumed with other settings, stopped by NaN; used without their training data."""

from __future__ import annotations

import json
import shutil
import sys

import numpy
import pytest
import torch
from PIL import Image

import tiny
from diffusionblocks.checkpoint import files as checkpoint
from diffusionblocks.experiments import cli, commands
from diffusionblocks.experiments.results import read_run
from diffusionblocks.experiments.run_folder import read_config
from diffusionblocks.training.finite import NonFiniteLoss


def dblocks(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dblocks", *map(str, arguments)])
        cli.main()


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        dblocks(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_overwrite_begins_anew(tmp_path):
    commands.start(tiny.config(tmp_path / "run"))
    with pytest.raises(ValueError, match="--overwrite"):
        commands.start(tiny.config(tmp_path / "run"))
    (tmp_path / "run" / "mine.txt").write_text("kept")
    commands.start(tiny.config(tmp_path / "run", seed=1), overwrite=True)
    assert read_config(tmp_path / "run").seed == 1 and (tmp_path / "run" / "mine.txt").exists()


def test_a_run_is_lengthened(tmp_path):
    commands.start(tiny.config(tmp_path / "run", baseline=("shallow",), tune_lr=(1e-3,), tune_warmup=(0.1,)))
    summary = commands.resume(tmp_path / "run", steps=14, lr=1e-3)
    assert read_config(tmp_path / "run").steps == 14
    assert checkpoint.read_state(tmp_path / "run" / "checkpoint").state["step"] == 14 * 3
    rows = read_run(tmp_path / "run").rows
    assert rows["block-wise"][-1]["step"] == 42 and rows["shallow"][-1]["step"] == 14, "the baseline trains as long"
    assert set(summary["results"]) == {"block-wise", "shallow"}
    changes = json.loads((tmp_path / "run" / "changes.jsonl").read_text())
    assert changes == {"step": 36, "steps": 14, "lr": 1e-3}
    before = (tmp_path / "run" / "config.yaml").read_text()
    for wrong, message in ((dict(steps=3), "42 are done"), (dict(lr=-1.0), "lr must be positive")):
        with pytest.raises(ValueError, match=message):
            commands.resume(tmp_path / "run", **wrong)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def poisoned(monkeypatch, at):
    """Make the loss NaN from a step on."""
    log = commands.RunLog.on_step_end

    def on_step_end(self, trainer, output):
        log(self, trainer, output)
        if trainer.steps_done == at:
            with torch.no_grad():
                trainer.model.stem_head.head.linear.weight.fill_(float("nan"))

    monkeypatch.setattr(commands.RunLog, "on_step_end", on_step_end)


def test_after_nan_there_is_a_way_on(tmp_path, monkeypatch, capsys):
    flags = (
        "--model.dim 16 --model.layers 3 --model.heads 2 --model.mlp 32 --model.patch 4 --steps 12 --visit 3".split()
    )
    train = "train", "vit-digits", *flags, "--checkpoint-every", "7", "--batch-size", "8", "--out", tmp_path / "run"
    with monkeypatch.context() as patch:
        poisoned(patch, at=9)
        error = fails(capsys, *train, "--baseline")
        assert "is not finite at step 9" in error and f"dblocks resume {tmp_path / 'run'} --lr LOWER" in error
    assert checkpoint.read_state(tmp_path / "run" / "checkpoint").state["step"] == 7
    dblocks("resume", tmp_path / "run", "--lr", "1e-4")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_without_a_step_leaves_no_folder(tmp_path, monkeypatch):
    poisoned(monkeypatch, at=1)
    with pytest.raises(NonFiniteLoss):
        commands.start(tiny.config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with two classes of images."""
    folder, dice = tmp_path_factory.mktemp("images") / "data", numpy.random.default_rng(0)
    for name, low in (("bright", 128), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(dice.integers(low, low + 127, (8, 8), dtype=numpy.uint8)).save(folder / name / f"{i}.png")
    return folder


def of_images(images, out):
    return tiny.config(
        out, data="folder", data_folder=images, model=tiny.MODEL.__class__(**{**vars(tiny.MODEL), "num_classes": 2})
    )


def test_a_run_is_used_without_its_data(images, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    monkeypatch.chdir(tmp_path)
    commands.start(of_images("data", tmp_path / "run"))  # a relative path
    assert read_config(tmp_path / "run").data_folder == data
    picture = tmp_path / "x.png"
    shutil.copy(images / "dark" / "0.png", picture)
    monkeypatch.chdir("/")
    dblocks("eval", tmp_path / "run")
    capsys.readouterr()
    shutil.copy(picture, data / "dark" / "more.png")
    for command in ("eval", "resume"):
        error = fails(capsys, command, tmp_path / "run")
        assert "not those it was trained on" in error and "train split (" in error
    shutil.rmtree(data)
    dblocks("predict", tmp_path / "run", picture)
    line = capsys.readouterr().out
    assert json.loads(line)["name"] == ["bright", "dark"][json.loads(line)["label"]]
    dblocks("export", tmp_path / "run", "--out", tmp_path / "model")
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    dblocks("predict", tmp_path / "model", picture)
    assert capsys.readouterr().out == line
    assert str(data) in fails(capsys, "eval", tmp_path / "model")


def test_a_language_model_is_sampled_without_its_text(tmp_path, capsys):
    text, out = tmp_path / "words.txt", tmp_path / "run"
    text.write_text("acgt" * 400)
    flags = (
        "--model.dim 16 --model.layers 2 --model.heads 2 --model.mlp 32 --steps 4 --length 16 --batch-size 4".split()
    )
    dblocks("train", "lm-text", "--text", text, *flags, "--tune-lr", "4e-3", "--out", out)
    dblocks("sample", out, "--count", "2", "--length", "40", "--prompt", "tag", "--judge", "ngram")
    assert json.loads((out / "samples" / "judge.json").read_text())["judge_bits"] > 0
    text.write_text("bcgt" * 400)
    for command in ("resume", "eval"):
        error = fails(capsys, command, out)
        assert "not those it was trained on" in error and "alphabet" in error
    text.unlink()
    dblocks("export", out, "--out", tmp_path / "lm")
    capsys.readouterr()
    for folder in (out, tmp_path / "lm"):
        dblocks("sample", folder, "--count", "2", "--length", "40", "--prompt", "tag")
    printed = capsys.readouterr().out
    first, again = ((f / "samples.txt").read_text() for f in (out / "samples-2", tmp_path / "lm" / "samples"))
    assert first == again == (out / "samples" / "samples.txt").read_text(), "no samples are overwritten"
    assert first.startswith("tag") and set(first) <= set("acgt\ufffd\n-") and first[:40] in printed
    error = fails(capsys, "sample", out, "--count", "2", "--length", "40", "--judge", "ngram")
    assert "words.txt" in error and (out / "samples-3" / "samples.txt").exists(), "texts are written, then judged"
    assert "prompt has 'xy'" in fails(capsys, "sample", out, "--prompt", "taxy")
    assert "temperature" in fails(capsys, "sample", out, "--temperature", "0")
    assert "guidance" in fails(capsys, "sample", out, "--guidance", "nan")
