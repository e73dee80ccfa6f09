"""Pictures of a run: drawn from what it wrote, changing with it; what is missing is refused by name."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from diffusionblocks.experiments.plotting import plots
from diffusionblocks.noise import density
from diffusionblocks.noise.information import information_bound
from diffusionblocks.noise.partition import Partition, equal_mass_edges, make_partition, step_levels
from diffusionblocks.training.memory import CATEGORIES

NAMES = ["loss", "levels", "walk", "memory", "partition", "bound"]
EVERY = ("end-to-end", "checkpointing", "forward-forward")


def evaluation(partition: Partition) -> dict[str, Any]:
    """An evaluation as a good model of ten classes would give it."""
    sigmas = list(equal_mass_edges(partition.density, 31))
    owners = partition.block_of(torch.tensor(sigmas)).tolist()
    known = [1 / (1 + s**-4) for s in sigmas]
    entropy, error = [0.12 * k + 0.001 for k in known], [0.03 * k + 0.0001 for k in known]
    read = information_bound(sigmas, entropy, error, owners)
    names = ("sigma", "block", "cross_entropy", "error", "bound")
    rows = zip(sigmas, owners, entropy, error, read.bound, strict=True)
    steps = step_levels(partition, 8)[:-1]
    return {
        "accuracy": 97.2,
        "images": 360,
        "walk": [
            {"step": i, "sigma": s, "block": int(partition.block_of(s)), "accuracy": 97.2 - 3 * 0.5**i}
            for i, s in enumerate(steps)
        ],
        "levels": [dict(zip(names, row, strict=True)) | {"accuracy": 98.0} for row in rows],
        "bound_bits": read.bound[-1] / math.log(2),
        "regret_bits": [r / math.log(2) for r in read.regret],
    }


def summary(blocks: int = 3, baselines: tuple[str, ...] = EVERY) -> dict[str, Any]:
    """summary.json of a run on made-up figures."""
    log_sigma = np.linspace(math.log(0.2), math.log(14), 65)
    noise = density.Tabulated(tuple(log_sigma), tuple(np.exp(-((log_sigma[1:] + 0.7) ** 2))))
    partition = make_partition(noise, max(6, blocks), blocks)
    bytes_ = dict(zip(CATEGORIES, (480_000, 477_000, 954_000, 477_000, 9_900_000), strict=True))
    results: dict[str, Any] = {
        "block-wise": {"test": evaluation(partition), "seconds": 60.0, "memory": bytes_, "plan": bytes_}
    }
    for name, accuracy in zip(EVERY, (95.4, 95.1, 71.0), strict=True):
        if name in baselines:
            large = {c: 2.6 * b for c, b in bytes_.items()}
            results[name] = {"test": {"accuracy": accuracy}, "seconds": 55.0, "memory": large}
    return {
        "config": {"model": {"classes": 10}},
        "partition": {
            "edges": list(partition.edges),
            "layers": list(partition.layers),
            "overlap": partition.overlap,
            "density": density.to_dict(partition.density),
        },
        "results": results,
    }


def rows(blocks: int = 3, baselines: tuple[str, ...] = EVERY) -> list[dict[str, Any]]:
    """metrics.jsonl of a run on made-up figures."""
    noise = np.random.default_rng(0)
    made = []
    for i in range(72):
        loss = (2.2 * math.exp(-i / 15) + 0.1) * float(noise.uniform(0.7, 1.3))
        made.append(
            {"run": "block-wise", "step": 25 * (i + 1), "block": i % blocks, "loss": loss, "seconds": 0.8 * i,
             "allocated": 12_000_000 + 30_000 * (i % blocks)}
        )  # fmt: skip
    for k, name in enumerate(baselines):
        made += [
            {
                "run": name,
                "step": 25 * (i + 1),
                "loss": 1.0,
                "seconds": 2.2 * i,
                "allocated": 32_000_000 - 9_000_000 * k,
            }
            for i in range(24)
        ]
    return made


def write_run(folder: Path, *, blocks: int = 3, baselines: tuple[str, ...] = EVERY) -> Path:
    """A run folder without its config and checkpoint."""
    write_rows(folder, rows(blocks, baselines))
    (folder / "summary.json").write_text(json.dumps(summary(blocks, baselines)))
    return folder


def write_rows(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(figure: Any, axes: int, colour: str) -> list[Any]:
    return [line for line in figure.axes[axes].get_lines() if to_rgb(line.get_color()) == to_rgb(colour)]


def run_of(folder: Path, **changes: Any) -> plots.Run:
    return plots.read_run(write_run(folder, **changes))


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_every_picture_is_a_png_of_a_readme_s_width(tmp_path, blocks):
    paths = plots.draw(write_run(tmp_path, blocks=blocks))
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for path in paths:
        height, width, _ = imread(path).shape
        assert 800 <= width <= 900 and 300 <= height <= 400
        assert imread(path).std() > 0.02
    assert not list(tmp_path.glob("*.tmp"))


def test_a_picture_changes_with_the_data_and_only_then(tmp_path):
    write_run(tmp_path)
    before = [path.read_bytes() for path in plots.draw(tmp_path)]
    assert [path.read_bytes() for path in plots.draw(tmp_path)] == before
    changed = summary()
    changed["results"]["block-wise"]["test"]["walk"][0]["accuracy"] = 10.0
    (tmp_path / "summary.json").write_text(json.dumps(changed))
    after = [path.read_bytes() for path in plots.draw(tmp_path)]
    assert [a != b for a, b in zip(after, before, strict=True)] == [name == "walk" for name in NAMES]


def test_losses_are_each_block_s_own(tmp_path):
    run = run_of(tmp_path)
    for block, colour in enumerate(plots.colours_of(run)):
        raw, smoothed = lines_of(plots.loss_figure(run), 0, colour)
        own = [row for row in rows() if row.get("block") == block]
        np.testing.assert_array_equal(raw.get_ydata(), [row["loss"] for row in own])
        np.testing.assert_array_equal(smoothed.get_xdata(), [row["step"] for row in own])
        (by_level,) = lines_of(plots.levels_figure(run), 0, colour)
        owned = run.partition.owned(block)
        assert all(owned.low * 0.999 <= s <= owned.high * 1.001 for s in by_level.get_xdata())


def test_a_row_logged_twice_counts_once_as_logged_last(tmp_path):
    again = {**rows()[0], "loss": 9.0}
    write_run(tmp_path)
    write_rows(tmp_path, [*rows(), again])
    run = plots.read_run(tmp_path)
    assert len(run.rows["block-wise"]) == 72 and run.rows["block-wise"][0]["loss"] == 9.0


def test_the_walk_shows_every_step_once_and_the_baselines(tmp_path):
    run = run_of(tmp_path)
    figure = plots.walk_figure(run)
    steps = [x for colour in plots.colours_of(run) for line in lines_of(figure, 0, colour) for x in line.get_xdata()]
    assert sorted(steps) == list(range(8))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert "end-to-end 95.4 %" in labels
    assert "forward-forward 71.0 %" not in labels  # far below: told in words, so that the walk isn't flattened
    assert any("forward-forward 71.0 %" in text.get_text() for text in figure.axes[0].texts)
    assert figure.axes[0].get_ylim()[0] > 90


def test_a_baseline_near_the_walk_is_within_the_picture():
    low, high = plots._window([90.0, 97.0], [85.0, 20.0])
    assert 20 < low < 85 and 97 < high <= 100.5


def test_memory_bars_add_up_and_tell_the_ratio(tmp_path):
    run = run_of(tmp_path)
    left, right = plots.memory_figure(run).axes
    assert len(left.get_lines()) == 4
    widths = [round(sum(bar.get_width() for bar in bars), 2) for bars in zip(*right.containers, strict=True)]
    assert widths == [11.72, 11.72, 30.47, 30.47, 30.47]
    assert [text.get_text() for text in right.texts][2] == "30.5 MiB, 2.6x"


def test_the_partition_is_drawn_over_a_density_of_mass_one(tmp_path):
    run = run_of(tmp_path)
    sigma, height = plots._density_curve(run.partition, "sigma")
    assert np.trapezoid(height, np.log(sigma)) == pytest.approx(1, abs=0.01)
    top, lanes = plots.partition_figure(run).axes
    for block, colour in enumerate(plots.colours_of(run)):
        trained, owned = lines_of(lanes.figure, 1, colour)
        assert tuple(trained.get_xdata()) == run.partition.trained(block)
        assert tuple(owned.get_xdata()) == run.partition.owned(block)
    masses = [shape.get_paths()[0].vertices for shape in top.collections]
    assert len(masses) == 3
    assert top.get_xlim()[0] > top.get_xlim()[1]  # noise falls from left to right


def test_masks_are_drawn_over_time_as_it_is(tmp_path):
    write_run(tmp_path)
    made = summary() | {"level": "t"}
    cut = make_partition(density.Uniform(1e-3, 1.0), 6, edges=[1, 2 / 3, 1 / 3, 1e-3], overlap=0)
    made["partition"] |= {"edges": list(cut.edges), "density": density.to_dict(cut.density), "overlap": 0}
    (tmp_path / "summary.json").write_text(json.dumps(made))
    run = plots.read_run(tmp_path)
    t, height = plots._density_curve(run.partition, run.level)
    assert height == pytest.approx([1 / 0.999] * len(t)) and np.trapezoid(height, t) == pytest.approx(1, abs=0.01)
    for axes in (plots.partition_figure(run).axes[1], plots.levels_figure(run).axes[0]):
        assert axes.get_xscale() == "linear" and axes.get_xlim() == (1, 0)
        assert "time" in axes.get_xlabel() and "sigma" not in axes.get_xlabel() and "overlap" not in axes.get_xlabel()


def test_the_bound_is_in_bits_with_each_block_s_regret(tmp_path):
    run = run_of(tmp_path)
    axes = plots.bound_figure(run).axes[0]
    drawn = max(y for line in axes.get_lines() for y in line.get_ydata())
    assert drawn == pytest.approx(max(v["bound"] for v in run.test["levels"]) / math.log(2))
    assert [t.get_text() for t in axes.texts] == [f"block {b}\n{r:+.3f}" for b, r in enumerate(run.test["regret_bits"])]


def test_a_run_without_baselines_or_plan_is_fine(tmp_path):
    write_run(tmp_path, baselines=())
    bare = summary(baselines=())
    del bare["results"]["block-wise"]["plan"], bare["config"]
    (tmp_path / "summary.json").write_text(json.dumps(bare))
    assert len(plots.draw(str(tmp_path))) == 6


@pytest.mark.parametrize(
    ("noise", "edges"),
    [(density.LogNormal(), None), (density.LogUniform(0.1, 1.0), (1.0, 0.5, 0.3, 0.1))],
)
def test_other_densities_and_partitions_are_drawn(tmp_path, noise, edges):
    run = run_of(tmp_path)
    cut = make_partition(noise, (3, 2, 1), edges=edges)
    run.summary["partition"] |= {
        "density": density.to_dict(noise),
        "edges": list(cut.edges),
        "layers": [3, 2, 1],
    }
    run.summary["partition"]["overlap"] = 0.0
    lanes = plots.partition_figure(run).axes[1]
    assert [label.get_text() for label in lanes.get_yticklabels()] == [
        "block 0, 3 layers",
        "block 1, 2 layers",
        "block 2, 1 layer",
    ]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing"):
        plots.draw(tmp_path / "nowhere")
    write_rows(tmp_path, rows())
    with pytest.raises(ValueError, match=r"summary\.json is missing"):
        plots.draw(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is no JSON"):
        plots.draw(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"partition": summary()["partition"], "results": {}}))
    with pytest.raises(ValueError, match=r"no results\.block-wise\.test"):
        plots.draw(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_foreign_rows_are_named_by_line(tmp_path):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"run": "block-wi\n')
    with pytest.raises(ValueError, match="line 145 is no row of metrics"):
        plots.draw(tmp_path)
    write_rows(tmp_path, [row for row in rows() if row["run"] != "block-wise"])
    with pytest.raises(ValueError, match="no block-wise rows"):
        plots.draw(tmp_path)


def test_a_picture_that_fails_leaves_the_old_ones(tmp_path, monkeypatch):
    write_run(tmp_path)
    before = [path.read_bytes() for path in plots.draw(tmp_path)]

    def fail(run: plots.Run) -> Any:
        raise RuntimeError("no ink")

    monkeypatch.setitem(plots.FIGURES, "bound", (fail, set()))
    write_rows(tmp_path, rows()[:30])
    with pytest.raises(RuntimeError, match="no ink"):
        plots.draw(tmp_path)
    assert [(tmp_path / f"{name}.png").read_bytes() for name in NAMES] == before


def test_smoothing_keeps_length_mean_and_constants():
    assert plots.smooth([]) == []
    assert plots.smooth([3.0] * 40) == [3.0] * 40
    assert plots.smooth([0.0, 3.0, 0.0], 3) == [1.5, 1.0, 1.5]


def test_pyplot_is_never_imported():
    code = "import sys, diffusionblocks.experiments.plotting.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
