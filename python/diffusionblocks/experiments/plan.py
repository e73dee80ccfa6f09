"""The memory that a run will take, before it runs."""

from __future__ import annotations

from dataclasses import replace

from torch._subclasses.fake_tensor import FakeTensorMode

from ..noise.density import LogNormal
from ..noise.partition import make_partition
from ..training.plan import Plan, Unread, plan
from .tasks.base import Task


def plan_of(task: Task) -> Plan:
    """Return the bytes by category that a run takes, for every number of blocks that its network can be cut into.

    The network is never allocated.
    """
    config = task.config
    partition = make_partition(LogNormal(), config.layer_counts)  # its own would be computed from weights
    with FakeTensorMode(), Unread():
        model, batch = task.model(partition), task.example()
    found = plan(model, batch, config=config)
    return replace(found, cuts={b: found.cuts[b] for b in config.block_counts if b in found.cuts})
