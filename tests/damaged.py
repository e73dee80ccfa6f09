"""A saved checkpoint to be damaged, and the refusal that must name its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusionblocks.checkpoint.files import CheckpointError


def part_path(folder: Path) -> Path:
    return folder / "shared.save1.safetensors"


def refused(path: Path, match: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        call(*args, **kwargs)
    assert str(path) in str(caught.value)
