"""Figures of a run: drawn from its files, changing with them; missing files and keys are refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import warm
from diffusionblocks.experiments.plotting import plots
from diffusionblocks.noise import density
from diffusionblocks.noise.partition import make_partition
from invented_run import rows, run_of, summary, write_rows, write_run

NAMES = ["loss", "levels", "trajectory", "memory", "partition", "bound"]


def lines_of(figure: Any, axes: int, colour: str) -> list[Any]:
    return [line for line in figure.axes[axes].get_lines() if to_rgb(line.get_color()) == to_rgb(colour)]


@pytest.mark.parametrize("blocks", [1, 8])
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
    changed = summary()
    changed["results"]["block-wise"]["test"]["trajectory"][0]["accuracy"] = 10.0
    (tmp_path / "summary.json").write_text(json.dumps(changed))
    after = [path.read_bytes() for path in plots.draw(tmp_path)]
    assert [a != b for a, b in zip(after, before, strict=True)] == [name == "trajectory" for name in NAMES]


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
        nats = [level["cross_entropy"] for level in run.test["levels"] if level["block"] == block]
        np.testing.assert_allclose(by_level.get_ydata(), [n / math.log(2) for n in nats], err_msg="in bits")
    assert plots.levels_figure(run).axes[0].get_title().endswith("(uniform guess: 3.32 bits)")


def test_losses_are_drawn_so_that_their_end_can_be_seen(tmp_path):
    """On a logarithmic axis where they fall tenfold, else between their limits; never from zero."""
    falling, flat = run_of(tmp_path), run_of(tmp_path)
    for row in flat.rows["block-wise"]:
        row["loss"] = 3 + 0.2 * math.sin(row["step"])
    axes = [plots.loss_figure(run).axes[0] for run in (falling, flat)]
    assert [a.get_yscale() for a in axes] == ["log", "linear"] and axes[1].get_ylim()[0] > 2.5
    for a, run in zip(axes, (falling, flat), strict=True):
        losses = [row["loss"] for row in run.rows["block-wise"]]
        assert a.get_ylim()[0] < min(losses) < max(losses) < a.get_ylim()[1], "every logged value is inside"


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_legends_cover_no_data(tmp_path, blocks):
    run = run_of(tmp_path, blocks=blocks)
    for draw in (plots.loss_figure, plots.levels_figure, plots.trajectory_figure, plots.bound_figure):
        figure = draw(run)
        figure.canvas.draw()
        (axes,) = figure.axes
        legend, inside = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert legend.x0 >= inside.x1 or legend.y1 <= inside.y0, draw.__name__


def test_a_row_logged_twice_counts_once_as_logged_last(tmp_path):
    again = {**rows()[0], "loss": 9.0}
    write_run(tmp_path)
    write_rows(tmp_path, [*rows(), again])
    run = plots.read_run(tmp_path)
    assert len(run.rows["block-wise"]) == 72 and run.rows["block-wise"][0]["loss"] == 9.0


def test_the_trajectory_shows_every_step_once_and_the_baselines(tmp_path):
    run = run_of(tmp_path)
    figure = plots.trajectory_figure(run)
    steps = [x for colour in plots.colours_of(run) for line in lines_of(figure, 0, colour) for x in line.get_xdata()]
    assert sorted(steps) == list(range(8))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert "end-to-end 95.4 %" in labels
    assert "forward-forward 71.0 %" not in labels  # far below: written out, so that it doesn't flatten the curve
    assert any("forward-forward 71.0 %" in text.get_text() for text in figure.axes[0].texts)
    assert figure.axes[0].get_ylim()[0] > 90


def test_error_bars_are_wilson_s_standard_errors(tmp_path):
    """Of 360 images one is 0.28 points; the interval's ends solve (p - q)^2 = q (1 - q) / n."""
    for accuracy in (0.0, 50.0, 97.2, 100.0):
        down, up = plots.standard_error(accuracy, 360)
        for q in ((accuracy - down) / 100, (accuracy + up) / 100):
            assert (accuracy / 100 - q) ** 2 == pytest.approx(q * (1 - q) / 360, abs=1e-12)
    assert plots.standard_error(50.0, 360) == pytest.approx([100 * 0.5 / 361**0.5] * 2)
    run = run_of(tmp_path)
    bars = [c.get_segments() for c in plots.trajectory_figure(run).axes[0].collections]
    heights = [b[1] - a[1] for segments in bars for a, b in segments]
    want = [sum(plots.standard_error(step["accuracy"], 360)) for step in run.test["trajectory"]]
    np.testing.assert_allclose(heights, want)
    del run.test["images"]
    bars = [c.get_segments() for c in plots.trajectory_figure(run).axes[0].collections]
    assert all(a[1] == b[1] for segments in bars for a, b in segments), "no bars without a count"


def test_a_baseline_near_the_trajectory_is_within_the_picture():
    low, high = plots._window([90.0, 97.0], [85.0, 20.0])
    assert 20 < low < 85 and 97 < high <= 100.5


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
    masked = summary() | {"level": "t"}
    cut = make_partition(density.Uniform(1e-3, 1.0), 6, edges=[1, 2 / 3, 1 / 3, 1e-3], overlap=0)
    masked["partition"] |= {"edges": list(cut.edges), "density": density.to_dict(cut.density), "overlap": 0}
    (tmp_path / "summary.json").write_text(json.dumps(masked))
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
    assert warm.run("-c", code).returncode == 0
