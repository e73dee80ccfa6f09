"""The figure of memory: bars that add up, and a time axis that compares no wall times."""

from __future__ import annotations

from diffusionblocks.experiments.plotting.memory import memory_figure
from invented_run import run_of


def test_memory_bars_add_up_and_name_the_ratio(tmp_path):
    run = run_of(tmp_path)
    left, right = memory_figure(run).axes
    assert len(left.get_lines()) == 4
    assert {line.get_xdata()[-1] for line in left.get_lines()} == {100.0}, "shares of the steps: wall times differ"
    widths = [round(sum(bar.get_width() for bar in bars), 2) for bars in zip(*right.containers, strict=True)]
    assert widths == [11.72, 11.72, 30.48, 30.48, 30.48]
    assert [text.get_text() for text in right.texts][2] == "30.5 MiB, 2.6 x block-wise"


def test_a_run_of_one_row_is_seen(tmp_path):
    run = run_of(tmp_path)
    run.rows["block-wise"] = run.rows["block-wise"][:1]
    assert memory_figure(run).axes[0].lines[0].get_marker() == "o"
