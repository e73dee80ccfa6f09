"""Run a script of this folder with Triton's interpreter, which must be chosen before a kernel is decorated."""

import os
from pathlib import Path

import warm

HERE = Path(__file__).parent


def run_interpreted(script):
    """Return what `script` prints: "interpreted: ok" where all its checks held."""
    before = os.environ.get("PYTHONPATH")  # another Triton's, if one is under test
    path = os.pathsep.join([*([before] if before else []), str(HERE), str(HERE.parents[1])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    environment.pop("DBKERNELS_BACKEND", None)
    run = warm.run(HERE / script, env=environment)
    assert run.returncode == 0 and "interpreted: ok" in run.stdout, run.stdout + run.stderr
    return run.stdout
