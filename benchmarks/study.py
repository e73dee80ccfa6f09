"""Trains variants of one run over several seeds and gathers what they reach: python benchmarks/study.py --help.

Each (variant, seed) is a line of JSON in --folder; lines that are there already are not run again, so several processes
can share the work (--part 0/2, --part 1/2) and a study that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tables
import torch
import tyro
from variants import COMPARED, STUDIES, choices

from diffusionblocks.experiments import commands as jobs
from diffusionblocks.experiments.baselines import end_to_end as baselines
from diffusionblocks.experiments.config import TrainConfig, to_dict
from diffusionblocks.experiments.presets import RUNS
from diffusionblocks.experiments.session import Session, train
from diffusionblocks.experiments.tasks import adapter_of
from diffusionblocks.experiments.tasks.base import Adapter
from diffusionblocks.experiments.tasks.causal_lm import WRITTEN, CausalLMAdapter

Row = dict[str, Any]
CPU = torch.device("cpu")


def block_wise(adapter: Adapter) -> Row:
    """Train and evaluate one config, without a run folder."""
    began = time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        session = jobs.open_session(type(adapter)(replace(adapter.config, out=Path(folder))))
        train(session, adapter.batches(session.device), on_log=rows.append, on_step=lambda: None)
        seconds = time.perf_counter() - began
        scores = {split: jobs.evaluate(adapter, session, split) for split in ("val", "test")}
        scores["test"] |= texts(adapter, session, Path(folder))
    return {
        "seconds": seconds,
        "memory": max((row["bytes"] for row in rows), key=lambda bytes_: sum(bytes_.values())),
        "edges": session.model.partition.edges,
        **{split: {k: v for k, v in score.items() if k != "levels"} for split, score in scores.items()},
    }


def texts(adapter: Adapter, session: Session, folder: Path) -> Row:
    """What the judge says of as many texts as it gets from the end-to-end network; nothing for other architectures."""
    if not isinstance(adapter, CausalLMAdapter):
        return {}
    config = adapter.config
    with jobs.averaged(session) as walker:
        jobs.sample(adapter, walker, folder, count=WRITTEN, seed=config.seed, length=config.length)
    return json.loads((folder / "judge.json").read_text())


def end_to_end(adapter: Adapter) -> Row:
    """The tuned end-to-end baseline."""
    return dataclasses.asdict(baselines.end_to_end(adapter, CPU, on_log=lambda row: None))


def other(name: str) -> Callable[[Adapter], Row]:
    """A baseline of classifiers."""
    return lambda adapter: dataclasses.asdict(jobs.OTHERS[name](adapter, CPU, on_log=lambda row: None))


def shallow(adapter: Adapter) -> Row:
    """The end-to-end network of one block's depth."""
    return dataclasses.asdict(baselines.end_to_end(adapter, CPU, on_log=lambda row: None, name="shallow"))


def shallow_longer(adapter: Adapter) -> Row:
    """The same with as many steps as the blocks have: at the compute and the memory of the blocks."""
    longer = type(adapter)(replace(adapter.config, steps=adapter.config.total_steps))
    return shallow(longer)


def shallow_averaged(adapter: Adapter) -> Row:
    """As many ordinary networks of one block's depth as there are blocks, each with its own seed; their mean logits.

    At the compute, the memory and the rate of the blocks: what they owe to averaging alone."""
    config, small = adapter.config, baselines.shallow(adapter)
    seeds = [config.seed + 1000 * i for i in range(config.blocks)]
    runs = [
        baselines.attempt("shallow", type(small)(replace(small.config, seed=seed)), CPU, config.lr, config.warmup)
        for seed in seeds
    ]
    mean = Mean([run.network for run in runs])
    return {
        "seconds": sum(run.seconds for run in runs),
        "memory": runs[0].memory,
        **{split: small.score(mean, split, CPU) for split in ("val", "test")},
    }


class Mean(torch.nn.Module):
    """Networks whose logits are averaged."""

    def __init__(self, networks: list[torch.nn.Module]):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(x) for network in self.networks]).mean(0)


CONTROLS: dict[str, Callable[[Adapter], Row]] = {
    "end-to-end": end_to_end,
    "shallow": shallow,
    "shallow, equal compute": shallow_longer,
    "shallow, averaged": shallow_averaged,
    **{name: other(name) for name in jobs.OTHERS},
}


@dataclass
class Study:
    """What to run."""

    run: str = "vit-digits"
    study: str = "main"
    """Which of the run's studies: main, blocks, partition, overlap, sharing, branch, capacity; or "choice": every
    learning rate and warm-up, to choose from on the validation split of seeds that no table uses."""
    folder: Path = tables.RESULTS
    """Its rows go to RUN_STUDY.jsonl there; from the default one, its tables to docs/results.md."""
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()
    """Variants to run; all by default."""
    part: str = "0/1"
    """This process's share of the work: i/n."""
    threads: int = 1


def main(study: Study) -> None:
    torch.set_num_threads(study.threads)
    base = RUNS[study.run][1]
    rows = study.folder / f"{study.run}_{study.study}.jsonl".replace("-", "_")
    for name, config, seed in work(study, base):
        if (name, seed) in _done(rows):
            continue
        adapter = adapter_of(replace(config, seed=seed))
        result = CONTROLS.get(name, block_wise)(adapter)
        told = {"variant": name, "seed": seed, "machine": jobs.machine(CPU), "config": to_dict(adapter.config)}
        row = {"architecture": base.architecture, **told, **result}
        study.folder.mkdir(parents=True, exist_ok=True)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        key = adapter.metric.key
        print(f"{name} seed {seed}: val {row['val'][key]:.4g} test {row['test'][key]:.4g}", flush=True)
        if study.folder.resolve() == tables.RESULTS:
            tables.renew()
    if rows.exists():
        print(tables.report(rows))


def work(study: Study, base: TrainConfig) -> list[tuple[str, TrainConfig, int]]:
    """This process's share of variants and seeds, all variants of a seed before the next seed."""
    every = STUDIES[base.architecture] | {"choice": choices}
    if study.study not in every:
        raise ValueError(f"study must be one of {', '.join(every)} for {study.run}, got {study.study!r}")
    compared = COMPARED.get(base.architecture, ("end-to-end",)) if study.study == "main" else ()
    configs = dict.fromkeys(compared, base) | every[study.study](base)
    chosen = [name for name in configs if not study.only or name in study.only]
    index, count = map(int, study.part.split("/"))
    return [(name, configs[name], seed) for seed in study.seeds for name in chosen][index::count]


def _done(path: Path) -> set[tuple[str, int]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["variant"], row["seed"]) for row in map(json.loads, lines)}


if __name__ == "__main__":
    main(tyro.cli(Study))
