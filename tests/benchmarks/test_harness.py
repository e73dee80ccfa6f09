"""The benches: a contender that fails ends nothing, and what was measured is in a file the moment it exists."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import warm

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OWN = {path.stem for path in BENCHMARKS.glob("*.py")}
CPU = torch.device("cpu")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in OWN:
        sys.modules.pop(name, None)


def missing():
    import a_package_that_nobody_has  # noqa: F401


def too_large():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nand more lines")


def bench_of(harness, tmp_path, contenders, *arguments, moved=None):
    """A bench of one case, x -> 2x, after it has run."""
    x = torch.ones(5, requires_grad=True)
    bench = harness.Bench("double", harness.options("", ["--quick", "--out", str(tmp_path), *arguments]))
    exact = [torch.full((5,), 2.0).double(), torch.full((5,), 2.0).double()]
    Call = harness.Call

    def build():
        made = {name: lambda f=f: Call(lambda: f(x), [x], [torch.ones(5)]) for name, f in contenders.items()}
        return harness.Case(made, moved or {"forward": 40, "backward": 40}, lambda: exact, 1e-6)

    bench.kernels("five", torch.float32, build)
    bench.host("five", torch.float32, build)
    return bench


def double(x):
    return x * 2


def rows_of(tmp_path, op="double"):
    return json.loads((tmp_path / f"{op}.json").read_text())["rows"]


def test_who_fails_has_a_note_and_the_others_their_figures(benchmarks, tmp_path):
    harness = benchmarks("harness")
    contenders = {
        "ours": double, "eager": double, "off": lambda x: x * 2.3, "absent": lambda x: missing(),
        "hungry": lambda x: too_large(),
    }  # fmt: skip
    bench_of(harness, tmp_path, contenders).finish()
    rows = rows_of(tmp_path)
    notes = {row["contender"]: row["note"] for row in rows if "note" in row}
    assert notes == {
        "off": "wrong: error 0.3 against 8e-06 in result 0",  # four times our tolerance
        "absent": "not installed",
        "hungry": "OutOfMemoryError: CUDA out of memory. Tried to allocate 8 GiB",
    }
    kernels = [(row["contender"], row["direction"]) for row in rows if "ms_50" in row]
    assert kernels == [(name, way) for name in ("ours", "eager") for way in ("forward", "backward")]
    assert all(row["of_copy"] > 0 and row["peak_mib"] >= 0 for row in rows if "ms_50" in row)
    host = [row for row in rows if "host_us" in row]
    assert len(host) == 4 and all(row["host_us"] > 0 for row in host)
    document = json.loads((tmp_path / "double.json").read_text())
    assert {"torch", "triton", "commit", "date", "device", "host_peak_mib"} <= document["machine"].keys()
    assert not (tmp_path / "double.jsonl").exists()


@pytest.mark.parametrize("ours", [lambda x: x * 2.0001, lambda x: missing(), lambda x: x[:3] * 2])
def test_ours_wrong_is_a_row_and_ends_the_bench_with_an_error(benchmarks, tmp_path, ours):
    bench = bench_of(benchmarks("harness"), tmp_path, {"ours": ours, "eager": double})
    with pytest.raises(SystemExit, match="double: ours failed"):
        bench.finish()
    rows = rows_of(tmp_path)
    assert [row["contender"] for row in rows if "note" in row] == ["ours", "ours"]
    assert [row["contender"] for row in rows if "ms_50" in row] == ["eager", "eager"]


def test_a_wrong_gradient_and_a_value_that_is_no_number_are_wrong(benchmarks):
    difference = benchmarks("harness").difference
    good = [torch.ones(3), torch.ones(3)]
    exact = [t.double() for t in good]
    assert difference(good, exact, 0) == ""
    assert difference([torch.ones(3), torch.tensor([1.0, 1.0, 1.5])], exact, 1e-6).endswith("in result 1")
    assert difference([torch.full((3,), float("nan")), torch.ones(3)], exact, 1e-6).startswith("wrong: error nan")
    assert difference(good[:1], exact, 1e-6) == "wrong: 1 results of 2"


def test_a_peer_has_four_times_our_tolerance(benchmarks, tmp_path):
    near = lambda x: x * (2 * (1 + 3e-6))  # noqa: E731
    bench = bench_of(benchmarks("harness"), tmp_path, {"ours": near, "eager": near, "double": double})
    with pytest.raises(SystemExit):
        bench.finish()
    assert {row["contender"] for row in rows_of(tmp_path) if "note" in row} == {"ours"}


def test_a_case_that_cannot_be_made_ends_nothing(benchmarks, tmp_path):
    harness = benchmarks("harness")
    bench = bench_of(harness, tmp_path, {"ours": double})
    bench.kernels("huge", torch.float32, too_large)
    with pytest.raises(SystemExit):
        bench.finish()
    assert rows_of(tmp_path)[-1] == {
        "case": "huge", "dtype": "float32", "contender": "case", "direction": "both",
        "note": "OutOfMemoryError: CUDA out of memory. Tried to allocate 8 GiB",
    }  # fmt: skip


def test_parts_share_the_cases_and_only_chooses(benchmarks, tmp_path):
    harness = benchmarks("harness")

    def ran(*arguments):
        bench = harness.Bench("x", harness.options("", ["--quick", "--out", str(tmp_path), *arguments]))
        return [name for name in ("a", "b", "ab", "c") if bench._mine(name)]

    assert ran("--part", "1/2") + ran("--part", "2/2") == ["a", "ab", "b", "c"]
    assert ran("--only", "b") == ["b", "ab"]
    with pytest.raises(SystemExit):
        ran("--part", "3/2")


def test_compiling_runs_every_contender_but_eager_and_writes_nothing(benchmarks, tmp_path):
    seen = []
    note = lambda name: lambda x: (seen.append(name), x * 2)[1]  # noqa: E731
    contenders = {name: note(name) for name in ("ours", "eager", "peer")} | {"hungry": lambda x: too_large()}
    bench_of(benchmarks("harness"), tmp_path, contenders, "--compile").finish()
    assert seen == ["ours", "peer"] * 2 and not list(tmp_path.iterdir())


def test_rows_are_there_after_a_kill(benchmarks, tmp_path):
    """The process dies while its second case runs: the first one's rows are read."""
    script = f"""
import sys, time
sys.path[:0] = [{str(BENCHMARKS)!r}, *{[str(path) for path in Path(__file__).parents[:2]]!r}]
import harness, test_harness, torch
from pathlib import Path
bench = test_harness.bench_of(harness, Path({str(tmp_path)!r}), dict(ours=test_harness.double))
bench.kernels("endless", torch.float32, lambda: time.sleep(600))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    lines = tmp_path / "double.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (lines.exists() and len(lines.read_text().splitlines()) == 5):
        assert process.poll() is None, "it died by itself"
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with lines.open("a") as file:
        file.write('{"case": "cut off in the mid')
    (document,) = benchmarks("rows").documents(tmp_path)
    assert document["op"] == "double" and "device" in document["machine"]
    assert [row["direction"] for row in document["rows"]] == ["forward", "backward"] * 2


def test_a_limit_ends_a_bench_that_hangs(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import harness
harness.Bench("hangs", harness.options("", ["--quick", "--limit", "1", "--out", {str(tmp_path)!r}]))
time.sleep(600)
"""
    assert warm.run("-c", script).returncode == -signal.SIGALRM


