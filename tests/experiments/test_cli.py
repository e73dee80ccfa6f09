"""The `dblocks` command, end to end on a run of seconds."""

from __future__ import annotations

import json
import sys

import numpy
import pytest
import torch
from PIL import Image

from diffusionblocks.experiments import cli
from diffusionblocks.experiments.export import load_alphabet, load_model

TINY = (
    "--model.dim 16 --model.layers 3 --model.heads 2 --model.mlp 32 --model.cond 8 --model.patch 4 --steps 25 "
    "--visit 5 --batch-size 16 --checkpoint-every 30 --walk-steps 4 --tune-lr 4e-3 --tune-warmup 0.05"
).split()


def dblocks(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dblocks", *map(str, arguments)])
        cli.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    baselines = "--baseline end-to-end checkpointing forward-forward".split()
    dblocks("train", "vit-digits", *TINY, "--out", out, *baselines)
    return out


def test_a_run_folder_holds_everything(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["results"]) == ["block-wise", "end-to-end", "checkpointing", "forward-forward"]
    for name, result in summary["results"].items():
        assert 0 <= result["test"]["accuracy"] <= 100 and result["seconds"] > 0, name
    ours = summary["results"]["block-wise"]
    assert {step["block"] for step in ours["test"]["walk"]} == {0, 1, 2}
    assert len(ours["test"]["regret_bits"]) == 3 and ours["test"]["images"] == 360
    assert sum(ours["memory"].values()) == pytest.approx(sum(ours["plan"].values()), rel=0.05)
    memory = {name: result["memory"]["activations"] for name, result in summary["results"].items()}
    assert memory["checkpointing"] < memory["end-to-end"] and memory["block-wise"] < memory["end-to-end"]
    assert summary["results"]["checkpointing"]["choice"] == summary["results"]["end-to-end"]["choice"]
    assert {p.name for p in folder.glob("*.png")} >= {"loss.png", "walk.png", "memory.png", "partition.png"}
    assert (folder / "config.yaml").exists() and (folder / "checkpoint/manifest.json").exists()
    runs = {json.loads(line)["run"] for line in (folder / "metrics.jsonl").read_text().splitlines()}
    assert runs == set(summary["results"])


def test_resuming_a_finished_run_changes_nothing(folder, capsys):
    before = json.loads((folder / "summary.json").read_text())["results"]
    dblocks("resume", folder)
    assert json.loads((folder / "summary.json").read_text())["results"] == before
    assert "block-wise" in capsys.readouterr().out


def test_eval_repeats_the_summary(folder, capsys):
    dblocks("eval", folder)
    out = capsys.readouterr().out
    accuracy = json.loads((folder / "summary.json").read_text())["results"]["block-wise"]["test"]["accuracy"]
    assert f"{accuracy:.2f}" in out and "information bound" in out
    assert not list(folder.glob("waiting*")), "reading leaves nothing behind"


def test_predict_and_export_agree(folder, tmp_path, capsys):
    from diffusionblocks.experiments.data.images import load, prepare
    from diffusionblocks.experiments.metrics.classification import walk
    from diffusionblocks.noise.partition import step_levels
    from diffusionblocks.sampling.sampler import Walker
    from diffusionblocks.training.offload import Residency

    data = load("digits")
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(data.test.images[i, 0].numpy()).save(files[-1])
    dblocks("predict", folder, *files)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [str(f) for f in files]

    dblocks("export", folder, "--to", tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    walker = Walker(model, Residency(model, device="cpu"))
    x = prepare(data.test.images[:3], data.mean, data.std, device="cpu")
    best = walk(walker, x, step_levels(model.partition, 4))[-1]["logits"].softmax(-1).max(-1)
    assert best.indices.tolist() == [line["label"] for line in lines]
    assert best.values.tolist() == pytest.approx([line["probability"] for line in lines], rel=1e-5)


def test_plot_draws_again(folder, capsys):
    (folder / "walk.png").unlink()
    dblocks("plot", folder)
    assert (folder / "walk.png").exists() and "walk.png" in capsys.readouterr().out


def test_plan_names_the_smallest_fit(capsys):
    dblocks("plan", "vit-digits", *TINY, "--memory", "24GiB")
    assert "B = 1 fits in 24GiB" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        dblocks("plan", "vit-digits", *TINY, "--memory", "1kB")
    assert stop.value.code == 1 and "nothing fits" in capsys.readouterr().out


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        dblocks(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


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
    assert "is none that PyTorch knows" in fails(
        capsys, "train", "vit-digits", "--device", "gpu", "--out", tmp_path / "z"
    )
    assert "overlap" in fails(capsys, "train", "vit-digits", "--overlap", "-1", "--out", tmp_path / "z")
    assert not (tmp_path / "z").exists(), "what is refused leaves no folder"
    assert "must end in .safetensors" in fails(capsys, "export", folder, "--to", tmp_path / "x.pt")
    if not torch.cuda.is_available():
        assert "no GPU" in fails(capsys, "train", "vit-digits", "--device", "cuda", "--out", tmp_path / "y")


def test_data_that_cannot_be_read_leaves_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        dblocks("train", "dit-digits", "--data", "folder", "--folder", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert "needs folder=" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_foreign_model_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not written by"):
        load_model(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a sound"):
        load_model(tmp_path / "b.safetensors")


def test_a_classifier_has_no_alphabet(folder, tmp_path):
    dblocks("export", folder, "--to", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no language model"):
        load_alphabet(tmp_path / "model.safetensors")


def test_predictions_of_garbage_config_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("blocks: [")
    with pytest.raises(SystemExit):
        dblocks("resume", tmp_path)


def test_a_text_that_has_changed_is_not_read_as_the_old_one(tmp_path, capsys):
    text = tmp_path / "words.txt"
    text.write_text("acgt" * 400)
    tiny = "--model.dim 16 --model.layers 2 --model.heads 2 --model.mlp 32 --steps 4 --length 16 --batch-size 4".split()
    out = tmp_path / "run"
    dblocks("train", "lm-text", "--text", text, *tiny, "--tune-lr", "4e-3", "--out", out)
    dblocks("sample", out, "--count", "2", "--length", "40", "--prompt", "tag")
    samples = (out / "samples" / "samples.txt").read_text()
    assert samples.startswith("tag") and set(samples) <= set("acgt\ufffd\n-")
    dblocks("export", out, "--to", tmp_path / "lm.safetensors")
    assert load_alphabet(tmp_path / "lm.safetensors").rstrip("\ufffd") == "acgt"
    assert load_model(tmp_path / "lm.safetensors").target.table.shape[0] == 64
    text.write_text("bcgt" * 400)
    for command in ("sample", "resume", "eval"):
        assert "not those it was trained on" in fails(capsys, command, out)
