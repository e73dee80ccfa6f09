"""The jobs behind the commands: each reads or fills a run folder."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import baselines, checkpoint, evaluation, plots, snapshots
from .adapters.vit import vit_blocks
from .checkpoint import CheckpointError
from .config import TrainConfig, augmentation, from_yaml, to_yaml
from .data import ImageData, Loader, Split, load, prepare
from .evaluation import Walker
from .forward_forward import forward_forward
from .manifest import package_version
from .planning import plan
from .progress import Progress
from .training import Session, train

Row = dict[str, Any]


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one. Raises: ValueError if it isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' but this PyTorch sees no GPU; use device='cpu' or 'auto'")
    return device


def start(config: TrainConfig) -> Row:
    """Run a config from the beginning; returns the summary. Raises: ValueError if its folder already holds a run."""
    if (config.out / "config.yaml").exists():
        raise ValueError(f"{config.out} already holds a run: `dblocks resume {config.out}`, or choose another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    write(config.out / "config.yaml", to_yaml(config))
    return carry_on(config)


def resume(folder: Path) -> Row:
    """Go on with a run from its last checkpoint, bit for bit as if it had never stopped; returns the summary."""
    return carry_on(read_config(folder))


def carry_on(config: TrainConfig) -> Row:
    """Train what is not trained yet, block-wise and the baselines; then summary and pictures."""
    device = pick_device(config.device)
    data = load(config.data, folder=config.folder, seed=config.seed)
    session = open_session(config, device)
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
                write(_result(config, name), json.dumps(_run(name, session, data, on_log)))
    summary = summarize(session)
    write(config.out / "summary.json", json.dumps(summary, indent=1))
    shutil.rmtree(config.out / "waiting", ignore_errors=True)
    plots.draw(config.out)
    return summary


def open_session(config: TrainConfig, device: torch.device) -> Session:
    """A session for the config: at its last checkpoint if there is one, else at the start."""
    model = vit_blocks(
        config.model,
        config.blocks,
        recipe=config.method,
        shared=config.shared,
        overlap=config.overlap,
        seed=config.seed,
    )
    session = Session(model, config, device=device, folder=config.out / "waiting")
    if (config.out / "checkpoint" / checkpoint.MANIFEST).exists():
        session.seconds = snapshots.restore(session, config.out / "checkpoint")
    return session


def _run(name: str, session: Session, data: ImageData, on_log: Callable[[Row], None]) -> Row:
    config = session.config
    if name == "block-wise":
        return _block_wise(session, data, on_log)
    if name == "forward-forward":
        return dataclasses.asdict(forward_forward(config, data, session.device, on_log=on_log))
    checkpointing, choice = name == "checkpointing", None
    tuned = _result(config, "end-to-end")
    if checkpointing and tuned.exists():
        choice = json.loads(tuned.read_text())["choice"]
    result = baselines.end_to_end(
        config, data, session.device, on_log=on_log, checkpointing=checkpointing, choice=choice
    )
    return dataclasses.asdict(result)


def _block_wise(session: Session, data: ImageData, on_log: Callable[[Row], None]) -> Row:
    config, folder, before, began = (
        session.config,
        session.config.out / "checkpoint",
        session.seconds,
        time.perf_counter(),
    )

    def seconds() -> float:
        return before + time.perf_counter() - began

    def logged(row: Row) -> None:
        on_log({"run": "block-wise", **row, "seconds": seconds()})

    def stepped() -> None:
        if session.step % config.checkpoint_every == 0 or session.step == config.total_steps:
            snapshots.save(session, folder, seconds=seconds())

    loader = Loader(
        data.train, data, config.batch_size, seed=config.seed, device=session.device, **augmentation(config)
    )
    train(session, loader, on_log=logged, on_step=stepped)
    session.seconds = seconds()
    return {
        "seconds": session.seconds,
        "memory": _peak(config),
        "plan": plan(config, session.device).by_category,
        "val": evaluate(session, data, data.val),
        "test": evaluate(session, data, data.test),
    }


def evaluate(session: Session, data: ImageData, split: Split, *, steps: int | None = None) -> Row:
    """Evaluate a session's averaged weights on a split: accuracy along the walk, information bound."""
    config, method = session.config, session.config.method
    x = prepare(split.images, data.mean, data.std, device=session.device)
    walker = Walker(session.model, session.residency, walk_start=method.walk_start)
    with session.residency.averages():
        return evaluation.evaluate(
            walker,
            x,
            split.labels.to(session.device),
            steps=steps or config.walk_steps,
            levels=method.levels,
            sampler=config.sampler,
            seed=config.seed,
        )


def summarize(session: Session) -> Row:
    """All results of a run folder, with what is needed to run it again."""
    config = session.config
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "machine": machine(session.device),
        "partition": snapshots.partition_to_dict(session.model.partition),
        "results": {
            name: _as_result(json.loads(_result(config, name).read_text())) for name in ("block-wise", *config.baseline)
        },
    }


def machine(device: torch.device) -> Row:
    """What a figure was measured on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusionblocks": package_version(),
        "device": gpu or device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


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


def _as_result(values: Row) -> Row:
    """A baseline's Result in the shape of block-wise results."""
    if "test_accuracy" not in values:
        return values
    splits = {split: {"accuracy": values[f"{split}_accuracy"]} for split in ("val", "test")}
    return {k: v for k, v in values.items() if not k.endswith("_accuracy")} | splits


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
