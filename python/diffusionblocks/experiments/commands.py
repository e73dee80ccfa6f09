"""The jobs behind the commands: each reads or fills a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import files as checkpoint
from ..checkpoint.files import CheckpointError
from ..checkpoint.lock import run_lock
from ..checkpoint.manifest import package_version
from ..sampling.sampler import Walker
from ..training.offload import Residency
from . import snapshots
from .baselines import end_to_end as baselines
from .baselines.forward_forward import forward_forward
from .baselines.noprop import noprop
from .config import TrainConfig, from_yaml, to_dict, to_yaml
from .plan import plan
from .plotting import plots
from .progress import Progress
from .session import Session, store, train
from .tasks import adapter_of
from .tasks.base import Adapter, Row
from .tasks.vit import ViTAdapter

OTHERS = {"forward-forward": forward_forward, "noprop": noprop}  # that train without backpropagation through all layers


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one. Raises: ValueError if it isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is none that PyTorch knows; use 'cpu', 'cuda' or 'auto'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} can't train; use 'cpu', 'cuda' or 'auto'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} but this PyTorch sees no GPU; use device='cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r} but there are {torch.cuda.device_count()} GPUs; count from cuda:0")
    return device


def start(config: TrainConfig) -> Row:
    """Run a config from the beginning; returns the summary.

    Raises: ValueError if its folder already holds a run; RunLocked if another process is starting one there.
    """
    _check_free(config.out)
    adapter = adapter_of(config)
    adapter.batches(pick_device(config.device))  # what can't be read or made must not leave a folder that holds a run
    adapter.blocks()
    config.out.mkdir(parents=True, exist_ok=True)
    with run_lock(config.out):
        _check_free(config.out)
        if adapter.data:
            write(config.out / "data.json", json.dumps({"train_sha256": adapter.data.fingerprint()}) + "\n")
        write(config.out / "config.yaml", to_yaml(config))
        return carry_on(adapter)


def _check_free(folder: Path) -> None:
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} already holds a run: `dblocks resume {folder}`, or choose another --out")


def resume(folder: Path) -> Row:
    """Go on with a run from its last checkpoint, bit for bit as if it had never stopped; returns the summary.

    Raises: CheckpointError if the folder holds no run; RunLocked if another process trains there.
    """
    read_config(folder)  # before the lock's file is made in a folder that holds no run
    with run_lock(folder):
        checkpoint.sweep(folder / "checkpoint")
        return carry_on(open_adapter(folder))


def open_adapter(folder: Path) -> Adapter:
    """A run's architecture and data. Raises: CheckpointError if it holds no run, or its data have changed since."""
    adapter, told = adapter_of(read_config(folder)), folder / "data.json"
    if told.exists() and json.loads(told.read_text())["train_sha256"] != adapter.data.fingerprint():
        raise CheckpointError(f"the data of {folder} are not those it was trained on: put them back, or start anew")
    return adapter


def carry_on(adapter: Adapter) -> Row:
    """Train what is not trained yet, block-wise and the baselines; then summary and pictures."""
    config = adapter.config
    session = open_session(adapter)
    log = config.out / "metrics.jsonl"
    finished = {name: path for name in ("block-wise", *config.baseline) if (path := _result(config, name)).exists()}
    _trim(log, session.step, finished)
    with Progress(config) as progress, log.open("a") as lines:

        def on_log(row: Row) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            progress.show(row)

        for name in ("block-wise", *config.baseline):
            if name not in finished:
                write(_result(config, name), json.dumps(_run(name, adapter, session, on_log)))
    summary = summarize(session)
    write(config.out / "summary.json", json.dumps(summary, indent=1))
    shutil.rmtree(config.out / "waiting", ignore_errors=True)
    plots.draw(config.out)
    return summary


def open_session(adapter: Adapter) -> Session:
    """A session for the adapter's config: at its last checkpoint if there is one, else at the start."""
    config = adapter.config
    device = pick_device(config.device)
    session = Session(adapter.blocks(), config, device=device, folder=config.out / "waiting")
    if (config.out / "checkpoint" / checkpoint.MANIFEST).exists():
        session.seconds = snapshots.restore(session, config.out / "checkpoint")
    return session


