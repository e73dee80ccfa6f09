"""Trains variants of one run over several seeds and gathers what they reach: python benchmarks/study.py --help.

Each (variant, seed) is a line of JSON in --to; lines that are there already are not run again, so several processes can
share the work (--part 0/2, --part 1/2) and a study that was interrupted goes on.
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

import torch
import tyro
from variants import COMPARED, VARIANTS, choices

from diffusionblocks import baselines, jobs
from diffusionblocks.adapters import adapter_of
from diffusionblocks.adapters.base import Adapter
from diffusionblocks.runs import RUNS
from diffusionblocks.training import train

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
    return {
        "seconds": seconds,
        "memory": max((row["bytes"] for row in rows), key=lambda bytes_: sum(bytes_.values())),
        "edges": session.model.partition.edges,
        **{split: {k: v for k, v in score.items() if k != "levels"} for split, score in scores.items()},
    }


def end_to_end(adapter: Adapter) -> Row:
    """The tuned end-to-end baseline."""
    return dataclasses.asdict(baselines.end_to_end(adapter, CPU, on_log=lambda row: None))


def other(name: str) -> Callable[[Adapter], Row]:
    """A baseline of classifiers."""
    return lambda adapter: dataclasses.asdict(jobs.OTHERS[name](adapter, CPU, on_log=lambda row: None))


def shallow(adapter: Adapter) -> Row:
    """The end-to-end network of one block's depth."""
    return dataclasses.asdict(baselines.end_to_end(adapter, CPU, on_log=lambda row: None, name="shallow"))


CONTROLS: dict[str, Callable[[Adapter], Row]] = {
    "end-to-end": end_to_end,
    "shallow": shallow,
    **{name: other(name) for name in jobs.OTHERS},
}


@dataclass
class Study:
    """What to run."""

    run: str = "vit-digits"
    to: Path = Path("benchmarks/results/cpu-2core/vit_digits.jsonl")
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()
    """Variants to run; all by default."""
    choose: bool = False
    """Train with every learning rate and warm-up instead, to choose from: give it seeds that no table uses."""
    part: str = "0/1"
    """This process's share of the work: i/n."""
    threads: int = 1


def main(study: Study) -> None:
    torch.set_num_threads(study.threads)
    base = RUNS[study.run][1]
    controls = {name: CONTROLS[name] for name in COMPARED.get(base.architecture, ("end-to-end",))}
    configs = choices(base) if study.choose else dict.fromkeys(controls, base) | VARIANTS[base.architecture](base)
    chosen = [name for name in configs if not study.only or name in study.only]
    tables = [(name, seed) for name in chosen if " as " not in name for seed in study.seeds]
    ablations = [(name, seed) for seed in study.seeds for name in chosen if " as " in name]
    work = tables + ablations  # in this order, an interrupted study has something to say about every ablation
    index, count = map(int, study.part.split("/"))
    study.to.parent.mkdir(parents=True, exist_ok=True)
    for name, seed in work[index::count]:
        if (name, seed) in _done(study.to):
            continue
        config = replace(configs[name], seed=seed)
        adapter = adapter_of(config)
        result = controls.get(name, block_wise)(adapter)
        row = {"architecture": base.architecture, "variant": name, "seed": seed, "machine": jobs.machine(CPU), **result}
        with study.to.open("a") as file:
            file.write(json.dumps(row) + "\n")
        key = adapter.metric.key
        print(f"{name} seed {seed}: val {row['val'][key]:.4g} test {row['test'][key]:.4g}", flush=True)


def _done(path: Path) -> set[tuple[str, int]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["variant"], row["seed"]) for row in map(json.loads, lines)}


if __name__ == "__main__":
    main(tyro.cli(Study))
