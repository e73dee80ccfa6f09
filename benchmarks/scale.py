"""Many GPUs, on paper: what a step of equal work takes by blocks, by FSDP, by a pipeline; and a check.

python benchmarks/scale.py [--cluster.gpus 4096] [--check]; --help names the rest

The model: a GPU computes at a rate; what it sends overlaps its computing, so that the longer of both counts; a step
lasts as long as its slowest GPU, each of which is slow by a factor drawn anew (lognormal), so that what waits for each
other decides: all GPUs, or those of one block. Blocks with a stem and a head each run these B times. `--check` trains a
small network here by one and two processes, and compares with the model, fed with a step and a sum measured here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

STATE = 18  # bytes per weight: bfloat16, float32 master, two moments and average
BLOCKS_RUN = 2  # blocks of scale_run.py


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them.

    flops: Achieved, a second. sent: Bytes a second and GPU, each way. jitter: Standard deviation of ln of a GPU's
    slowness in a step.
    """

    gpus: int = 4096
    flops: float = 4e14
    sent: float = 4e10
    jitter: float = 0.05


@dataclass(frozen=True)
class Network:
    """A transformer and its batch. head: vocabulary, or numbers of a patch, of stem and head; tokens: of a batch."""

    layers: int = 96
    dim: int = 8192
    head: int = 64
    tokens: int = 2**24

    @property
    def layer_weights(self) -> float:
        """Weights of all layers: 12 d^2 each."""
        return 12.0 * self.layers * self.dim**2

    @property
    def end_weights(self) -> float:
        """Weights of stem and head."""
        return 2.0 * self.head * self.dim


@dataclass(frozen=True)
class Cost:
    """Of a step of equal work: seconds, bytes that a GPU sends in it, bytes of state it holds, GPUs that wait for each
    other."""

    seconds: float
    sent: float
    held: float
    together: int


def slowest(count: int, jitter: float, draws: int = 400) -> float:
    """Return the mean factor of the slowest of `count` GPUs."""
    generator = torch.Generator().manual_seed(0)
    slow = [(jitter * torch.randn(count, generator=generator)).exp().max() for _ in range(draws)]
    return float(torch.stack(slow).mean()) / math.exp(jitter**2 / 2)


def computing(network: Network, cluster: Cluster, weights: float) -> float:
    """Return seconds of forward and backward passes of the whole batch over `weights` on all GPUs, 6 FLOP each."""
    return 6 * weights * network.tokens / cluster.flops / cluster.gpus


def blocks(network: Network, cluster: Cluster, count: int) -> Cost:
    """B blocks, each on 1 / B of the GPUs, whole on each of them; a group sums its gradients (bfloat16, a ring)."""
    group, own = cluster.gpus // count, network.layer_weights / count + network.end_weights
    seconds = computing(network, cluster, network.layer_weights + count * network.end_weights)
    sent = 2 * 2 * own * (group - 1) / group if group > 1 else 0.0
    return Cost(max(seconds, sent / cluster.sent) * slowest(group, cluster.jitter), sent, STATE * own, group)


def fsdp(network: Network, cluster: Cluster) -> Cost:
    """All layers, their state shared by all GPUs: weights come twice, gradients go once (bfloat16)."""
    weights = network.layer_weights + network.end_weights
    sent = 3 * 2 * weights * (cluster.gpus - 1) / cluster.gpus
    seconds = max(computing(network, cluster, weights), sent / cluster.sent)
    return Cost(seconds * slowest(cluster.gpus, cluster.jitter), sent, STATE * weights / cluster.gpus, cluster.gpus)


def pipeline(network: Network, cluster: Cluster, stages: int) -> Cost:
    """Stages of layers one behind the other, four micro-batches for each (1F1B); copies sum their gradients."""
    weights, copies = network.layer_weights + network.end_weights, cluster.gpus // stages
    passed = 2 * 2 * network.tokens / copies * network.dim  # activations forth, gradients back
    sent = 2 * 2 * weights / stages * (copies - 1) / copies + passed
    bubble = 1 + (stages - 1) / (4 * stages)
    seconds = max(computing(network, cluster, weights) * bubble, sent / cluster.sent)
    return Cost(seconds * slowest(cluster.gpus, cluster.jitter), sent, STATE * weights / stages, cluster.gpus)


