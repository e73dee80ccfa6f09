"""What the commands do: start, resume, evaluate and sample a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any, TextIO

from ..blocks import DiffusionBlocks
from ..checkpoint import files
from ..checkpoint.files import CheckpointError
from ..checkpoint.lock import run_lock
from ..offload.offloader import Offloader
from ..training.devices import pick_device
from ..training.log import named
from ..training.progress import Progress, stage
from ..training.schedule import adaptive_density
from ..training.state import load_averages
from ..training.trainer import StepOutput, Trainer
from .baselines import end_to_end
from .baselines.forward_forward import forward_forward
from .baselines.local import local
from .baselines.noprop import noprop
from .config import TrainConfig, to_dict, to_yaml
from .export import is_exported, open_exported
from .interrupts import Interrupts
from .plan import plan_of
from .results import BLOCKWISE
from .run_folder import (
    clear,
    identity,
    machine,
    naming,
    peak_memory,
    read_config,
    read_facts,
    result_file,
    trim_metrics,
    with_absolute_paths,
    write,
)  # fmt: skip
from .tasks import Task, task_of
from .tasks.base import Addresses, Row
from .threads import spare_threads

# They train without backpropagation through all layers.
OTHERS = {"forward-forward": forward_forward, "local": local, "noprop": noprop}
ANEW = "this baseline begins anew"


def start(config: TrainConfig, *, overwrite: bool = False) -> Row:
    """Run a config from the beginning; return the summary.

    overwrite: Remove the run that its folder already holds.
    Raises: ValueError if its folder already holds a run; RunLocked if another process is training there.
    """
    if not overwrite:
        _check_free(config.out)
    config = with_absolute_paths(config)
    task = task_of(config)
    task.batches(pick_device(config.device))  # load the data and build the model first, so that a failure leaves no run
    _check_alone(config, task.model())
    config.out.mkdir(parents=True, exist_ok=True)
    with run_lock(config.out):
        if overwrite:
            clear(config.out)
            config.out.mkdir(parents=True, exist_ok=True)
        _check_free(config.out)
        write(config.out / "facts.json", json.dumps(task.facts, indent=1))
        write(config.out / "config.yaml", to_yaml(config))
        try:
            return carry_on(task)
        finally:
            log = config.out / "metrics.jsonl"
            if not (config.out / "checkpoint").exists() and not (log.exists() and log.stat().st_size):
                clear(config.out)  # no step was made


def _check_alone(config: TrainConfig, model: DiffusionBlocks) -> None:
    """Raise ValueError that names all options which training some of the blocks alone lacks, not one after another."""
    if config.train_blocks is None or len(config.train_blocks) == config.blocks:
        return
    shared, adapts = config.shared == "shared", adaptive_density(model, config) is not None
    if shared or adapts:
        options = ("--shared per_block",) * shared + ("--no-adapt",) * adapts
        raise ValueError(
            "--train-blocks trains blocks apart, which must share nothing they train, nor a cut of the noise that "
            f"training moves: add {' '.join(options)}"
        )


def _check_free(folder: Path) -> None:
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} already holds a run: `dblocks resume {folder}`, another --out, or --overwrite")


def resume(folder: Path, **changes: Any) -> Row:
    """Go on with a run from its last checkpoint, bit for bit as if it had never stopped; return the summary.

    changes: New values of settings in CHANGEABLE, recorded in the run; a run that had ended trains on.
    Raises: CheckpointError if the folder holds no run, or its data have changed; RunLocked if another process trains
        there.
    """
    read_config(folder)  # before the lock's file is made in a folder that holds no run
    with run_lock(folder):
        files.sweep(folder / "checkpoint")
        config = read_config(folder)
        task = task_of(config, read_facts(folder))
        task.check_data()
        if changes:
            task.config = _changed(config, changes)
        return carry_on(task)


def _changed(config: TrainConfig, changes: Row) -> TrainConfig:
    """Record new settings in a run's folder, and remove the results that they make untrue."""
    new, done = dataclasses.replace(config, **changes), 0
    if (config.out / "checkpoint" / files.MANIFEST).exists():
        done = files.read_state(config.out / "checkpoint").state["step"]
    if "steps" in changes and (new.total_steps or 0) < done:
        raise ValueError(f"steps={changes['steps']} makes {new.total_steps} block-wise steps, and {done} are done")
    if "steps" in changes and config.branch:
        raise ValueError("steps: a run with branch can't change it, the blocks branch at a share of the steps")
    with (config.out / "changes.jsonl").open("a") as file:
        file.write(json.dumps({"step": done, **changes}) + "\n")
    write(config.out / "config.yaml", to_yaml(new))
    for name in (BLOCKWISE, *(config.baseline if "steps" in changes else ())):  # baselines train as many steps
        result_file(config, name).unlink(missing_ok=True)
    return new


