"""Predictions are those of the evaluation, with the names of classes where there are any."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import tiny
from diffusionblocks.experiments.data.images import load
from diffusionblocks.experiments.predict import predict
from diffusionblocks.experiments.tasks.recurrent import RecurrentRun, RecurrentTask
from diffusionblocks.experiments.tasks.vit import ViTTask


def test_labels_names_and_probabilities(tmp_path):
    data, files = load("digits"), []
    for i in range(4):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(data.test.images[i, 0].numpy()).save(files[-1])
    names = [f"class {i}" for i in range(10)]
    task = ViTTask(tiny.config(tmp_path), data.facts() | {"class_names": names})
    model = task.model().eval()
    lines = list(predict(task, model, files))
    assert "data" not in vars(task), "no data are read"
    x, _ = task.inputs("test", torch.device("cpu"))
    p = model(x[:4], steps=4).softmax(-1)
    assert [line["label"] for line in lines] == p.argmax(-1).tolist()
    assert [line["probability"] for line in lines] == pytest.approx(p.amax(-1).tolist(), rel=1e-4)
    assert [line["name"] for line in lines] == [names[line["label"]] for line in lines]
    task.stored["class_names"] = []
    assert "name" not in next(predict(ViTTask(task.config, task.stored), model, files))
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    some = predict(task, model, [tmp_path / "wide.png", files[0], tmp_path / "gone.png"])
    assert next(some)["file"] == str(files[0]), "other files' faults don't lose a label"
    with pytest.raises(ValueError, match=r"wide\.png is 9x8, not 8x8.*gone\.png can't be read: no such file or dir"):
        next(some)


def test_other_tasks_give_no_labels(tmp_path):
    task = RecurrentTask(RecurrentRun(out=tmp_path))
    with pytest.raises(ValueError, match="a recurrent run gives no labels"):
        next(predict(task, task.model(), [tmp_path]))
