"""Trains variants of one run over several seeds and gathers what they reach: python benchmarks/study.py --help.

Each (variant, seed) is a line of JSON in --folder; lines that are there already are not run again, so several processes
can share the work (--part 0/2, --part 1/2) and a study that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import controls
import forks
import pages
import tables
import torch
import tyro
from fork_arms import ARMS
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper
from variants import COMPARED, EIGHT_BIT, STUDIES, choices, on_gpu, tiny

from diffusionblocks.experiments import commands
from diffusionblocks.experiments.baselines import end_to_end as baselines
from diffusionblocks.experiments.baselines.tiny_recursive import Recursions, tiny_recursive
from diffusionblocks.experiments.baselines.unrolled import unrolled
from diffusionblocks.experiments.config import TrainConfig, to_dict
from diffusionblocks.experiments.presets import RUNS
from diffusionblocks.experiments.run_folder import machine
from diffusionblocks.experiments.tasks import Task, task_of
from diffusionblocks.experiments.tasks.base import Addresses
from diffusionblocks.experiments.tasks.causal_lm import WRITTEN, CausalLMTask
from diffusionblocks.training.optimizer import MakeOptimizer
from diffusionblocks.training.trainer import Trainer

Row = dict[str, Any]
CPU = torch.device("cpu")
MACHINES = (2, 3, 4, 6)


class Rows:
    """A trainer's callback that keeps the log's rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_log(self, trainer: Trainer, row: Row) -> None:
        self.rows.append(row)


def block_wise(task: Task, optimizer: MakeOptimizer | None = None) -> Row:
    """Train and evaluate one config, without a run folder. optimizer: in place of the default one."""
    began, log = time.perf_counter(), Rows()
    with tempfile.TemporaryDirectory() as folder:
        task = type(task)(replace(task.config, out=Path(folder), device="cpu"))
        if optimizer is None:
            trainer = commands.trainer_of(task)
        else:  # its state may be more than plain tensors, so nothing waits elsewhere
            trainer = Trainer(task.model(), replace(task.config, offload=None), optimizer=optimizer)
        trainer.callbacks.append(log)
        trainer.fit(Addresses(), batch=task.batches(trainer.device).batch, progress=False)
        seconds = time.perf_counter() - began
        scores = {split: commands.evaluate(task, trainer, split) for split in ("val", "test")}
        scores["test"] |= texts(task, trainer, Path(folder))
    return {
        "seconds": seconds,
        "memory": max((row["bytes"] for row in log.rows), key=lambda bytes_: sum(bytes_.values())),
        "moments": moment_bytes(list(trainer.optimizers.values())),
        "curve": curve([row["loss"] for row in log.rows]),
        "edges": trainer.model.partition.edges,
        **{split: {k: v for k, v in score.items() if k != "levels"} for split, score in scores.items()},
    }


