"""Let one process at a time train in a run folder: an advisory lock that the kernel releases when the process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
# flock is local to a host on some network file systems and missing on others; Linux's NFS passes it to the server.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunLocked(ValueError):
    """Another process trains in the folder."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. Commands that only read need no lock.

    Args:
        folder: An existing folder.

    Raises:
        RunLocked: Another process holds it; the message names process and host.
    """
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunLocked(
                f"{folder} is being trained by {holder}: wait for it or stop it; reading commands (eval, sample, "
                "predict, export, plot) work beside it"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {folder} has no locks ({error.strerror}): nothing stops a second process from "
                "training here, so start one alone",
                stacklevel=3,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield
