"""A finished run's folder with invented figures, for tests of what is drawn from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusionblocks.experiments.results import Run, read_run
from diffusionblocks.noise import density
from diffusionblocks.noise.information import information_bound
from diffusionblocks.noise.partition import Partition, equal_mass_edges, make_partition, step_levels
from diffusionblocks.offload.memory import CATEGORIES

EVERY = ("end-to-end", "checkpointing", "forward-forward")


def evaluation(partition: Partition) -> dict[str, Any]:
    """An evaluation as a good model of ten classes would give it."""
    sigmas = list(equal_mass_edges(partition.density, 31))
    owners = partition.block_of(torch.tensor(sigmas)).tolist()
    known = [1 / (1 + s**-4) for s in sigmas]
    entropy, error = [0.12 * k + 0.001 for k in known], [0.03 * k + 0.0001 for k in known]
    read = information_bound(sigmas, entropy, error, owners)
    names = ("sigma", "block", "cross_entropy", "error", "bound")
    rows = zip(sigmas, owners, entropy, error, read.bound, strict=True)
    steps = step_levels(partition, 8)[:-1]
    return {
        "accuracy": 97.2,
        "images": 360,
        "trajectory": [
            {"step": i, "sigma": s, "block": int(partition.block_of(s)), "accuracy": 97.2 - 3 * 0.5**i}
            for i, s in enumerate(steps)
        ],
        "levels": [dict(zip(names, row, strict=True)) | {"accuracy": 98.0} for row in rows],
        "bound_bits": read.bound[-1] / math.log(2),
        "regret_bits": [r / math.log(2) for r in read.regret],
    }


def summary(blocks: int = 3, baselines: tuple[str, ...] = EVERY) -> dict[str, Any]:
    """summary.json of an invented run."""
    log_sigma = np.linspace(math.log(0.2), math.log(14), 65)
    noise = density.Tabulated(tuple(log_sigma), tuple(np.exp(-((log_sigma[1:] + 0.7) ** 2))))
    partition = make_partition(noise, max(6, blocks), blocks)
    bytes_ = dict(zip(CATEGORIES, (480_000, 477_000, 954_000, 477_000, 3_000, 9_900_000), strict=True))
    results: dict[str, Any] = {
        "block-wise": {"test": evaluation(partition), "seconds": 60.0, "memory": bytes_, "plan": bytes_}
    }
    for name, accuracy in zip(EVERY, (95.4, 95.1, 71.0), strict=True):
        if name in baselines:
            large = {c: 2.6 * b for c, b in bytes_.items()}
            results[name] = {"test": {"accuracy": accuracy}, "seconds": 55.0, "memory": large}
    return {
        "config": {"model": {"num_classes": 10}},
        "partition": {
            "edges": list(partition.edges),
            "layers": list(partition.layers),
            "overlap": partition.overlap,
            "density": density.to_dict(partition.density),
        },
        "results": results,
    }


def rows(blocks: int = 3, baselines: tuple[str, ...] = EVERY) -> list[dict[str, Any]]:
    """metrics.jsonl of an invented run."""
    noise = np.random.default_rng(0)
    lines = []
    for i in range(72):
        loss = (2.2 * math.exp(-i / 15) + 0.1) * float(noise.uniform(0.7, 1.3))
        lines.append(
            {"run": "block-wise", "step": 25 * (i + 1), "block": i % blocks, "loss": loss, "seconds": 0.8 * i,
             "allocated": 12_000_000 + 30_000 * (i % blocks)}
        )  # fmt: skip
    for k, name in enumerate(baselines):
        lines += [
            {
                "run": name,
                "step": 25 * (i + 1),
                "loss": 1.0,
                "seconds": 2.2 * i,
                "allocated": 32_000_000 - 9_000_000 * k,
            }
            for i in range(24)
        ]
    return lines


def write_run(folder: Path, *, blocks: int = 3, baselines: tuple[str, ...] = EVERY) -> Path:
    """A run folder without its config and checkpoint."""
    write_rows(folder, rows(blocks, baselines))
    (folder / "summary.json").write_text(json.dumps(summary(blocks, baselines)))
    return folder


def write_rows(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_of(folder: Path, **changes: Any) -> Run:
    return read_run(write_run(folder, **changes))
