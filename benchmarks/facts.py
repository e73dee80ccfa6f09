"""What a figure depends on beside the code: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

import dbkernels


def machine_facts(device: torch.device) -> dict[str, object]:
    """Return what is recorded beside every op's rows."""
    return {
        "type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # above the core count, other work shared the machine
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "dbkernels": dbkernels.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "kernels": dbkernels.kernels(),
        "built": dbkernels.compiled(),
        "built_cuda": dbkernels.compiled("_C_cuda"),
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def host_peak_mib() -> float:
    """Return the process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def commit() -> str | None:
    """Return the revision measured: $COMMIT where the code lies outside its repository, else git's, if there is one."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def default_machine(device: torch.device) -> str:
    """Return the name of the folder of a machine's results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"cpu-{os.cpu_count()}core"
