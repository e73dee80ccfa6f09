"""benchmarks/gpu.sh without a GPU: stages fail, run over their limits and are killed, and what they found is there."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
TESTS = """
import time
import pytest

@pytest.mark.parametrize("i", range(4))
def test_passes(i):
    pass

def test_fails():
    word = "pumpkin"
    assert word == "coach", "it is past midnight"

@pytest.mark.gpu
def test_needs_a_gpu():
    assert False
"""


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu_stages")
    for name in ("gpu_stages", "study", "variants", "tables", "pages", "forks", "fork_arms", "fork_training"):
        sys.modules.pop(name, None)


def environment(out, **more):
    return os.environ | {"OUT": str(out), "PYTHON": sys.executable} | more


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dry_run_goes_through_every_stage_whatever_fails(tmp_path):
    (tmp_path / "test_two.py").write_text(TESTS)
    arguments = ["build", "smoke", "bench", "train", "--device", "cpu", "--quick"]
    arguments += ["--tests", str(tmp_path / "test_two.py"), "--benches", "inject_noise"]
    out = tmp_path / "out"
    done = subprocess.run([BENCHMARKS / "gpu.sh", *arguments], env=environment(out), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    table = [line.split(" | ") for line in (out / "table.md").read_text().splitlines()]
    assert done.stdout.endswith((out / "table.md").read_text())
    found = {row[0].removeprefix("| "): (row[2], row[3]) for row in table[2:]}
    assert list(found) == ["build", "smoke", "compile", "bench", "train"]
    assert found["smoke"] == ("4", "1") and found["compile"] == found["bench"] == found["train"] == ("1", "0")
    failed = [line for line in lines(out / "smoke.jsonl") if line["outcome"] == "failed"]
    assert [line["test"].split("::")[1] for line in failed] == ["test_fails"]
    assert any("it is past midnight" in text for text in failed[0]["last"])
    assert {"inject_noise.json", "training.json"} <= {path.name for path in (out / "bench").iterdir()}
    trained = json.loads((out / "bench" / "training.json").read_text())["rows"]
    ours = [row for row in trained if row["contender"].split(",")[0] == "ours"]
    assert ours and all("ms_50" in row for row in ours)
    assert not [row for row in trained if row.get("note", "").startswith(("wrong", "case"))]
    ended = {line["command"]: line["returncode"] for line in lines(out / "stages.jsonl")}
    assert ended == {"pytest": 1, "inject_noise-1": 0, "inject_noise": 0, "training": 0}


def test_the_stage_of_forks_asks_for_rows_that_there_are(stages):
    """Arms are trained in test_forks.py; a process of their own takes half a minute."""
    _, options = stages.parse(["forks", "--device", "cpu", "--quick"])
    (command,) = stages.forks(options).commands
    assert (ROOT / command.arguments[1]).name == "study.py"
    study = importlib.import_module("study")
    given = tyro.cli(study.Study, args=command.arguments[2:])
    assert [name for name, _, _ in study.work(given, study.RUNS[given.run][1])] == stages.QUICK_FORKS
    assert given.folder == options.out / "forks"


def test_a_stage_over_its_limit_is_ended_with_all_that_it_started(stages, tmp_path):
    child = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); import time; time.sleep(600)"
    commands = [
        stages.Command("quick", [sys.executable, "-c", "print('done')"]),
        stages.Command("endless", [sys.executable, "-c", child]),
        stages.Command("never", [sys.executable, "-c", ""]),
    ]
    began = time.monotonic()
    outcomes = stages.execute("stage", stages.Stage(commands), 5, tmp_path)
    assert time.monotonic() - began < 60
    assert [(outcome.command, outcome.returncode) for outcome in outcomes] == [("quick", 0), ("endless", None)]
    pid = int(outcomes[1].last[0])
    assert not alive(pid)
    assert [line["command"] for line in lines(tmp_path / "stages.jsonl")] == ["quick", "endless"]


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent doesn't."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_results_are_there_after_the_script_is_killed(tmp_path):
    """The second test waits for ever; the first one's outcome can be read."""
    (tmp_path / "test_slow.py").write_text("import time\ndef test_one(): pass\ndef test_two(): time.sleep(600)\n")
    out = tmp_path / "out"
    arguments = ["smoke", "--device", "cpu", "--quick", "--tests", str(tmp_path / "test_slow.py")]
    process = subprocess.Popen([BENCHMARKS / "gpu.sh", *arguments], env=environment(out), start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "smoke.jsonl").exists():
        time.sleep(0.1)
    runner = int(subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()[0])
    os.kill(process.pid, signal.SIGKILL)
    os.killpg(runner, signal.SIGKILL)  # its own group, which a machine that is taken away ends too
    process.wait()
    assert [(line["test"].split("::")[1], line["outcome"]) for line in lines(out / "smoke.jsonl")] == [
        ("test_one", "passed")
    ]


