"""The study of forks: what an arm trains is what its name says, and all are compared on the same samples and noise."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusionblocks.experiments.presets import RUNS
from diffusionblocks.experiments.tasks import task_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("forks", "fork_arms", "fork_training", "variants"):
        sys.modules.pop(name, None)


@pytest.fixture
def task(benchmarks, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, " * 200)
    base = RUNS["mdlm-text"][1]
    small = replace(
        base, text=str(tmp_path / "text.txt"), length=16, model=replace(base.model, vocab_size=32, layers=4)
    )
    return task_of(benchmarks("variants").tiny(small.in_blocks(2)))


@pytest.fixture
def base(benchmarks, task, tmp_path):
    """The setting of a base that was trained for a few steps, its states, and the task in two blocks."""
    training = benchmarks("fork_training")
    setting = training.setting_of(task, CPU)
    warm, cooled = training.states("base", setting, tmp_path)
    return setting, warm, cooled, benchmarks("forks").ranged(task, 1)


def changed(weights, base):
    return {name for name, t in weights.items() if not torch.equal(t, base[name])}


def test_a_base_is_trained_once_and_cools_down(benchmarks, task, base, tmp_path, monkeypatch):
    training = benchmarks("fork_training")
    setting, warm, cooled, _ = base
    assert int(warm["step"]) == 32 and int(cooled["step"]) == 40
    assert changed(training.weights_of(cooled), training.weights_of(warm))
    monkeypatch.setattr(training, "train_base", lambda setting: pytest.fail("trained again"))
    again = training.states("base", setting, tmp_path)[1]
    assert again.keys() == cooled.keys() and all(torch.equal(t, cooled[name]) for name, t in again.items())
    rates = [training.warm_and_cool(done) for done in (0.01, 0.5, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([0.5, 1, 1, 0.55, 0.1])


def test_each_arm_trains_what_its_name_says(benchmarks, base):
    training, arms = benchmarks("fork_training"), benchmarks("fork_arms").ARMS
    setting, warm, cooled, ranges = base
    monkey = pytest.MonkeyPatch()
    monkey.setattr(training, "EXTRA", 0.1)
    model, before = ranges.model(), training.weights_of(cooled)
    made = {
        name: training.trained(setting, model, arm, warm if arm.early else cooled, 0.3)[0]
        for name, arm in arms.items()
        if arm.finer == 1
    }
    monkey.undo()
    assert changed(made["A0 lone"][0], before) and not changed(*made["A0 lone"])
    ranged = made["A1 ranges"]
    assert changed(ranged[0], before) and changed(ranged[1], ranged[0])
    low = made["A6 the lowest noise alone"]
    assert not changed(low[0], before) and changed(low[1], before)
    lora = made["A5 LoRA a range"]
    assert changed(lora[0], before) == {n for n, t in before.items() if ".layers." in n and t.dim() == 2}
    last = made["A8 last layer a range"]
    assert changed(last[0], last[1]) == {name for name in before if ".layers.1." in name}
    merged = made["A7 A2, merged"]
    assert not changed(*merged)
    apart = [made["A2 ranges, 30 % of all noise"][b] for b in range(2)]
    for name, t in merged[0].items():
        torch.testing.assert_close(t, before[name] + 0.25 * sum(one[name] - before[name] for one in apart))


def test_a_row_compares_samples_in_pairs(benchmarks, task, tmp_path):
    forks, arms = benchmarks("forks"), benchmarks("fork_arms")
    with pytest.raises(ValueError, match="comes first"):
        forks.fork("A1 ranges", task, tmp_path, CPU)
    lone = forks.fork(arms.LONE, task, tmp_path, CPU)
    mixed = forks.fork("A4 mixture of two", task, tmp_path, CPU)
    assert lone["test"]["against lone"] == {"mean": 0.0, "error": 0.0}
    found = mixed["test"]["against lone"]
    assert found["mean"] == pytest.approx(mixed["test"]["loss"] - lone["test"]["loss"]) and found["error"] > 0
    assert len(mixed["test"]["against lone by level"]["mean"]) == forks.LEVELS and mixed["base"] == lone["base"]
    assert lone["tried"] and min(lone["tried"]) == lone["val"]["loss"]
