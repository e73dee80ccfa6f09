"""The device to train on, by name."""

from __future__ import annotations

import pytest
import torch

from diffusionblocks.training.devices import pick_device


def test_auto_is_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device='cuda:2' but there are 2 GPUs"):
        pick_device("cuda:2")


@pytest.mark.parametrize(("name", "words"), [
    ("tpu7", "none that PyTorch knows"), ("mps", "can't train here"), ("meta", "can't train here"),
    ("cuda", "sees no GPU"), (None, "none that PyTorch knows"),
])  # fmt: skip
def test_what_cannot_train_is_refused_by_name(monkeypatch, name, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device={name!r}.*{words}.*use "):
        pick_device(name)
