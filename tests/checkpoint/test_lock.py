"""One process at a time holds a folder; the second is told who, and the kernel releases what a dead one held."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from diffusionblocks.checkpoint.lock import RunLocked, run_lock

HOLD = """
import sys, pathlib, time
from diffusionblocks.checkpoint.lock import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_holds_it_until_that_one_dies(tmp_path, holder):
    with pytest.raises(RunLocked, match=rf"is being trained by process {holder.pid} on \S+ since .*wait for it"):
        with run_lock(tmp_path):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run_lock(tmp_path):  # released by the kernel
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "), run_lock(tmp_path):
            pass
    with run_lock(tmp_path):
        pass


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\)"), run_lock(tmp_path):
        pass
