"""Batches from a loader, again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the loader's batches, and begin anew where they end.

    Raises: TypeError if it can't be iterated; ValueError if it gives no batch, at first or when begun anew.
    """
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"loader must be iterable, e.g. a DataLoader, got {type(loader).__name__}")
    again = False
    while True:
        some = False
        for batch in loader:
            some = True
            yield batch
        if not some:
            raise ValueError(
                "loader gave no more batches: it is iterated again and again, and an iterator such as a generator ends "
                "after once; give a DataLoader, a list, or an object whose __iter__ begins anew"
                if again or isinstance(loader, Iterator)
                else "loader gave no batch: it is empty"
            )
        again = True


def pair(batch: Callable[[Any], Any], given: Any) -> tuple[Any, Any]:
    """Return (x, y) as `batch` makes it of what a loader gave. Raises: TypeError if that isn't two values."""
    try:
        x, y = batch(given)
    except (TypeError, ValueError, LookupError) as error:
        raise TypeError(
            f"batch must make (x, y) of what the loader gives, here {_shown(given)}: {type(error).__name__}: {error}; "
            "pass e.g. batch=lambda d: (d['image'], d['label'])"
        ) from error
    return x, y


def _shown(given: Any) -> str:
    kind = type(given).__name__
    if isinstance(given, dict):
        return f"a {kind} with {', '.join(map(str, given))}"
    return f"a {kind} of {len(given)}" if hasattr(given, "__len__") else f"a {kind}"