def carry_on(task: Task) -> Row:
    """Train what is not trained yet, block-wise and the baselines; then summary and pictures.

    Of a run of some blocks alone, only those: return nothing.
    """
    config = task.config
    trainer, seconds = open_trainer(task)
    log = config.out / "metrics.jsonl"
    names = (BLOCKWISE, *config.baseline)
    finished = [name for name in names if result_file(config, name).exists()]
    trim_metrics(log, trainer.steps_done, finished)
    with log.open("a") as lines, Interrupts().watched() as interrupts:
        if config.train_blocks is not None:
            _train(task, trainer, RunLog(BLOCKWISE, lines, config, interrupts, seconds))
            shutil.rmtree(config.out / "waiting", ignore_errors=True)
            return {}
        for name in (n for n in names if n not in finished):
            run = RunLog(name, lines, config, interrupts, seconds if name == BLOCKWISE else 0.0)
            row = _block_wise(task, trainer, run) if name == BLOCKWISE else _baseline(name, task, run)
            write(result_file(config, name), json.dumps(row))
            if not all(result_file(config, other).exists() for other in names):  # else only pictures are left
                interrupts.check(f"{name} and its results are saved")
    summary = summarize(task, trainer)
    write(config.out / "summary.json", json.dumps(summary, indent=1))
    shutil.rmtree(config.out / "waiting", ignore_errors=True)
    from .plotting import plots  # Matplotlib takes most of a second

    plots.draw(config.out)
    return summary


def trainer_of(task: Task) -> Trainer:
    """Return a fresh trainer of a task, with waiting blocks in its run folder."""
    model = task.model()
    spare_threads(model, pick_device(task.config.device))
    return task.trainer(model, dataclasses.replace(task.config, folder=task.config.out / "waiting"))


def open_trainer(task: Task) -> tuple[Trainer, float]:
    """Return a task's trainer at its last checkpoint, if there is one, and the seconds it had trained."""
    trainer, folder = trainer_of(task), task.config.out / "checkpoint"
    if not (folder / files.MANIFEST).exists():
        return trainer, 0.0
    extra = trainer.load(folder)
    if extra.get("run") != identity(task.config):
        raise CheckpointError(f"{folder} was written by a run with another config; resume it with its own config.yaml")
    return trainer, float(extra["seconds"])


def open_run(folder: Path) -> tuple[Task, DiffusionBlocks]:
    """Return a run's task and its model with the averaged weights of the last checkpoint, one block at a time on the
    device; nothing is written to the run folder.

    folder: A run's, or one that `export` wrote. The training data need not be there.
    Raises: CheckpointError if there is none.
    """
    if is_exported(folder):
        return open_exported(folder)
    task = task_of(read_config(folder), read_facts(folder))
    if task.config.train_blocks is not None:
        raise CheckpointError(f"{folder} trains some blocks alone: join it with the others' folders by `dblocks merge`")
    model, device = task.model(), pick_device(task.config.device)
    spare_threads(model, device)
    if not (folder / "checkpoint" / files.MANIFEST).exists():
        raise CheckpointError(f"{folder} has no checkpoint yet; train it on with `dblocks resume {folder}`")
    waiting = tempfile.TemporaryDirectory(prefix="diffusionblocks-")
    weakref.finalize(model, waiting.cleanup)
    place = "disk" if device.type == "cpu" else "cpu"
    offloader = Offloader(model, device=device, offload=place, folder=Path(waiting.name), slots=2)
    load_averages(offloader, folder / "checkpoint")
    return task, model.eval()


