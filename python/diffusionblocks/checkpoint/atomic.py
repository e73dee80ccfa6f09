"""Replace a set of files as one, whatever interrupts it.

One file, the manifest, names all others. A file that it names is never written to again: a save writes new files
beside the old ones, replaces the manifest in one step (the commit), and only then removes the files that the new
manifest doesn't name. A process killed, or a machine switched off, at any instant leaves the old files or the new
ones, whole, and the disk never holds more than both. One process saves to a folder at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

TEMPORARY = ".tmp"
Own: TypeAlias = Callable[[Path], bool]


@contextlib.contextmanager
def saving(path: Path, own: Own, named: Collection[str]) -> Iterator[None]:
    """Prepare a folder for a save; if the save fails, remove its files and report what was kept.

    Args:
        path: The manifest. Its folder is made if missing, and freed of what a killed save left.
        own: Whether a file of this folder is one that an earlier save wrote, a temporary one included.
        named: The files of the present save.

    Raises:
        OSError: The disk refused (full, read-only); the message names the file and what the folder holds now.
    """
    before = _content(path)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
            _sync_folder(path.parent.parent)
        sweep(path.parent, own, named)
        yield
    except BaseException as error:
        committed = _content(path) != before
        if not committed:
            with contextlib.suppress(OSError):  # report the first error; the next save sweeps again
                sweep(path.parent, own, named)
        if isinstance(error, OSError) and error.errno is not None:
            no_folder = isinstance(error, (FileExistsError, NotADirectoryError))
            outcome = "nothing was saved: a file stands in its place" if no_folder else _outcome(committed, before)
            words = f"{error.strerror}; {outcome}"
            raise OSError(error.errno, words, str(error.filename or path)) from error
        raise


def _outcome(committed: bool, before: bytes | None) -> str:
    if committed:
        return "but the save itself is complete: what loads now is the new one"
    kept = "the save before it is whole" if before is not None else "the folder holds no earlier save"
    return f"nothing was saved, {kept}; free space or make the folder writable, and save again"


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # missing, or in a folder that can't be read
        return None


def commit(
    folder: Path, texts: Mapping[str, bytes], own: Own, named: Collection[str], replaced: Collection[str]
) -> None:
    """Write the manifest, which commits a save, and remove the files that it doesn't name.

    Args:
        folder: The folder of the save.
        texts: File names and contents: the manifest first, then files that must go with it (renamed right after).
        own: As in `saving`.
        named: The files of the new save.
        replaced: Those of the save before it.
    """
    for name, text in texts.items():
        _write_aside(folder / name, [text])
    for name in texts:
        os.replace(folder / (name + TEMPORARY), folder / name)
    _sync_folder(folder)
    sweep(folder, own, named, replaced)


def write(path: Path, content: Iterable[bytes | memoryview]) -> str:
    """Write a file under a temporary name and rename it, durably: first the bytes, then the name.

    Returns:
        The SHA-256 of the content, in hexadecimal.
    """
    sha256 = _write_aside(path, content)
    os.replace(path.with_name(path.name + TEMPORARY), path)
    _sync_folder(path.parent)
    return sha256


def link(source: Path, path: Path) -> str:
    """Give a file that never changes a second name, durably; copy it where the file system can't.

    Returns:
        The SHA-256 of the content, in hexadecimal.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without links
        return write(path, _pieces(source))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    sha256 = digest(temporary)
    os.replace(temporary, path)
    _sync_folder(path.parent)
    return sha256


def sweep(folder: Path, own: Own, named: Collection[str], replaced: Collection[str] = ()) -> None:
    """Remove what saves wrote, or an earlier manifest named (`replaced`), and the manifest on disk doesn't name."""
    others = [path for path in sorted(folder.iterdir()) if path.name not in named and path.is_file()]
    stale = [path for path in others if path.name in replaced or own(path)]
    if stale:
        _sync_folder(folder)  # or a power cut could undo the manifest's renaming and keep the removals
    for path in stale:
        path.unlink()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    sha256 = hashlib.sha256()
    for piece in _pieces(path):
        sha256.update(piece)
    return sha256.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def _write_aside(path: Path, content: Iterable[bytes | memoryview]) -> str:
    temporary = path.with_name(path.name + TEMPORARY)
    sha256 = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for piece in content:
                sha256.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a failed write or fsync doesn't name its file
        error.filename = error.filename or str(temporary)
        raise
    return sha256.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