def curve(losses: list[float]) -> list[float]:
    """Return the mean of the logged losses of each tenth of the training."""
    cuts = [len(losses) * i // 10 for i in range(11)]
    return [statistics.mean(losses[a:b]) for a, b in itertools.pairwise(cuts) if b > a]


def moment_bytes(optimizers: list[torch.optim.Optimizer]) -> float:
    """Return the bytes of moments per weight; those of a tensor subclass are its inner tensors'."""
    states = [item for optimizer in optimizers for item in optimizer.state.items()]
    moments = [t for _, state in states for key, t in state.items() if key.startswith("exp_avg")]
    inner = [[getattr(t, n) for n in t.__tensor_flatten__()[0]] if is_wrapper(t) else [t] for t in moments]
    return sum(t.numel() * t.element_size() for t in itertools.chain(*inner)) / sum(p.numel() for p, _ in states)


def eight_bit(task: Task) -> Row:
    """Train with torchao's 8-bit AdamW, with the decay of the default optimizer: none of vectors."""
    from torchao.optim import AdamW8bit

    def make(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in params if p.dim() > 1]},
            {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return AdamW8bit([g for g in groups if g["params"]], lr=task.config.lr, weight_decay=task.config.weight_decay)

    return block_wise(task, make)


def texts(task: Task, trainer: Trainer, folder: Path) -> Row:
    """Judge as many texts as the end-to-end network writes; nothing for other architectures."""
    if not isinstance(task, CausalLMTask):
        return {}
    config = task.config
    with trainer.averages():
        commands.sample(
            task, trainer.model, folder, count=WRITTEN, seed=config.seed, length=config.length, judge="ngram"
        )
    return json.loads((folder / "judge.json").read_text())


def end_to_end(task: Task) -> Row:
    """The tuned end-to-end baseline."""
    return dataclasses.asdict(baselines.end_to_end(task, CPU))


def other(name: str) -> Callable[[Task], Row]:
    """A baseline of classifiers."""
    return lambda task: dataclasses.asdict(commands.OTHERS[name](task, CPU))


def shallow(task: Task) -> Row:
    """The end-to-end network of one block's depth."""
    return dataclasses.asdict(baselines.end_to_end(task, CPU, name="shallow"))


def shallow_longer(task: Task) -> Row:
    """The same with as many steps as the blocks have: at the compute and the memory of the blocks."""
    return shallow(type(task)(replace(task.config, steps=task.config.total_steps)))


def shallow_averaged(task: Task) -> Row:
    """As many ordinary networks of one block's depth as there are blocks, each with its own seed; their mean logits.

    At the compute, the memory and the rate of the blocks: what they owe to averaging alone."""
    config, small = task.config, baselines.shallow(task)
    seeds = [config.seed + 1000 * i for i in range(config.blocks)]
    began, rows = time.perf_counter(), baselines.Rows()
    mean = Mean([averaged(type(small)(replace(small.config, seed=seed)), rows) for seed in seeds])
    return {
        "seconds": time.perf_counter() - began,
        "memory": rows.peak,
        **{split: small.score(mean, split, CPU) for split in ("val", "test")},
    }


def averaged(task: Task, rows: baselines.Rows) -> torch.nn.Module:
    """Train the task's ordinary network at the rate of the blocks; return it with its averaged weights."""
    config, network = task.config, task.network()
    settings = baselines.settings_of(config, CPU, steps=config.steps, lr=config.lr, warmup=config.warmup)
    trainer = Trainer(baselines.Ordinary(network), settings, callbacks=[rows])
    trainer.fit(Addresses(), batch=task.batches(CPU).batch, progress=False)
    with trainer.averages():
        prefix = "blocks.0.layers.0."
        weights = {k.removeprefix(prefix): t for k, t in trainer.model.state_dict().items() if k.startswith(prefix)}
    trainer.offloader.release()
    network.load_state_dict(weights)
    return network


class Mean(torch.nn.Module):
    """Networks whose logits are averaged."""

    def __init__(self, networks: list[torch.nn.Module]):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(x) for network in self.networks]).mean(0)


def recurring(train: Callable[..., baselines.Result]) -> Callable[[Task], Row]:
    """A way to train for many passes."""
    return lambda task: dataclasses.asdict(train(task, CPU))


RECURRENCES: dict[str, Callable[..., baselines.Result]] = {
    "one step of the chain": partial(unrolled, steps=1),
    "2 steps, unrolled": partial(unrolled, steps=2),
    "4 steps, unrolled": partial(unrolled, steps=4),
    "tiny recursive, 2 x 2": partial(tiny_recursive, recursions=Recursions(latent=2, deep=2, supervised=4)),
    "tiny recursive, 6 x 3": tiny_recursive,
}
CONTROLS: dict[str, Callable[[Task], Row]] = {
    "end-to-end": end_to_end,
    "shallow": shallow,
    "shallow, equal compute": shallow_longer,
    "shallow, averaged": shallow_averaged,
    EIGHT_BIT: eight_bit,
    **{name: recurring(train) for name, train in RECURRENCES.items()},
    **{name: other(name) for name in commands.OTHERS},
    **{f"soup of {b}": partial(controls.soup, machines=b) for b in MACHINES},
    **{f"soup of {b}, by outputs": partial(controls.ensemble, machines=b) for b in MACHINES},
}


