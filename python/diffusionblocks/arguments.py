"""Checks of arguments that several functions take."""

from __future__ import annotations

from typing import Any


def check_whole(name: str, value: Any, least: int, note: str = "") -> None:
    """Raise ValueError unless a value is a whole number of at least `least`, of which `note` says more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}{note}, got {value!r}")
