"""Runs without what takes most of a tiny one's seconds and has tests of its own: pictures and plans."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest

from diffusionblocks.experiments import commands, plotting


def spare(patch: pytest.MonkeyPatch) -> None:
    """Let the commands draw nothing and plan nothing."""
    patch.setattr(plotting, "plots", SimpleNamespace(draw=lambda folder: []), raising=False)
    rows = defaultdict(lambda: SimpleNamespace(by_category={}))
    patch.setattr(commands, "plan_of", lambda task: SimpleNamespace(rows=rows))
