"""Saved models that aren't what was asked for are told apart, and named with who loads them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import diffusionblocks as db
import tiny_transformers as tiny
from diffusionblocks.checkpoint.shards import load_shards, read_index, save_shards

LLAMA = {"config.json": {"architectures": ["LlamaForCausalLM"]}}


@pytest.mark.parametrize(("files", "words"), [
    (LLAMA, r"holds a LlamaForCausalLM: LlamaForCausalLM\.from_pretrained\(folder\) loads it, and convert"),
    (LLAMA | {"model.safetensors.index.json": {"metadata": {}, "weight_map": {}}}, "holds a LlamaForCausalLM"),
    ({"config.json": {"_class_name": "DiTTransformer2DModel"}}, "holds a DiTTransformer2DModel"),
    ({"model_index.json": {}}, r"holds a pipeline.*convert\(pipe\.transformer"),
    (LLAMA | {"adapter_config.json": {}}, "holds an adapter: peft"),
    ({"manifest.json": {}}, r"holds a Trainer's checkpoint: Trainer\(model\)\.load"),
    ({"config.json": {"model_type": "diffusionblocks"}}, "is missing: no save was completed there"),
    ({"config.json": []}, "is missing: no save was completed there"),
    ({"checkpoint/manifest.json": {}}, "is a run of `dblocks`: `dblocks export"),
])  # fmt: skip
def test_folders_of_others_are_refused_with_who_loads_them(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        db.load(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", "me/name"):
        with pytest.raises(ValueError, match=r"is no folder.*huggingface_hub\.snapshot_download"):
            db.load(path)


def test_a_saved_model_that_does_not_fit_is_told_apart(tmp_path):
    def build(layers=2, width=8, classes=3):
        return db.from_layers([nn.Linear(width, width) for _ in range(layers)], stem=nn.Linear(4, width),
                              head=nn.Linear(width, classes), target=db.LabelTarget(classes, width),
                              blocks=1)  # fmt: skip

    build().save_pretrained(tmp_path)
    faults = {
        (3, 8, 3): r"the model also has blocks\.0\.layers\.2\.\S+, .* and 1 more\. Build the model by the code",
        (1, 8, 3): r"the folder also has blocks\.0\.layers\.1\.",
        (2, 8, 4): r"of other shapes: .*head\.head\.weight is \(3, 8\) in the folder and \(4, 8\) in the model",
    }
    for sizes, words in faults.items():
        with pytest.raises(ValueError, match=words):
            db.load(tmp_path, build(*sizes))


def build(dtype=torch.float32):
    model = db.from_layers(
        [nn.Linear(4, 4), nn.Linear(4, 4)], stem=nn.Linear(3, 4), head=nn.Linear(4, 2), target=db.LabelTarget(2, 4),
        blocks=2,
    )  # fmt: skip
    return model.to(dtype)


@pytest.mark.parametrize("saved,into,fits", [
    (torch.bfloat16, torch.float32, True),
    (torch.float32, torch.bfloat16, False),
    (torch.float16, torch.bfloat16, False),
])  # fmt: skip
def test_weights_are_never_rounded_in_silence(tmp_path, saved, into, fits):
    model = build(saved)
    model.save_pretrained(tmp_path)
    if fits:
        loaded = db.load(tmp_path, build(into)).state_dict()
        assert all(torch.equal(t, loaded[name].to(t.dtype)) for name, t in model.state_dict().items())
    else:
        with pytest.raises(ValueError, match=f"dtypes that the model's can't hold: target.table is {saved} in the"):
            db.load(tmp_path, build(into))


def test_integers_are_no_weights(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    config, shards = read_index(tmp_path)[0], dict(load_shards(tmp_path))
    shards["block_0"] = {name: t.view(torch.int32) for name, t in shards["block_0"].items()}
    save_shards(tmp_path, shards, config)
    with pytest.raises(ValueError, match=r"dtypes that the model's can't hold: blocks\.0"):
        db.load(tmp_path, build())


def test_frozen_weights_stay_frozen(tmp_path):
    network = tiny.network("ViTForImageClassification")
    network.vit.requires_grad_(False)
    model = db.convert(network, 2, cond=0)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.save_pretrained(tmp_path)
    assert frozen and frozen == {name for name, p in db.load(tmp_path).named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("facts", [None, {}, [], {"partition": {}, "shape": None, "seed": 0, "step": 0}])
def test_a_config_of_something_else_is_refused(tmp_path, facts):
    build().save_pretrained(tmp_path)
    config, shards = read_index(tmp_path)[0], dict(load_shards(tmp_path))
    save_shards(tmp_path, shards, config | {"facts": facts})
    with pytest.raises(ValueError, match="config isn't one that save_pretrained wrote"):
        db.load(tmp_path, build())


def test_a_folder_in_a_files_place_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()  # no place for a card
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json is a folder"):
        db.load(tmp_path, build())