def open_run(folder: Path) -> tuple[Adapter, Walker]:
    """A run's architecture, and the averaged weights of its last checkpoint, a block at a time on the device, without
    moments: nothing of it stays in the folder.

    Raises: CheckpointError if there is none.
    """
    adapter = open_adapter(folder)
    config, model, device = adapter.config, adapter.blocks(), pick_device(adapter.config.device)
    if not (folder / "checkpoint" / checkpoint.MANIFEST).exists():
        raise CheckpointError(f"{folder} has no checkpoint yet; train it on with `dblocks resume {folder}`")
    waiting = tempfile.TemporaryDirectory(prefix="waiting-", dir=folder)
    residency = Residency(model, device=device, store=store(config, device), folder=Path(waiting.name))
    weakref.finalize(residency, waiting.cleanup)
    model.partition = snapshots.restore_averages(residency, config, folder / "checkpoint")
    return adapter, Walker(model, residency)


def _run(name: str, adapter: Adapter, session: Session, on_log: Callable[[Row], None]) -> Row:
    if name == "block-wise":
        return _block_wise(adapter, session, on_log)
    if name in OTHERS:
        assert isinstance(adapter, ViTAdapter)  # the only config that takes them
        return dataclasses.asdict(OTHERS[name](adapter, session.device, on_log=on_log))
    tuned, choice = _result(session.config, "end-to-end"), None
    if name == "checkpointing" and tuned.exists():
        choice = json.loads(tuned.read_text())["choice"]
    result = baselines.end_to_end(adapter, session.device, on_log=on_log, name=name, choice=choice)
    return dataclasses.asdict(result)


def _block_wise(adapter: Adapter, session: Session, on_log: Callable[[Row], None]) -> Row:
    config, before, began = session.config, session.seconds, time.perf_counter()

    def seconds() -> float:
        return before + time.perf_counter() - began

    def logged(row: Row) -> None:
        on_log({"run": "block-wise", **row, "seconds": seconds()})

    def stepped() -> None:
        if session.step % config.checkpoint_every == 0 or session.step == config.total_steps:
            snapshots.save(session, config.out / "checkpoint", seconds=seconds())

    train(session, adapter.batches(session.device), on_log=logged, on_step=stepped)
    session.seconds = seconds()
    return {
        "seconds": session.seconds,
        "memory": _peak(config),
        "plan": plan(adapter, session.device).by_category,
        "val": evaluate(adapter, session, "val"),
        "test": evaluate(adapter, session, "test"),
    }


def evaluate(adapter: Adapter, session: Session, split: str) -> Row:
    """What a session's averaged weights are worth on a split, in the architecture's terms."""
    with averaged(session) as walker:
        return adapter.evaluate(walker, split)


@contextlib.contextmanager
def averaged(session: Session) -> Iterator[Walker]:
    """A session's averaged weights, to be read."""
    with session.residency.averages():
        yield Walker(session.model, session.residency)


def sample(adapter: Adapter, walker: Walker, folder: Path, **options: Any) -> list[Path]:
    """Samples by a walker's weights, written to `folder`; returns the files. The next block comes while one works."""
    folder.mkdir(parents=True, exist_ok=True)
    return adapter.sample(Walker(walker.model, walker.residency, prefetch=True), folder, **options)


def summarize(session: Session) -> Row:
    """All results of a run folder, with what is needed to run it again."""
    config = session.config
    return {
        "config": to_dict(config),
        "machine": machine(session.device),
        "level": session.model.target.level,
        "partition": snapshots.partition_to_dict(session.model.partition),
        "results": {name: json.loads(_result(config, name).read_text()) for name in ("block-wise", *config.baseline)},
    }


def machine(device: torch.device) -> Row:
    """What a figure was measured on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusionblocks": package_version(),
        "device": gpu or device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_config(folder: Path) -> TrainConfig:
    """The config of a run folder, writing where the folder is now. Raises: CheckpointError if it holds no run."""
    path = folder / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{path} is missing: {folder} is not a run folder; start one with `dblocks train`")
    try:
        return dataclasses.replace(from_yaml(path.read_text()), out=folder)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def write(path: Path, text: str) -> None:
    """Write a whole file or nothing: aside, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _result(config: TrainConfig, name: str) -> Path:
    return config.out / "results" / f"{name}.json"


def _trim(log: Path, step: int, finished: Any) -> None:
    """Drop the metrics of steps that will be run again."""
    if not log.exists():
        return
    *lines, _cut_short = log.read_text().split("\n")
    rows = [json.loads(line) for line in lines]
    kept = [r for r in rows if r["run"] in finished or (r["run"] == "block-wise" and r["step"] <= step)]
    write(log, "".join(json.dumps(row) + "\n" for row in kept))


def _peak(config: TrainConfig) -> Row:
    """The most bytes by category that the run's metrics hold."""
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    mine = [row["bytes"] for row in rows if row["run"] == "block-wise"]
    return max(mine, key=lambda bytes_: sum(bytes_.values()), default={})
