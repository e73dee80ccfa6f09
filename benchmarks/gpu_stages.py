"""What benchmarks/gpu.sh runs: stages of commands, each stage with a limit, every result written the moment it exists.

The limits of build, smoke, compile, bench and train add up to less than 8 minutes, on 16 slow cores (13 us of host time
for an `x + 1`): nvcc compiles its sources side by side; smoke is one test per op, dtype and direction on all cores;
compile runs the benches side by side to fill Triton's and Inductor's caches, so that bench, which has the GPU for
itself, only times. bench starts each process while another one measures, since importing takes as long as measuring.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"build": 100, "smoke": 60, "compile": 90, "bench": 140, "train": 85, "tests": 480, "forks": 480,
          "deep": 600, "sanitize": 400}  # fmt: skip
# In the order of what we want to know first, and the processes that share what each has to compile.
BENCHES = {"ada_layer_norm": 2, "two_stream_attention": 6, "denoising_cross_entropy": 3, "gated_residual_norm": 2,
           "adamw_ema": 2, "edm_loss": 2, "ada_rms_norm": 2, "inject_noise": 2, "attention": 1,
           "training_step": 1}  # fmt: skip
SANITIZED = [f"tests/kernels/test_{name}.py" for name in ("total_norm", "philox", "edm_loss_triton", "norms_gpu")]
QUICK_FORKS = ["width 32, B=2: A0 lone", "width 32, B=2: A4 mixture of two"]
EACH = 40  # seconds that a bench may measure, so that one that hangs leaves time for the others
LAST = 12  # lines of a failed command that are kept


@dataclass
class Command:
    """A process to run. env: set beside the driver's own."""

    name: str
    arguments: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Stage:
    """Commands, how many of them run at a time, and where their results lie."""

    commands: list[Command]
    at_once: int = 1
    results: Path | None = None


@dataclass
class Outcome:
    """How a command ended. returncode: None if it was cut off at the stage's limit."""

    stage: str
    command: str
    returncode: int | None
    seconds: float
    log: str
    last: list[str] = field(default_factory=list)


def caches() -> dict[str, str]:
    """Return the environment in which compile and bench share what they compile."""
    folder = Path(tempfile.gettempdir()) / "dbkernels-caches"
    named = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    # one compiling thread a process: the processes are as many as the cores
    return {key: os.environ.get(key, str(folder / name)) for key, name in named.items()} | {
        "TORCHINDUCTOR_COMPILE_THREADS": "1"
    }


def build(options: argparse.Namespace) -> Stage:
    """Compile the C++ and CUDA libraries in place."""
    env = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a")}
    commands = [
        Command("setup", [sys.executable, "setup.py", "build_ext", "--inplace"], env),
        Command("facts", [sys.executable, "-m", "dbkernels"]),
    ]
    return Stage([] if options.device == "cpu" else commands)


def pytest(options: argparse.Namespace, stage: str, marks: str, shard: str = "") -> Stage:
    """Run the tests with these marks; without a GPU, those that need none."""
    results = options.out / f"{stage}.jsonl"
    results.unlink(missing_ok=True)
    arguments = [
        "-q",
        "-p",
        "outcomes",
        "-p",
        "no:cacheprovider",
        "-m",
        marks if options.device == "cuda" else "not gpu",
    ]
    if importlib.util.find_spec("xdist") and not options.quick:
        arguments += ["-n", str(os.cpu_count())]
    env = caches() | {"OUTCOMES": str(results), "SHARD": shard}
    return Stage([Command("pytest", [sys.executable, "-m", "pytest", options.tests, *arguments], env)], 1, results)


def smoke(options: argparse.Namespace) -> Stage:
    """Run one test per op, dtype and direction."""
    return pytest(options, "smoke", "gpu and smoke")


def tests(options: argparse.Namespace) -> Stage:
    """Run the gpu tests, or a shard of them."""
    return pytest(options, "tests", "gpu", options.shard)


def bench_command(options: argparse.Namespace, name: str, script: str, *more: str) -> Command:
    """Run a bench or the training script."""
    quick = ["--quick"] if options.quick else []
    seconds = ["--seconds", "0.1"]
    given = [sys.executable, f"benchmarks/{script}.py", "--device", options.device, *seconds, *quick, *more]
    return Command(name, given, caches())


def compile_(options: argparse.Namespace) -> Stage:
    """Fill the caches: every contender of every case runs once, in many processes."""
    commands = []
    for name in options.benches:
        parts = 1 if options.quick else BENCHES[name]
        for i in range(1, parts + 1):
            more = ["--compile", "--part", f"{i}/{parts}"]
            commands.append(bench_command(options, f"{name}-{i}", f"bench_{name}", *more))
    return Stage(commands, os.cpu_count() or 1)


def bench(options: argparse.Namespace) -> Stage:
    """Measure, one process at a time; the next one is starting meanwhile."""
    results = options.out / "bench"
    more = ["--out", str(results), "--lock", str(options.out / "bench.lock"), "--limit", str(EACH)]
    return Stage([bench_command(options, name, f"bench_{name}", *more) for name in options.benches], 2, results)


def train(options: argparse.Namespace) -> Stage:
    """Measure what training takes by every technique; rows that say most come first, and the limit ends them."""
    results = options.out / "bench"
    return Stage([bench_command(options, "training", "bench_training", "--out", str(results))], 1, results)


def deep(options: argparse.Namespace) -> Stage:
    """Train a thousand layers under a cap on device memory."""
    results = options.out / "bench"
    return Stage([bench_command(options, "deep", "deep", "--out", str(results))], 1, results)