class RunLog:
    """A trainer's callback: writes metrics and checkpoints of a run, and stops it where a signal asked for that."""

    def __init__(self, name: str, lines: TextIO, config: TrainConfig, interrupts: Interrupts, seconds: float):
        self.name, self.lines, self.config, self.interrupts = name, lines, config, interrupts
        self.saves = name == BLOCKWISE
        self.began, self.saved = time.perf_counter() - seconds, time.monotonic()

    def seconds(self) -> float:
        """Return the seconds trained so far, those before a resume among them."""
        return time.perf_counter() - self.began

    def on_log(self, trainer: Trainer, row: Row) -> None:
        with naming(self.config.out / "metrics.jsonl", "the last checkpoint is kept"):
            self.lines.write(json.dumps({"run": self.name, **row, "seconds": self.seconds()}) + "\n")
            self.lines.flush()

    def on_step_end(self, trainer: Trainer, output: StepOutput) -> None:
        done, stop = trainer.steps_done, self.interrupts.number is not None
        late = time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes
        if self.saves and (stop or late or done % self.config.checkpoint_every == 0 or done == self.config.total_steps):
            extra = {"seconds": self.seconds(), "run": identity(self.config)}
            trainer.save(self.config.out / "checkpoint", extra=extra)
            self.saved = time.monotonic()
        self.interrupts.check("saved" if self.saves else ANEW)

    def on_evaluated(self, trainer: Trainer) -> None:
        """Stop between two splits, where a signal came meanwhile."""
        self.interrupts.check("the training is saved, its evaluation begins anew" if self.saves else ANEW)


def _train(task: Task, trainer: Trainer, log: RunLog) -> None:
    config = task.config
    with Progress(config.total_steps, BLOCKWISE) as bar:
        others = named([name for name in config.loggers if name != "jsonl"], config.log_to)
        trainer.callbacks += [log, bar, *others]
        trainer.fit(Addresses(), batch=task.batches(trainer.device).batch, progress=False)


def _block_wise(task: Task, trainer: Trainer, log: RunLog) -> Row:
    config = task.config
    _train(task, trainer, log)
    row = {
        "seconds": log.seconds(),
        "memory": peak_memory(config),
        "plan": plan_of(task).rows[config.blocks].by_category,
        "val": evaluate(task, trainer, "val"),
    }
    log.on_evaluated(trainer)
    return {**row, "test": evaluate(task, trainer, "test")}


def _baseline(name: str, task: Task, log: RunLog) -> Row:
    device = pick_device(task.config.device)
    if name in OTHERS:
        return dataclasses.asdict(OTHERS[name](task, device, log))  # type: ignore[arg-type]
    tuned, choice = result_file(task.config, "end-to-end"), None
    if name == "checkpointing" and tuned.exists():
        choice = json.loads(tuned.read_text())["choice"]
    return dataclasses.asdict(end_to_end.end_to_end(task, device, log, name=name, choice=choice))


def evaluate(task: Task, trainer: Trainer, split: str) -> Row:
    """Evaluate a trainer's averaged weights on a split."""
    with stage(f"block-wise: evaluating on {split}"), trainer.averages():
        return task.evaluate(trainer.model, split)


def sample(task: Task, model: DiffusionBlocks, folder: Path, **options: Any) -> list[Path]:
    """Write samples of a model to `folder`; return the files. A folder that nothing was written to is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return task.sample(model, folder, **options)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def summarize(task: Task, trainer: Trainer) -> Row:
    """Return all results of a run folder, with what is needed to run it again."""
    config = task.config
    names = (BLOCKWISE, *config.baseline)
    return {
        "config": to_dict(config),
        "machine": machine(trainer.device),
        "level": trainer.model.target.level,
        "partition": trainer.model.partition.to_dict(),
        "results": {name: json.loads(result_file(config, name).read_text()) for name in names},
    }
