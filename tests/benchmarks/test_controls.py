"""Unconnected machines: they begin alike, draw apart, and their weights are averaged. And what FLOPs are counted."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from diffusionblocks.experiments.tasks.vit import ViTTask

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def task(tmp_path):
    return ViTTask(tiny.config(tmp_path, steps=2, blocks=1))


def test_a_soup_is_the_mean_of_runs_of_other_seeds(benchmarks, task, monkeypatch):
    controls, seen = benchmarks("controls"), []
    start = task.model().state_dict()

    def trained(own, begun, seed, rows):
        assert all(torch.equal(t, start[name]) for name, t in begun.items())
        return {name: t + seed if t.is_floating_point() else t for name, t in begun.items()}

    monkeypatch.setattr(controls, "trained", trained)
    monkeypatch.setattr(task, "evaluate", lambda model, split: seen.append(model.state_dict()) or {"accuracy": 1.0})
    row = controls.soup(task, 3)
    assert row["val"] == row["test"] == {"accuracy": 1.0}
    for name, t in seen[0].items():  # of seeds 0, 1000 and 2000
        torch.testing.assert_close(t, start[name] + 1000 if t.is_floating_point() else start[name])


def test_machines_asked_together_say_the_mean_of_their_outputs(benchmarks, task, monkeypatch):
    controls, seen = benchmarks("controls"), []
    with pytest.raises(ValueError, match="fixed codebook"):
        controls.ensemble(ViTTask(replace(task.config, recipe="published")), 3)
    start = task.model()
    trained = {n for n, p in start.named_parameters() if p.requires_grad}
    states = [{n: t + torch.randn_like(t) if n in trained else t for n, t in start.state_dict().items()} for _ in "123"]
    runs = iter(states)
    monkeypatch.setattr(controls, "trained", lambda own, begun, seed, rows: next(runs))
    monkeypatch.setattr(task, "evaluate", lambda model, split: seen.append(model) or {"layer_evaluations": 8.0})
    row = controls.ensemble(task, 3)
    assert row["val"] == row["test"] == {"layer_evaluations": 24.0}, "all run for each answer"
    x = torch.randn_like(task.example()[0])
    z = torch.randn(len(x), *start.target.known_shape())
    members = [controls.loaded(task, state).eval() for state in states]
    raw = torch.stack([member.denoise(x, z, 1.0).raw for member in members]).mean(0)
    torch.testing.assert_close(seen[0].denoise(x, z, 1.0).raw, raw)
    assert not torch.allclose(raw, members[0].denoise(x, z, 1.0).raw, rtol=1e-2)
    assert len(seen[0].blocks[0].layers) == 3 * len(start.blocks[0].layers), "all run for each answer"


def test_machines_begin_alike_and_draw_apart(benchmarks, task):
    controls = benchmarks("controls")
    start = {name: t.clone() for name, t in task.model().state_dict().items()}
    one, again, other = (controls.trained(task, start, seed, controls.Rows()) for seed in (0, 0, 1000))
    assert all(torch.equal(one[name], again[name]) for name in start)
    assert any(not torch.equal(one[name], other[name]) for name in start)
    assert any(not torch.equal(one[name], start[name]) for name in start)


def test_machines_of_all_seeds_train_on_one_split(benchmarks, task, monkeypatch):
    """Else what one machine judges others have trained on."""
    controls, seen = benchmarks("controls"), []
    kept = ViTTask.trainer
    monkeypatch.setattr(ViTTask, "trainer", lambda own, *args: seen.append(own.data) or kept(own, *args))
    start = {name: t.clone() for name, t in task.model().state_dict().items()}
    controls.trained(task, start, 1000, controls.Rows())
    assert seen and seen[0] is task.data


def test_flops_of_training_are_those_of_the_layers_that_run(benchmarks, tmp_path):
    flops = benchmarks("flops")
    base = tiny.config(tmp_path, steps=2)
    counts = {}
    for name, (task, model, steps) in flops.models(base).items():
        counts[name] = flops.training(task, model, steps), flops.inference(task, model)
    ours, whole, alone = counts.values()
    assert ours[0] == pytest.approx(alone[0], rel=0.01), "as many steps of as many layers"
    assert 0.8 < ours[0] / whole[0] < 1.6, "stem and head run in every block's steps"
    assert ours[1] == pytest.approx(alone[1], rel=0.01) and ours[1] > 0
