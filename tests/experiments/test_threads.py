"""Small networks compute with one thread, where nobody asked for another number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusionblocks.experiments import commands
from diffusionblocks.experiments.models import ViTConfig
from diffusionblocks.experiments.tasks import task_of
from diffusionblocks.experiments.tasks.vit import ViTRun
from diffusionblocks.experiments.threads import CHOSEN_BY, spare_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    for name in CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)


def test_a_small_network_takes_one_and_tells_how_to_take_more(capsys):
    spare_threads(nn.Linear(10, 10), CPU)
    said = capsys.readouterr().err
    assert torch.get_num_threads() == 1
    assert "one thread of 2" in said and "110 parameters" in said and "OMP_NUM_THREADS" in said


@pytest.mark.parametrize(
    "model, device, environment",
    [
        (nn.Linear(1001, 1000), CPU, None),
        (nn.Linear(10, 10), torch.device("cuda"), None),
        (nn.Linear(10, 10), CPU, "OMP_NUM_THREADS"),
    ],
)
def test_others_stay_as_they_are(capsys, monkeypatch, model, device, environment):
    if environment:
        monkeypatch.setenv(environment, "2")
    spare_threads(model, device)
    assert torch.get_num_threads() == 2 and not capsys.readouterr().err


def test_a_run_does_so(tmp_path):
    model = ViTConfig(dim=16, layers=3, heads=2, mlp=32, cond=8, patch=4)
    commands.trainer_of(task_of(ViTRun(model=model, out=tmp_path, device="cpu")))
    assert torch.get_num_threads() == 1
