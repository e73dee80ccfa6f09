"""Saved models that aren't what was asked for are told apart, and named with who loads them."""

from __future__ import annotations

import json

import pytest
from torch import nn

import diffusionblocks as db

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
