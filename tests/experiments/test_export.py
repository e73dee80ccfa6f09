"""Exported folders: weights, config and facts of a run, in the layout that other tools load."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import diffusionblocks as db
import tiny
from diffusionblocks.checkpoint.files import CheckpointError
from diffusionblocks.experiments import commands
from diffusionblocks.experiments.export import export, open_exported
from diffusionblocks.experiments.plotting import plots
from diffusionblocks.experiments.run_folder import identity


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    commands.start(tiny.config(folder))
    return folder


def test_what_is_exported_comes_back(run, tmp_path):
    task, model = commands.open_run(run)
    export(task, model, tmp_path / "model")
    again, loaded = open_exported(tmp_path / "model")
    assert identity(again.config) == identity(task.config) and again.stored == task.facts
    assert loaded.partition == model.partition and not loaded.training
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(x), model(x))


def test_averages_are_exported_by_names_that_an_index_maps(run, tmp_path):
    task, model = commands.open_run(run)
    export(task, model, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    stored = load_file(next((run / "checkpoint").glob("block_1*.safetensors")))
    name = next(name for name in stored if name.startswith("ema/"))
    tensor = load_file(tmp_path / index[f"blocks.1.{name.removeprefix('ema/')}"])
    assert torch.equal(tensor[f"blocks.1.{name.removeprefix('ema/')}"], stored[name])
    assert not torch.equal(stored[name], stored[name.replace("ema/", "weight/")])


def test_a_model_of_no_run_is_refused(tmp_path):
    layers = [torch.nn.Linear(8, 8) for _ in range(2)]
    model = db.from_layers(
        layers, stem=torch.nn.Linear(4, 8), head=torch.nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=2
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no model of a run: .dblocks export"):
        commands.open_run(tmp_path)


def test_a_model_saved_into_a_run_leaves_it_a_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    _, model = commands.open_run(run)
    model.save_pretrained(tmp_path / "run")
    commands.open_run(tmp_path / "run")


def test_a_damaged_folder_is_refused_by_name(run, tmp_path):
    export(*commands.open_run(run), tmp_path)
    file = tmp_path / "model.block_1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.block_1\.safetensors"):
        commands.open_run(tmp_path)


def test_an_exported_folder_has_no_pictures_to_draw(run, tmp_path):
    export(*commands.open_run(run), tmp_path)
    with pytest.raises(ValueError, match="is an exported model, which holds no results to draw: give the run folder"):
        plots.draw(tmp_path)


def test_a_folder_that_holds_a_run_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    before = sorted(path.name for path in (tmp_path / "other").iterdir())
    opened = commands.open_run(run)
    with pytest.raises(ValueError, match="other already holds a run: give another --out"):
        export(*opened, tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == before
    (tmp_path / "afile").write_text("")
    with pytest.raises(ValueError, match="afile is a file: --out needs a folder"):
        export(*opened, tmp_path / "afile")
    for _ in range(2):  # a model's own folder may be written again
        export(*opened, tmp_path / "model")
