"""Waiting blocks in files."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.parts import Stored
from .buffers import host_buffer
from .lanes import CHUNK, Event, Lanes, Place, after, mark

OWNER = "owner"  # file with the name of the store that wrote last: no other's files are taken for one's own
DIRECT = 1 << 24  # bytes from which files go past the page cache, which would hold every block a second time


class DiskStore:
    """Parts in safetensors files of one folder, a file each, which is replaced whole and never changed.

    Raises: OSError if the disk refuses; RuntimeError once another store has taken the folder.

    A GPU's bytes go through two page-locked pieces, so that host memory doesn't depend on the number of parts.
    """

    def __init__(self, folder: Path, lanes: Lanes, *, pin: bool):
        self.folder, self.lanes = folder, lanes
        self._ring = [host_buffer(CHUNK, pin=pin) for _ in range(2)] if lanes.out else []
        self._name = uuid.uuid4().hex
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / OWNER).write_text(self._name)
        except OSError as error:
            raise OSError(error.errno, f"folder={str(folder)!r} can't hold waiting blocks: {error.strerror}") from error

    def put(self, place: Place, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as a part's content, wherever they are."""
        staging = host_buffer(place.layout.nbytes)
        place.layout.fill(staging, tensors)
        self._write(place, iter([(0, staging)]))

    def get(self, place: Place) -> dict[str, Tensor]:
        """Read a part's tensors into host memory."""
        buffer = host_buffer(place.layout.nbytes)
        with self._open(place, os.O_RDONLY) as (file, begin):
            _read(file, buffer, begin)
        return place.layout.views(buffer)

    def source(self, place: Place) -> Stored:
        """Return what a checkpoint is written from."""
        return Stored(self._path(place.name), dict(place.layout.tied))

    def adopt(self, name: str, path: Path) -> bool:
        """Link a file that never changes as a part's content; return whether the file system could."""
        self._check_owner()
        aside = self._path(name + ".tmp")
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:
            return False
        os.replace(aside, self._path(name))
        return True

    def exchange(
        self, slot: Tensor, leaving: Place | None, arriving: Place | None, ready: Event, left: Callable[[], None]
    ) -> Event:
        """Write a part from a slot, then read another one into it; arguments as HostStore's.

        Nothing is read over a part before its file is whole. Raises: OSError if the disk refuses.
        """
        after(self.lanes.out, ready)
        after(self.lanes.into, ready)
        if leaving:
            self._write(leaving, self._pieces_out(slot[: leaving.layout.nbytes]))
            left()
        if arriving:
            with self._open(arriving, os.O_RDONLY) as (file, begin):
                self._read_into(file, slot[: arriving.layout.nbytes], begin)
        return mark(self.lanes.into)

    @property
    def buffers(self) -> list[Tensor]:
        """Host memory that is always held."""
        return self._ring

    def close(self, names: Iterable[str]) -> None:
        """Remove the files of these parts, if they are still this store's."""
        if self._owner() == self._name:
            for name in names:
                self._path(name).unlink(missing_ok=True)

    def _owner(self) -> str:
        return (self.folder / OWNER).read_text() if (self.folder / OWNER).exists() else ""

    def _check_owner(self) -> None:
        owner = self._owner()
        if not owner:
            raise RuntimeError(f"{self.folder} was removed, with its blocks: go on from a checkpoint, in a new model")
        if owner != self._name:
            raise RuntimeError(f"another Offloader has written to {self.folder} since: give each a folder of its own")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @contextlib.contextmanager
    def _open(self, place: Place, flags: int, suffix: str = "") -> Iterator[tuple[int, int]]:
        """Open a part's file; yields its descriptor and where the part begins in it."""
        path = self._path(place.name + suffix)
        self._check_owner()
        if place.layout.nbytes >= DIRECT:
            flags |= getattr(os, "O_DIRECT", 0)
        try:
            file = os.open(path, flags, 0o666)
        except OSError as error:
            if not flags & getattr(os, "O_DIRECT", 0) or isinstance(error, FileNotFoundError):
                raise
            file = os.open(path, flags & ~os.O_DIRECT, 0o666)  # a file system without it
        try:
            yield file, len(place.layout.header)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        finally:
            os.close(file)

    def _write(self, place: Place, pieces: Iterator[tuple[int, Tensor]]) -> None:
        header = place.layout.header
        head = host_buffer(len(header))
        head.numpy()[:] = bytearray(header)
        aside = self._path(place.name + ".tmp")
        try:
            with self._open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, ".tmp") as (file, begin):
                _write(file, head, 0)
                for start, piece in pieces:
                    _write(file, piece, begin + start)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        os.replace(aside, self._path(place.name))

    def _pieces_out(self, slot: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the slot's bytes in host memory: of a GPU, one piece comes while the one before is written."""
        if not self._ring:
            yield 0, slot
            return
        coming: list[tuple[int, Tensor, Event]] = []
        for i, start in enumerate(range(0, slot.numel(), CHUNK)):
            source = slot[start : start + CHUNK]
            piece = self._ring[i % 2][: source.numel()]
            with torch.cuda.stream(self.lanes.out):
                piece.copy_(source, non_blocking=True)
            coming.append((start, piece, mark(self.lanes.out)))
            if len(coming) == 2:
                yield _arrived(coming.pop(0))
        yield from map(_arrived, coming)

    def _read_into(self, file: int, slot: Tensor, begin: int) -> None:
        """Read a part into a slot: of a GPU, one piece is read while the one before goes there."""
        if not self._ring:
            _read(file, slot, begin)
            return
        sent: list[Event] = [None, None]
        for i, start in enumerate(range(0, slot.numel(), CHUNK)):
            goal = slot[start : start + CHUNK]
            piece = self._ring[i % 2][: goal.numel()]
            if (event := sent[i % 2]) is not None:
                event.synchronize()
            _read(file, piece, begin + start)
            with torch.cuda.stream(self.lanes.into):
                goal.copy_(piece, non_blocking=True)
            sent[i % 2] = mark(self.lanes.into)
        for event in sent:  # the ring is used by the next exchange
            if event is not None:
                event.synchronize()


def _arrived(coming: tuple[int, Tensor, Event]) -> tuple[int, Tensor]:
    start, piece, event = coming
    if event is not None:
        event.synchronize()
    return start, piece


def _write(file: int, piece: Tensor, at: int) -> None:
    view = memoryview(piece.numpy())
    while len(view):
        count = os.pwrite(file, view[:CHUNK], at)
        view, at = view[count:], at + count


def _read(file: int, piece: Tensor, at: int) -> None:
    view = memoryview(piece.numpy())
    while len(view):
        count = os.preadv(file, [view[:CHUNK]], at)
        if not count:
            raise OSError(errno.EIO, "the file ends too early")
        view, at = view[count:], at + count