def test_shards_are_parts_of_the_tests(tmp_path):
    (tmp_path / "test_two.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import a_package_that_nobody_has\n")
    found = []
    for i in (1, 2):
        env = environment(tmp_path, OUTCOMES=str(tmp_path / f"{i}.jsonl"), SHARD=f"{i}/2", PYTHONPATH=str(BENCHMARKS))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "outcomes", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", str(tmp_path)]
        subprocess.run(command, env=env, cwd=tmp_path, capture_output=True)
        found.append([line["test"] for line in lines(tmp_path / f"{i}.jsonl")])
    broken = [test for test in found[0] if "::" not in test]
    assert len(broken) == 1 and broken[0] in found[1], "a file that can't be imported is a failure in every shard"
    tests = [[test for test in shard if "::" in test] for shard in found]
    assert {len(shard) for shard in tests} == {3} and len({*tests[0], *tests[1]}) == 6


def test_the_stages_of_a_short_lease_fit_in_eight_minutes(stages):
    limits, _ = stages.parse(["build", "smoke", "bench", "train"])
    assert list(limits) == ["build", "smoke", "compile", "bench", "train"]
    assert sum(limits.values()) < 8 * 60


def test_limits_and_shards_are_read(stages, capsys):
    limits, options = stages.parse(["tests=300", "compile=5", "bench", "--shard", "2/4"])
    assert limits == {"tests": 300.0, "compile": 5.0, "bench": stages.LIMITS["bench"]}
    (command,) = stages.tests(options).commands
    assert command.env["SHARD"] == "2/4" and command.arguments[command.arguments.index("-m", 2) + 1] == "gpu"
    with pytest.raises(SystemExit):
        stages.parse(["brew"])
    assert "unknown stage 'brew'" in capsys.readouterr().err


def test_every_bench_has_its_place_and_its_case_of_compiling(stages):
    found = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    assert {*stages.BENCHES, "training"} == found, "training is a stage of its own"
    _, options = stages.parse(["compile"])
    commands = stages.compile_(options).commands
    assert len(commands) == sum(stages.BENCHES.values())
    assert all(command.env["TRITON_CACHE_DIR"] and command.env["TORCHINDUCTOR_CACHE_DIR"] for command in commands)
    measuring = stages.bench(options).commands
    assert len({tuple(sorted(command.env.items())) for command in commands + measuring}) == 1, "one cache for all"
    assert stages.bench(options).at_once == 2 and all("--lock" in command.arguments for command in measuring)


def test_a_stage_that_cannot_start_is_a_line_of_the_table(stages, tmp_path, monkeypatch):
    _, options = stages.parse(["bench"])
    options.out = tmp_path
    broken = stages.Stage([stages.Command("x", ["/no/such/program"])])
    monkeypatch.setitem(stages.STAGES, "bench", lambda options: broken)
    line, well = stages.run("bench", 5, options)
    assert not well and "FileNotFoundError" in line


def test_the_sanitizer_runs_where_it_is_installed(stages, monkeypatch):
    _, options = stages.parse(["sanitize"])
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/opt/{name}")
    commands = stages.sanitize(options).commands
    assert [command.name for command in commands] == ["memcheck", "racecheck"]
    assert all(command.arguments[0] == "/opt/compute-sanitizer" for command in commands)
    assert all((ROOT / path).exists() for path in stages.SANITIZED)
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    assert not stages.sanitize(options).commands