@dataclass
class Study:
    """What to run."""

    run: str = "vit-digits"
    study: str = "main"
    """Which of the run's studies: main, blocks, partition, overlap, sharing, branch, capacity, controls, forks,
    recurrence, tokens, moments (whose 8-bit rows need torchao; rows that can't be run are left out by --only); or
    "choice": every learning rate and warm-up, to choose from on the validation split of seeds that no table uses."""
    folder: Path = tables.RESULTS
    """Its rows go to RUN_STUDY.jsonl there; from the default one, its tables to docs/lab-book.md."""
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()
    """Variants to run; all by default."""
    part: str = "0/1"
    """This process's share of the work: i/n."""
    threads: int = 1
    device: str = "cpu"
    """Of the forks; all others train on the CPU."""
    data_folder: Path | None = None
    """Of images that are files, if not where their package puts them."""
    quick: bool = False
    """Forks of tiny networks, of a few steps: do they run?"""


def main(study: Study) -> None:
    torch.set_num_threads(study.threads)
    base = RUNS[study.run][1]
    if study.data_folder is not None:
        base = replace(base, data_folder=study.data_folder)  # type: ignore[call-arg]
    rows = study.folder / f"{study.run}_{study.study}.jsonl".replace("-", "_")
    for name, config, seed in work(study, base):
        if (name, seed) in _done(rows):
            continue
        task = task_of(replace(config, seed=seed))
        if study.study == "forks":
            result = forks.fork(name.rpartition(": ")[2], task, study.folder / "bases", torch.device(study.device))
        else:
            result = CONTROLS.get(name, block_wise)(task)
        facts = {"variant": name, "seed": seed, "machine": machine(CPU), "config": to_dict(task.config)}
        row = {"architecture": base.architecture, **facts, **result}
        study.folder.mkdir(parents=True, exist_ok=True)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        key = "loss" if study.study == "forks" else task.metric.key
        print(f"{name} seed {seed}: val {row['val'][key]:.4g} test {row['test'][key]:.4g}", flush=True)
        if study.folder.resolve() == tables.RESULTS:
            pages.renew()
    if rows.exists():
        print(tables.report(rows))


def work(study: Study, base: TrainConfig) -> list[tuple[str, TrainConfig, int]]:
    """This process's share of variants and seeds, all variants of a seed before the next seed."""
    every = STUDIES[base.architecture] | {"choice": choices}
    if study.study not in every:
        raise ValueError(f"study must be one of {', '.join(every)} for {study.run}, got {study.study!r}")
    compared = (EIGHT_BIT,) if study.study == "moments" else ()
    if study.study == "recurrence":
        compared = (*RECURRENCES, "end-to-end")
    if study.study == "controls" and base.architecture == "vit":
        compared = ("local",)
    if study.study == "main":
        compared = COMPARED.get(base.architecture, ("end-to-end",))
    configs = dict.fromkeys(compared, base) | every[study.study](base)
    if study.study == "forks":
        settings = on_gpu(base) if study.device != "cpu" else configs
        settings = {name: tiny(config) if study.quick else config for name, config in settings.items()}
        configs = {f"{name}: {arm}": config for name, config in settings.items() for arm in ARMS}
    chosen = [name for name in configs if not study.only or name in study.only]
    index, count = map(int, study.part.split("/"))
    return [(name, configs[name], seed) for seed in study.seeds for name in chosen][index::count]


def _done(path: Path) -> set[tuple[str, int]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["variant"], row["seed"]) for row in map(json.loads, lines)}


if __name__ == "__main__":
    main(tyro.cli(Study))
