"""Runs without what takes most of a tiny one's seconds and has tests of its own: pictures, plans, a good judge."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusionblocks.experiments import commands
from diffusionblocks.experiments.plan import plan_of
from diffusionblocks.experiments.tasks import Task


class _ByConfig:
    """A task that equals another of the same config, wherever its run lies."""

    def __init__(self, task: Task):
        self.task, self.key = task, repr(replace(task.config, out=Path()))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByConfig) and self.key == other.key


@functools.cache
def _plan(found: _ByConfig) -> Any:
    return plan_of(found.task)


def spare(patch: pytest.MonkeyPatch) -> None:
    """Let the commands draw nothing, and plan once what many runs have in common."""
    patch.setattr(commands, "plots", SimpleNamespace(draw=lambda folder: []))
    patch.setattr(commands, "plan_of", lambda task: _plan(_ByConfig(task)))
