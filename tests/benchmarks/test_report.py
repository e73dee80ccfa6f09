"""Tables of what the benches measured: those in the pages are those of the results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
H100 = BENCHMARKS / "results" / "nvidia-h100-80gb-hbm3"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("report")
    for name in ("report", "rows", "pictures"):
        sys.modules.pop(name, None)


def row(contender, direction="both", case="a", dtype="bfloat16", **figures):
    return {"case": case, "dtype": dtype, "contender": contender, "direction": direction, **figures}


def document(*rows, op="op", **more):
    machine = {"device": "card", "torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-01-01"}
    return {"op": op, "note": "", "machine": machine, "rows": list(rows), **more}


def test_the_pages_have_the_figures_of_the_results(report):
    names = []
    for path in report.PAGES:
        page = path.read_text()
        assert report.renewed(page) == page, f"python benchmarks/report.py renews {path.name}"
        names += [name for name, _ in report.MARKED.findall(page)]
    assert sorted(names) == ["cpu kernels", "cpu training", "gpu cases", "gpu host", "gpu kernels", "gpu training"]


def test_gpu_figures_carry_their_commit_and_their_age(report):
    found = report.documents(H100)
    assert len(found) >= 8
    expected = (
        "NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, Triton 3.6.0, commit 8222902, 2026-11-28: "
        "measured before the present kernels, not measured since.\n"
    )
    assert report.heading(found) == expected
    assert all(expected in path.read_text() for path in report.PAGES)


def test_forward_and_backward_together_are_compared(report):
    rows = [row("ours", "forward", ms_50=1.0), row("ours", "backward", ms_50=2.0),
            row("eager", "forward", ms_50=2.0), row("eager", "backward", ms_50=10.0),
            row("ours", case="b", ms_50=1.0), row("eager", case="b", ms_50=1.0),
            row("eager", case="c", ms_50=1.0), row("ours", case="c", note="wrong")]  # fmt: skip
    assert report.speedup(rows, "eager") == "2.0x (1.0x)"
    assert report.speedup(rows, "liger") == ""
    # rows of before directions were told apart
    old = [
        {"case": "a", "dtype": "float32", "contender": name, "ms_50": ms} for name, ms in (("ours", 2), ("eager", 3))
    ]
    assert report.speedup(old, "eager") == "1.5x (1.5x)"


def test_memory_is_the_higher_of_both_directions(report):
    rows = [row("ours", "forward", peak_mib=2.0), row("ours", "backward", peak_mib=4.0),
            row("eager", "forward", peak_mib=8.0), row("eager", "backward", peak_mib=1.0)]  # fmt: skip
    assert report.memory(rows) == "0.50x"


def test_cells_show_both_directions_ranges_and_notes(report):
    rows = [row("ours", "forward", of_copy=0.5), row("ours", "forward", case="b", of_copy=0.75),
            row("ours", "backward", of_copy=0.25), row("flex", "forward", tflop_per_s=334.4, of_copy=0.01),
            row("flex", "backward", tflop_per_s=201.0), row("liger", note="not installed"),
            row("compile", of_copy=1.0), row("cudnn", "backward", of_copy=0.3)]  # fmt: skip
    assert report.cell(rows, "ours") == "0.50 to 0.75 / 0.25"
    assert report.cell(rows, "flex") == "334 / 201"
    assert report.cell(rows, "liger") == "not installed"
    assert report.cell(rows, "compile") == "1.00"
    assert report.cell(rows, "cudnn") == "– / 0.30"
    assert report.speeds(rows)[3] == "flex: 334 / 201; cudnn: – / 0.30"


def test_the_hosts_time_is_of_forward_and_of_both(report):
    apart = document(row("ours", "forward", host_us=10), row("ours", "backward", host_us=20),
                     row("eager", "forward", host_us=10), row("eager", "backward", host_us=10),
                     row("peer", "forward", host_us=7))  # fmt: skip
    assert report.host_times(apart) == {
        "a, forward": {"ours": 10, "eager": 10, "peer": 7},
        "a, forward + backward": {"ours": 30, "eager": 20},
    }
    assert report.host_ratio(apart) == "1.00 to 1.50x"
    together = document(row("ours", host_us=10), row("eager", host_us=5))
    assert report.host_times(together) == {"a": {"ours": 10, "eager": 5}}


def test_a_folder_of_a_run_that_was_cut_off_is_printed(report, tmp_path, capsys):
    made = document(row("ours", "forward", of_copy=0.9), row("ours", "backward", host_us=3))
    made["machine"]["type"] = "cuda"
    (tmp_path / "op.json").write_text(json.dumps(made))
    header = {key: made[key] for key in ("op", "note", "machine")}
    rest = [row("ours", of_copy=0.8, case="b"), {"note": "a remark"}, {"machine": {"host_peak_mib": 1}}]
    (tmp_path / "cut.jsonl").write_text("\n".join(json.dumps(line) for line in [header | {"op": "cut"}, *rest]) + "\n{")
    (tmp_path / "study.jsonl").write_text('{"variant": "B=2", "seed": 0}\n')
    report.print_tables(tmp_path)
    printed = capsys.readouterr().out
    assert "| `op` | a | bfloat16 | 0.90 |" in printed and "| `cut` | b | bfloat16 | 0.80 |" in printed
    assert report.documents(tmp_path)[0]["note"] == "a remark"


def test_pictures_are_drawn_of_old_rows_and_new_ones(report, tmp_path):
    pictures = importlib.import_module("pictures")
    rows = [row(name, way, ms_50=1.0, of_copy=0.5) for name in "abcdefg" for way in ("forward", "backward")]
    rows += [row("ours", host_us=3), row("liger", note="not installed")]
    made = document(*rows)
    made["machine"]["threads"] = 2
    pictures.draw(made, tmp_path / "op.png")
    old, *_ = report.documents(report.RESULTS / "cpu-2core")
    pictures.draw(old, tmp_path / "old.png")
    assert (tmp_path / "op.png").stat().st_size > 5000 and (tmp_path / "old.png").stat().st_size > 5000


def test_trainings_are_compared_with_all_layers_at_once(report):
    rows = [row("ours, B = 3, host, 2 slots", peak_mib=512, equal_ms=90.0, waited=0.021, note="a remark"),
            row("end to end", peak_mib=2048, equal_ms=100.0),
            row("checkpointing, BAdam", note="badam isn't installed")]  # fmt: skip
    lines = report.trainings([document(*rows, op="training")]).splitlines()
    assert lines[0] == "a:" and lines[2].startswith("| training | device, GiB allocated | share | ms of equal work |")
    assert lines[4] == "| end to end | 2.00 | 1.00 | 100 | 1.00 |  |  |"
    assert lines[5] == "| checkpointing, BAdam |  |  |  |  |  | badam isn't installed |"
    assert lines[6] == "| ours, B = 3, host, 2 slots | 0.50 | 0.25 | 90 | 0.90 | 2.1% | a remark |"
    assert report.gpu_cases([document(*rows, op="training")]).count("\n") == 2