def sanitize(options: argparse.Namespace) -> Stage:
    """Run a few smoke tests under compute-sanitizer: accesses out of bounds, races in shared memory."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or options.device == "cpu":
        return Stage([])
    env = caches() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor ends where its memory does
    under = [tool, "--error-exitcode", "1", "--target-processes", "all", "--tool"]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu and smoke", *SANITIZED]
    return Stage([Command(name, [*under, name, *tests], env) for name in ("memcheck", "racecheck")])


def forks(options: argparse.Namespace) -> Stage:
    """Train one network for all noise, and what goes on from it; what was trained already is not trained again."""
    results, images = options.out / "forks", ROOT / "data" / "fashion-mnist"
    given = ["--study", "forks", "--folder", str(results), "--seeds", "0", "--device", options.device]
    given += ["--run", "mdlm-text" if options.quick else "dit-fashion"]
    given += ["--data-folder", str(images)] if images.exists() and not options.quick else []
    given += ["--quick", "--only", *QUICK_FORKS] if options.quick else []
    return Stage([Command("forks", [sys.executable, "benchmarks/study.py", *given], caches())], 1, results)


STAGES: dict[str, Callable[[argparse.Namespace], Stage]] = {
    "build": build, "smoke": smoke, "compile": compile_, "bench": bench, "train": train, "tests": tests, "forks": forks,
    "deep": deep, "sanitize": sanitize,
}  # fmt: skip


def execute(name: str, stage: Stage, limit: float, out: Path) -> list[Outcome]:
    """Run a stage's commands; at its limit end what still runs, and leave out the rest."""
    folder, end = out / name, time.perf_counter() + limit
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running, outcomes = list(stage.commands), [], []
    while waiting or running:
        while waiting and len(running) < stage.at_once:
            running.append(start(waiting.pop(0), folder))
        over = time.perf_counter() > end
        for entry in list(running):
            command, process, began, log = entry
            if over:
                stop(process)
            if process.poll() is not None:
                running.remove(entry)
                code = None if over else process.returncode
                last = [] if code == 0 else log.read_text(errors="replace").splitlines()[-LAST:]
                outcomes.append(Outcome(name, command.name, code, time.perf_counter() - began, str(log), last))
                record(outcomes[-1], out)
        if over:
            waiting.clear()
        time.sleep(0.05)
    return outcomes


def start(command: Command, folder: Path) -> tuple[Command, subprocess.Popen[bytes], float, Path]:
    """Start a command in a process group of its own, its output going to a log."""
    log = folder / f"{command.name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command.arguments, cwd=ROOT, env=os.environ | command.env, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return command, process, time.perf_counter(), log


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def record(outcome: Outcome, out: Path) -> None:
    """Print how a command ended, and append it to $OUT/stages.jsonl."""
    ended = "cut off" if outcome.returncode is None else f"exit {outcome.returncode}"
    print(f"{outcome.stage}: {outcome.command} {ended} after {outcome.seconds:.0f} s", flush=True)
    with (out / "stages.jsonl").open("a") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def counts(stage: Stage, outcomes: list[Outcome]) -> tuple[int, int]:
    """Return how many passed and failed: tests, where the stage runs them, else commands."""
    if stage.results is not None and stage.results.suffix == ".jsonl" and stage.results.exists():
        found = Counter(json.loads(line)["outcome"] for line in stage.results.read_text().splitlines())
        return found["passed"], found["failed"]
    passed = sum(outcome.returncode == 0 for outcome in outcomes)
    return passed, len(stage.commands) - passed


def run(name: str, limit: float, options: argparse.Namespace) -> tuple[str, bool]:
    """Run a stage. Returns its line of the table, and whether all went well."""
    began = time.perf_counter()
    try:
        stage = STAGES[name](options)
        outcomes = execute(name, stage, limit, options.out)
    except Exception as error:  # no stage stops another
        return f"| {name} | {time.perf_counter() - began:.0f} | | | {type(error).__name__}: {error} |", False
    if not stage.commands:
        return f"| {name} | 0 | | | skipped |", True
    passed, failed = counts(stage, outcomes)
    well = len(outcomes) == len(stage.commands) and all(outcome.returncode == 0 for outcome in outcomes)
    cut = ", cut off" if any(outcome.returncode is None for outcome in outcomes) else ""
    where = stage.results or options.out / name
    return f"| {name} | {time.perf_counter() - began:.0f} | {passed} | {failed}{cut} | {where} |", well


def parse(arguments: list[str] | None) -> tuple[dict[str, float], argparse.Namespace]:
    """Return the stages with their limits, and the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", metavar="STAGE[=SECONDS]", help=", ".join(STAGES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing compiled: does it run?")
    parser.add_argument("--shard", default="", metavar="I/N", help="of the stage tests: every N-th test, from the I-th")
    parser.add_argument("--tests", default="tests", metavar="PATH", help="of smoke and tests: a folder or a file")
    parser.add_argument("--benches", nargs="+", default=list(BENCHES), choices=BENCHES, metavar="OP")
    options = parser.parse_args(arguments)
    options.out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").resolve()
    limits: dict[str, float] = {}
    for text in options.stages:
        name, _, seconds = text.partition("=")
        if name not in STAGES:
            parser.error(f"unknown stage {name!r}: one of {', '.join(STAGES)}")
        if name == "bench" and "compile" not in limits:
            limits["compile"] = LIMITS["compile"]
        limits[name] = float(seconds or LIMITS[name])
    return limits, options


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; print the table. Returns the exit code: 0 if all went well."""
    limits, options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [run(name, limit, options) for name, limit in limits.items()]
    table = ["| stage | seconds | passed | failed | results |", "|---|---|---|---|---|", *(line for line, _ in lines)]
    (options.out / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    return 0 if all(well for _, well in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
