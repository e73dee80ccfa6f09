"""A checkpoint that tests damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusionblocks.checkpoint.files import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "run", {"shared": {"x": torch.arange(100.0)}}, {"lr": 0.125, "names": ["a", "b"]})
    return tmp_path / "run"
