"""Start Python in a fork of a process that has imported packages already: seconds of CPU sooner than from nothing."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

TRAINING = ("torch", "torch._dynamo")  # the first step imports the second one, which takes as long as torch itself
# A line on stdin is a child's job; its exit status is printed once it ends. The child leaves the loop and ends with
# its own code.
SERVER = """
import importlib, json, os, runpy, signal, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    job = json.loads(line)
    if (pid := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
signal.alarm(600)  # should it hang
for fd, path in enumerate((os.devnull, *job["outputs"])):
    os.dup2(os.open(path, os.O_RDWR), fd)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
option, *sys.argv[:] = job["arguments"] if job["arguments"][0] in ("-c", "-m") else ["", *job["arguments"]]
first = os.path.dirname(os.path.abspath(sys.argv[0])) if not option else job["cwd"]
sys.path[:1] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
if option == "-c":
    code, sys.argv[0] = sys.argv[0], "-c"
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
elif option == "-m":
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@functools.cache
def _server(imports: tuple[str, ...]) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, *imports]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    atexit.register(server.communicate)  # ends it
    return server


def run(
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: str | Path = ".",
    imports: tuple[str, ...] = ("torch",),
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, where a script, -c code or -m module comes first, and return it with its output as text.

    Args:
        arguments: of the command line, behind `python`.
        env: its environment; ours by default.
        cwd: its folder.
        imports: what it finds imported; none of it may depend on the environment.
    """
    server, given = _server(imports), [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        job = dict(arguments=given, env=dict(os.environ if env is None else env), cwd=os.path.abspath(cwd))
        server.stdin.write(json.dumps(job | {"outputs": [str(path) for path in outputs]}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(given, status, *(path.read_text(errors="replace") for path in outputs))
