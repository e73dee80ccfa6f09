"""Runs without what takes most of a tiny one's seconds and has tests of its own: pictures, plans, texts read again."""

from __future__ import annotations

import functools
from collections import defaultdict
from types import SimpleNamespace

import pytest
from torch import Tensor

from diffusionblocks.experiments import commands, plotting
from diffusionblocks.experiments.data.vocabulary import Characters

_encode = Characters.encode


@functools.lru_cache(maxsize=24)
def _encoded(alphabet: str, text: str) -> Tensor:
    return _encode(Characters(alphabet), text)


def spare(patch: pytest.MonkeyPatch) -> None:
    """Let the commands draw nothing and plan nothing, and encode a text once."""
    patch.setattr(plotting, "plots", SimpleNamespace(draw=lambda folder: []), raising=False)
    rows = defaultdict(lambda: SimpleNamespace(by_category={}))
    patch.setattr(commands, "plan_of", lambda task: SimpleNamespace(rows=rows))
    patch.setattr(Characters, "encode", lambda self, text: _encoded(self.alphabet, text).clone())
