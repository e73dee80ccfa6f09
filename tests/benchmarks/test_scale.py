"""The model of many GPUs: limits that are known, and a check that runs."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("scale")
    sys.modules.pop("scale", None)


def test_known_limits(scale):
    network = scale.Network(layers=12, dim=64, head=1, tokens=10**6)
    one = scale.Cluster(gpus=1, jitter=0.0)
    seconds = 6 * (network.layer_weights + network.end_weights) * network.tokens / one.flops
    assert scale.fsdp(network, one) == scale.Cost(
        pytest.approx(seconds), 0.0, pytest.approx(18 * (12**2 * 64**2 + 128)), 1
    )
    assert scale.blocks(network, dataclasses.replace(one, gpus=3), 3).sent == 0  # nobody to sum with
    quiet = scale.Cluster(gpus=64, jitter=0.0)
    slow = dataclasses.replace(quiet, jitter=0.1)
    waits = [
        way(network, slow).seconds / way(network, quiet).seconds
        for way in (scale.fsdp, lambda n, c: scale.blocks(n, c, 8))
    ]
    assert waits[0] > waits[1] > 1  # 64 wait for each other, and 8
    assert scale.blocks(network, quiet, 2).sent > scale.blocks(network, quiet, 4).sent
    heavy = dataclasses.replace(network, head=10**5)
    assert scale.blocks(heavy, quiet, 4).seconds > 3 * scale.blocks(heavy, quiet, 1).seconds  # four heads


def test_what_it_says_of_heads_is_where_the_ways_cross(scale):
    network, cluster = scale.Network(), scale.Cluster(gpus=512)
    share = scale.pays_until(network, cluster, 3)
    for factor, pays in ((0.9, True), (1.1, False)):
        head = round(factor * share * network.layer_weights / 2 / network.dim)
        larger = dataclasses.replace(network, head=head)
        fastest = min(cost.seconds for cost in scale.others(larger, cluster).values())
        assert (scale.blocks(larger, cluster, 3).seconds <= fastest) == pays


def test_the_check_compares_what_the_model_says_with_meshes(scale, monkeypatch):
    """Alone a process takes 30 ms for two blocks, beside another 40, with half of the batch 24; a sum takes 3."""

    def run(groups, ranks, batch, *, copies=1):
        if groups * ranks == 1:
            steps = [10.0, 20.0] if copies == 1 else [16.0, 24.0] if batch == 64 else [8.0, 16.0]
        else:
            steps = [20.0] if groups == 2 else [15.0, 21.0]
        return {"steps": steps, "sum": 3.0 if ranks == 2 else 0.0}

    monkeypatch.setattr(scale, "run", run)
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in scale.check(64)[2:]]
    assert rows == [["40.0", "30.0", "-25%"], ["16.0", "20.0", "+25%"], ["30.0", "36.0", "+20%"]]


def test_the_check_times_two_processes_that_share_a_batch(scale):
    found = scale.run(1, 2, 4)
    assert len(found["steps"]) == scale.BLOCKS_RUN and min(found["steps"]) > 0 and found["sum"] > 0