def test_marks_part_the_kernels_of_one_call_from_the_next(benchmarks):
    between = benchmarks("timing").between_marks
    spin = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    events = [(0, 7, "memset"), (10, 1, spin), (20, 3, "a"), (30, 4, "b"), (40, 1, spin), (50, 9, "memset"),
              (60, 1, spin), (70, 1, spin), (80, 1, spin), (90, 5, "c"), (95, 1, spin)]  # fmt: skip
    assert between(events[::-1]) == [7, 0, 5]


def test_device_time_is_the_sum_of_each_parts_kernels(benchmarks, monkeypatch):
    """With a profiler and a device that are made up: forward takes 2 ms, backward 3, and the flush is nobody's."""
    timing = benchmarks("timing")
    stream = []

    def launch(name, milliseconds):
        at, nanoseconds, cuda = len(stream), int(milliseconds * 1e6), torch.autograd.DeviceType.CUDA
        event = dict(start_ns=lambda: at, duration_ns=lambda: nanoseconds, name=lambda: name, device_type=lambda: cuda)
        event |= dict(is_user_annotation=lambda: False)
        stream.append(SimpleNamespace(**event))

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            launch("forward", 2)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            launch("backward", 3)
            return grad

    profile = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: stream)))
    monkeypatch.setattr(torch.profiler, "profile", lambda **kwargs: contextlib.nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: launch("spin_kernel", 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_flush", lambda: SimpleNamespace(zero_=lambda: launch("memset", 50)))
    x = torch.ones(3, requires_grad=True)
    calls = {"good": timing.Call(lambda: Kernel.apply(x), [x], [x.detach()]), "bad": timing.Call(too_large)}
    times, errors = timing._device_times(calls, 3, 0.0)
    assert times["good", "forward"] == [2.0] * 3 and times["good", "backward"] == [3.0] * 3
    assert list(errors) == ["bad"] and isinstance(errors["bad"], torch.OutOfMemoryError)


def test_host_time_waits_for_the_device_first_and_leaves_the_collector_as_it_was(benchmarks, monkeypatch):
    timing = benchmarks("timing")
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    call = timing.Call(lambda: events.append(timing.gc.isenabled()))
    timing.host_times({"x": call}, torch.device("cuda"), 3)
    assert events[10:] == ["wait", False] * 3  # after ten to warm up
    assert timing.gc.isenabled()


def test_peak_memory_is_what_a_call_holds_at_most(benchmarks):
    timing = benchmarks("timing")
    leaf = torch.ones(2**20, requires_grad=True)  # 4 MiB

    def forward():
        return (leaf.exp() * 2).sum()  # exp is kept; two of its size at a time

    peaks = timing.peaks(timing.Call(forward, [leaf]), CPU)
    assert peaks["forward"][0] == pytest.approx(8, abs=0.1)
    assert 8 <= peaks["backward"][0] <= 16.1  # what is kept, and gradients
    assert peaks["forward"][1] is None


@pytest.mark.parametrize("name", sorted({"deep", *(n for n in OWN if n.startswith("bench_"))} - {"bench_training"}))
def test_every_bench_runs(benchmarks, tmp_path, name):
    """bench_training runs in the dry run of test_gpu_script.py."""
    benchmarks(name).main(["--quick", "--out", str(tmp_path)])
    (document,) = benchmarks("rows").documents(tmp_path)
    ours = [row for row in document["rows"] if row["contender"].split(",")[0] == "ours"]
    assert ours and not [row for row in document["rows"] if row.get("note", "").startswith(("wrong", "case"))]
    assert all("ms_50" in row or "host_us" in row for row in ours)