def others(network: Network, cluster: Cluster) -> dict[str, Cost]:
    """Return what other ways take."""
    stages = {f"pipeline of {n}": pipeline(network, cluster, n) for n in (8, 32) if n <= network.layers}
    return {"FSDP": fsdp(network, cluster), **stages}


def table(network: Network, cluster: Cluster) -> list[str]:
    """Return the lines of a table of all ways."""
    ways = others(network, cluster)
    ways |= {f"{n} blocks": blocks(network, cluster, n) for n in (2, 3, 6, 12, 24) if network.layers % n == 0}
    lines = [
        "| | seconds per step | sent, GiB per GPU | state, GiB per GPU | GPUs that wait for each other |",
        "|---|---|---|---|---|",
    ]
    for name, cost in ways.items():
        gib = [f"{count / 2**30:.1f}" for count in (cost.sent, cost.held)]
        lines.append(f"| {name} | {cost.seconds:.2f} | {' | '.join(gib)} | {cost.together:,} |")
    return lines


def pays_until(network: Network, cluster: Cluster, count: int) -> float:
    """Return how large stem and head may be for B blocks to be the fastest way, as a share of the layers' weights."""

    def pays(head: int) -> bool:
        larger = dataclasses.replace(network, head=head)
        fastest = min(cost.seconds for cost in others(larger, cluster).values())
        return blocks(larger, cluster, count).seconds <= fastest

    low, high = 0, 2 * round(network.layer_weights / network.dim)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return dataclasses.replace(network, head=low).end_weights / network.layer_weights


def run(groups: int, ranks: int, batch: int, *, copies: int = 1) -> dict[str, Any]:
    """Run scale_run.py in a mesh, or `copies` of it at the same time; return what the first process says."""
    script, given = str(Path(__file__).with_name("scale_run.py")), [str(groups), str(ranks), str(batch)]
    count = groups * ranks
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, *launch, script, *given], stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(copies)
    ]
    said = [process.communicate()[0] for process in started]
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def check(batch: int = 512) -> list[str]:
    """Return the lines of a table: what the model says of meshes of two processes here, and what they take."""
    alone, beside, half = run(1, 1, batch), run(1, 1, batch, copies=2), run(1, 1, batch // 2, copies=2)
    apart, together = run(2, 1, batch), run(1, 2, batch)
    rows = {
        "one process": (sum(beside["steps"]), sum(alone["steps"])),
        "two, a block each: the first one's": (beside["steps"][0], apart["steps"][0]),
        "two, sharing each batch": (sum(half["steps"]) + BLOCKS_RUN * together["sum"], sum(together["steps"])),
    }
    lines = ["| processes | the model, ms | measured | off by |", "|---|---|---|---|"]
    return lines + [f"| {n} | {told:.1f} | {took:.1f} | {took / told - 1:+.0%} |" for n, (told, took) in rows.items()]


@dataclass
class Options:
    """What to print."""

    network: Network = dataclasses.field(default_factory=Network)
    cluster: Cluster = dataclasses.field(default_factory=Cluster)
    check: bool = False
    """Also train on this machine, and compare."""


def main(options: Options) -> None:
    """Print the tables."""
    print("\n".join(table(options.network, options.cluster)))
    shares = "; ".join(f"{n} blocks: {pays_until(options.network, options.cluster, n):.1%}" for n in (2, 3, 6, 12))
    print(
        f"\nAs fast as the fastest other way while stem and head are at most so much of the layers' weights: {shares}"
    )
    if options.check:
        print("\n" + "\n".join(check()))


if __name__ == "__main__":
    main(tyro.cli(Options))
