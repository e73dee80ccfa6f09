"""Batches from a loader, again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the loader's batches, and begin anew where they end. Raises: ValueError if there are none."""
    while True:
        some = False
        for batch in loader:
            some = True
            yield batch
        if not some:
            raise ValueError("the loader gave no batch; if it is an iterator that is used up, make a new one")
