"""A checkpoint goes on to the same bits on the device it was written on, and opens on any other."""

from __future__ import annotations

import json
import math

import pytest
import torch

import tiny_all
from diffusionblocks.experiments import commands as jobs
from diffusionblocks.experiments import snapshots
from diffusionblocks.experiments.tasks import adapter_of

CPU = torch.device("cpu")
MIDDLE, END = 7, 14  # in the middle of a visit of three steps
every_architecture = pytest.mark.parametrize("name", tiny_all.CONFIGS)


def trained(config, device, until):
    session = tiny_all.session(config, device)
    losses = tiny_all.run(session, until=until)
    return session, losses


def resumed(config, device, folder):
    session = tiny_all.session(config, device)
    assert snapshots.restore(session, folder) == 1.5
    return session


@every_architecture
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path, device, repeatable):
    config = tiny_all.config(name, tmp_path / "whole", steps=40)
    whole, losses = trained(config, device, END)
    half, _ = trained(tiny_all.config(name, tmp_path / "half", steps=40), device, MIDDLE)
    snapshots.save(half, tmp_path / "checkpoint", seconds=1.5)
    back = resumed(tiny_all.config(name, tmp_path / "back", steps=40), device, tmp_path / "checkpoint")
    assert back.step == MIDDLE
    assert tiny_all.run(back, until=END) == losses[MIDDLE:]
    expected, found = tiny_all.tensors(whole), tiny_all.tensors(back)
    assert all(torch.equal(t, expected[key]) for key, t in found.items())
    if whole.meter:
        assert torch.equal(whole.meter.sums, back.meter.sums)


@pytest.mark.parametrize("name", ["vit", "causal_lm"])
@pytest.mark.parametrize("store", ["host", "disk"])
def test_a_checkpoint_of_the_cpu_goes_on_on_a_device_and_back(name, store, tmp_path, device):
    there, _ = trained(tiny_all.config(name, tmp_path / "cpu", steps=40), CPU, MIDDLE)
    folder = tmp_path / "checkpoint"
    snapshots.save(there, folder, seconds=1.5)
    config = tiny_all.config(name, tmp_path / "device", steps=40, store=store)
    back = resumed(config, device, folder)
    expected, found = tiny_all.tensors(there), tiny_all.tensors(back)
    assert all(torch.equal(t, expected[key]) for key, t in found.items()), "nothing is rounded on the way"
    there_losses, back_losses = tiny_all.run(there, until=END), tiny_all.run(back, until=END)
    assert back_losses == pytest.approx(there_losses, rel=1e-3)  # as in test_steps
    snapshots.save(back, folder, seconds=1.5)
    home = resumed(tiny_all.config(name, tmp_path / "home", steps=40), CPU, folder)
    expected, found = tiny_all.tensors(back), tiny_all.tensors(home)
    assert home.step == END and all(torch.equal(t, expected[key]) for key, t in found.items())


# on the CPU the others have their own tests
@pytest.mark.parametrize(
    "name, device", [("vit", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in tiny_all.CONFIGS)]
)
def test_the_command_trains_evaluates_and_resumes_on_a_device(name, device, tmp_path):
    """A whole run: training, its checkpoint, evaluation by averages, the plan of the memory; then nothing is left."""
    config = tiny_all.config(name, tmp_path / "run", steps=9, walk_steps=4, device=device, store="auto")
    summary = jobs.start(config)
    result = summary["results"]["block-wise"]
    assert math.isfinite(result["test"][adapter_of(config).metric.key])
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] > 0 for row in rows)
    for category, count in result["plan"].items():
        if category != "activations":  # kernels of a device may save other tensors
            assert result["memory"][category] == pytest.approx(count, rel=0.05), category
    again = jobs.resume(config.out)
    assert again["results"] == summary["results"]
    _, walker = jobs.open_run(config.out)
    assert walker.device.type == device
    last = len(walker.model.blocks) - 1
    walker.activate(last)
    assert {p.device.type for p in walker.model.blocks[last].parameters()} == {device}
