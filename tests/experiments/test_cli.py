"""The `dblocks` command, end to end on a run of seconds."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import numpy
import pytest
import torch
from PIL import Image

from diffusionblocks.experiments import cli
from diffusionblocks.experiments.config import to_yaml
from diffusionblocks.experiments.presets import RUNS
from diffusionblocks.experiments.run_folder import read_config

TINY = (
    "--model.dim 16 --model.layers 3 --model.heads 2 --model.mlp 32 --model.cond 8 --model.patch 4 --steps 25 "
    "--visit 5 --batch-size 16 --checkpoint-every 30 --sampling-steps 4 --tune-lr 4e-3"
).split()


def dblocks(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dblocks", *map(str, arguments)])
        cli.main()


def fails(capsys, *arguments, code=2):
    with pytest.raises(SystemExit) as stop:
        dblocks(*arguments)
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.splitlines()) <= 2, error
    return error


def files(folder):
    """Every file of a folder, with its time."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module", autouse=True)
def spared():
    """Nothing: the command is tested whole, its pictures too."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "mine.yaml"
    config.write_text(to_yaml(RUNS["vit-digits"][1]).replace("tune_warmup:\n- 0.05\n- 0.2\n", "tune_warmup: [5e-2]\n"))
    out = tmp_path_factory.mktemp("cli") / "run"
    baselines = "--baseline end-to-end checkpointing forward-forward".split()
    dblocks("train", "vit-digits", "--config", config, *TINY, "--out", out, *baselines)
    return out


def test_a_run_folder_holds_everything(folder):
    assert read_config(folder).tune_warmup == (0.05,), "from the file of --config"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["results"]) == ["block-wise", "end-to-end", "checkpointing", "forward-forward"]
    for name, result in summary["results"].items():
        assert 0 <= result["test"]["accuracy"] <= 100 and result["seconds"] > 0, name
    ours = summary["results"]["block-wise"]
    assert {step["block"] for step in ours["test"]["trajectory"]} == {0, 1, 2}
    assert len(ours["test"]["regret_bits"]) == 3 and ours["test"]["images"] == 360
    assert sum(ours["memory"].values()) == pytest.approx(sum(ours["plan"].values()), rel=0.05)
    memory = {name: result["memory"]["activations"] for name, result in summary["results"].items()}
    assert memory["checkpointing"] < memory["end-to-end"] and memory["block-wise"] < memory["end-to-end"]
    assert summary["results"]["checkpointing"]["choice"] == summary["results"]["end-to-end"]["choice"]
    assert {p.name for p in folder.glob("*.png")} >= {"loss.png", "trajectory.png", "memory.png", "partition.png"}
    assert (folder / "facts.json").exists() and (folder / "checkpoint/manifest.json").exists()
    runs = {json.loads(line)["run"] for line in (folder / "metrics.jsonl").read_text().splitlines()}
    assert runs == set(summary["results"])


def test_resuming_a_finished_run_changes_nothing(folder, capsys):
    before = json.loads((folder / "summary.json").read_text())["results"]
    dblocks("resume", folder)
    assert json.loads((folder / "summary.json").read_text())["results"] == before
    said = capsys.readouterr().out
    assert "run; test and val: accuracy %" in " ".join(said.split())
    assert f"pictures in {folder}: " in said and "loss.png, memory.png" in said
    assert "block-wise" in said and "this run was finished; to lengthen it: dblocks resume" in said


def test_what_a_resumed_run_changes_is_told(folder, capsys, monkeypatch):
    steps = cli.read_config(folder).steps
    monkeypatch.setattr(cli.commands, "resume", lambda folder, **changes: sys.exit(0))
    with pytest.raises(SystemExit):
        dblocks("resume", folder, "--steps", "9000", "--lr", "0.5")
    said = capsys.readouterr().err
    assert f"steps: {steps} before, 9000 from here on" in said and "0.5 from here on" in said


def test_a_file_is_no_run_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "is a file: give --out a folder" in fails(capsys, "train", "vit-digits", "--out", tmp_path / "file")


def test_eval_repeats_the_summary_and_writes_nothing(folder, capsys):
    before = files(folder)
    dblocks("eval", folder)
    out = capsys.readouterr().out
    accuracy = json.loads((folder / "summary.json").read_text())["results"]["block-wise"]["test"]["accuracy"]
    assert f"{accuracy:.4g}" in out and "information bound" in out
    assert files(folder) == before


def test_an_exported_folder_is_used_as_a_run(folder, tmp_path, capsys):
    from diffusionblocks.experiments.data.images import load

    images = load("digits").test.images
    names = [tmp_path / f"{i}.png" for i in range(3)]
    for i, name in enumerate(names):
        Image.fromarray(images[i, 0].numpy()).save(name)
    before = files(folder)
    dblocks("predict", folder, *names)
    lines = capsys.readouterr().out
    assert [json.loads(line)["file"] for line in lines.splitlines()] == [str(name) for name in names]
    dblocks("export", folder, "--out", tmp_path / "model")
    assert files(folder) == before
    card = (tmp_path / "model" / "README.md").read_text()
    assert 'open_exported(Path("model"))' in card and "dblocks predict model IMAGES" in card and "build()" not in card
    capsys.readouterr()
    dblocks("predict", tmp_path / "model", *names)
    assert capsys.readouterr().out == lines
    dblocks("eval", folder)
    evaluated = capsys.readouterr().out
    dblocks("eval", tmp_path / "model")
    assert capsys.readouterr().out == evaluated


def test_plot_draws_again(folder, capsys):
    (folder / "trajectory.png").unlink()
    dblocks("plot", folder)
    assert (folder / "trajectory.png").exists() and "trajectory.png" in capsys.readouterr().out


def test_plan_names_the_smallest_fit(capsys):
    dblocks("plan", "vit-digits", *TINY, "--memory", "24GiB")
    out = capsys.readouterr().out
    assert out.startswith("vit, batch 16, stem and head shared by all blocks; in bytes: K, M and G are KiB, MiB")
    assert "24GiB: B = 1, all blocks on the device" in out
    with pytest.raises(SystemExit) as stop:
        dblocks("plan", "vit-digits", *TINY, "--memory", "1kB")
    assert stop.value.code == 1 and "nothing fits" in capsys.readouterr().out
    assert "must be like 24GiB" in fails(capsys, "plan", "vit-digits", "--memory", "")


def test_errors_are_one_line_and_say_what_to_do(folder, tmp_path, capsys):
    assert "already holds a run" in fails(capsys, "train", "vit-digits", *TINY, "--out", folder)
    assert "not a run folder" in fails(capsys, "resume", tmp_path)
    assert "blocks=9 exceeds" in fails(capsys, "train", "vit-digits", "--blocks", "9", "--out", tmp_path / "x")
    assert "switch must name" in fails(capsys, "train", "vit-digits", "--switch", "nothing", "--out", tmp_path / "x")
    wrong = tmp_path / "wrong.png"
    Image.fromarray(numpy.zeros((9, 9), dtype=numpy.uint8)).save(wrong)
    assert "is 9x9, not 8x8" in fails(capsys, "predict", folder, wrong)
    wrong.write_text("text")
    assert "not an image" in fails(capsys, "predict", folder, wrong)
    assert "name the image files" in fails(capsys, "predict", folder)
    assert "steps must be at least 1" in fails(capsys, "eval", folder, "--steps", "0")
    assert "count must be at least 1" in fails(capsys, "sample", folder, "--count", "0")
    assert "makes no samples" in fails(capsys, "sample", folder) and not (folder / "samples").exists()
    for device in ("gpu", "mps", "meta"):
        assert "device" in fails(capsys, "train", "vit-digits", "--device", device, "--out", tmp_path / "z")
    assert "overlap must be at" in fails(capsys, "train", "vit-digits", "--overlap", "-1", "--out", tmp_path / "z")
    assert "clip" in fails(capsys, "train", "vit-digits", "--clip", "-1", "--out", tmp_path / "z")
    assert not (tmp_path / "z").exists(), "what is refused leaves no folder"
    assert "wrong.png" in fails(capsys, "export", folder, "--out", wrong)
    assert "wrong.png" in fails(capsys, "export", folder, "--to", wrong), "its name before"
    alone = "--baseline", "--tune-lr", "1e-3"
    assert "--baseline without a name trains none" in fails(capsys, "train", "vit-digits", *alone)
    if not torch.cuda.is_available():
        assert "no GPU" in fails(capsys, "train", "vit-digits", "--device", "cuda", "--out", tmp_path / "y")


def test_data_that_cannot_be_read_leaves_no_run(tmp_path, capsys):
    arguments = "--data", "folder", "--data-folder", tmp_path / "nowhere", "--out", tmp_path / "run"
    fails(capsys, "train", "dit-digits", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_foreign_model_folder_is_refused(tmp_path, capsys):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b"}}))
    assert "foreign" in fails(capsys, "predict", tmp_path, "a.png")


def test_a_garbage_config_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("blocks: [")
    assert "config.yaml" in fails(capsys, "resume", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [("train vit-digits --stepz 5", "--steps"), ("train vit-digit", "vit-digits"), ("trian vit-digits", "train"),
     ("train vit-digits --lr abc", "--lr must be a number, got abc"), ("train", "vit-digits"),
     ("sample x --temprature 2", "--temperature"), ("train vit-digits --precision int8", "bfloat16"),
     ("train --steps 5", "name a preset first, e.g. dblocks train vit-digits --steps"),
     ("--steps 5", "name a command first"), ("presets", "dblocks train --help lists the presets"),
     ("train vit-digits --steps abc", "dblocks: --steps must be a whole number, got abc"),
     ("resume x --clip a", "--clip must be a number"),
     ("train vit-digits --split 1 a", "--split doesn't take '1 a'"), ("plan vit-digits --train-blocks a", "take 'a'"),
     ("train vit-digits --steps None", "steps must be a whole number, got None"),
     ("train vit-digits --model.heads 5", "dblocks: heads=5 must divide dim=64"),
     ("predict x .", "not a run folder")],
)  # fmt: skip
def test_what_is_mistyped_gets_one_suggestion(arguments, suggestion, capsys):
    assert suggestion in fails(capsys, *arguments.split())


def help_of(capsys, *command):
    """The options of a command, each with its help text."""
    with pytest.raises(SystemExit) as stop:
        dblocks(*command, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "{None}" not in out and "(default: )" not in out
    text = re.sub(r"[│╭╮╰╯─|+]|-{5,}", "", out)  # without frames
    entries = re.split(r"\n\s*(?=--?[a-z])", text)[1:]
    return {
        entry.split()[0]: re.sub(r"\(default:.*?\)|\(required\)", "", " ".join(entry.split()[1:]), flags=re.S)
        for entry in entries
    }


@pytest.mark.parametrize("preset", RUNS)
def test_every_option_of_a_preset_has_a_text(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = help_of(capsys, "train", preset)
    for name, text in options.items():
        assert re.search(r"[A-Za-z]{2,} [a-z]{2,}", text), (name, text)
    shown = [name for name in options if not name.startswith("--model.")]
    assert len(shown) <= 32, shown


@pytest.mark.parametrize("command", ["resume", "eval", "sample", "predict", "plot", "export"])
def test_every_option_of_a_command_has_a_text(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, text in help_of(capsys, command).items():
        assert re.search(r"[a-z]{2,} [a-z]{2,}", text), (name, text)


def test_options_that_the_help_leaves_out_are_taken(monkeypatch, capsys):
    hidden = {f.name for f in dataclasses.fields(RUNS["vit-digits"][1]) if str(f.type).startswith("Hidden")}
    shown, seen = help_of(capsys, "plan", "vit-digits"), []
    monkeypatch.setattr(cli, "plan_of", lambda task: seen.append(task.config) or sys.exit(0))
    given = (
        "--overlap 0.5 --checkpoint-minutes 3 --tune-warmup 0.1 --weight-decay 0.5 --compile --train-blocks 0 2 "
        "--no-adapt --capture False --no-pin --checkpoint-layers --log-every 7 --slots 2 "
        "--moments bfloat16 --sampler heun"
    )
    with pytest.raises(SystemExit):
        dblocks("plan", "vit-digits", *given.split())
    default = RUNS["vit-digits"][1]
    assert {name for name in hidden if getattr(seen[0], name) != getattr(default, name)} == hidden
    assert not {f"--{name}".replace("_", "-") for name in hidden} & shown.keys()


def test_vit_digits_shows_at_most_thirty_options(capsys):
    assert len([name for name in help_of(capsys, "train", "vit-digits") if not name.startswith("--model.")]) <= 30
