"""`python -m dbkernels`: print versions, the built libraries with their flags, and each op's kernel on each device."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

import dbkernels
from dbkernels._library import compiled, kernels, load_error, remedy


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def _cost(device: str) -> str:
    """Describe what runs on `device` ("CPU" or "CUDA") without the library."""
    used = {op: by_device[device] for op, by_device in kernels().items()}
    definitions = sorted(op for op, label in used.items() if label.startswith("reference"))
    if definitions:
        return f"these ops run on their PyTorch definitions: {', '.join(definitions)}"
    kernels_of = {label for label in used.values() if not label.startswith("PyTorch")}
    return f"no op needs it, kernels run on {' and '.join(sorted(kernels_of))}"


def _library_line(module: str, device: str) -> str:
    facts = compiled(module)
    if facts is not None:
        return f"{facts['language']}, {facts['kernel']}, compiler {facts['compiler']}, {facts['flags']}"
    if dbkernels.backend() == "reference":
        return "not loaded: DBKERNELS_BACKEND=reference"
    if device == "CUDA" and torch.version.cuda is None:
        return f"none: torch {torch.__version__} is a CPU build"
    return f"{load_error(module)}: {_cost(device)}"


def _devices() -> dict[str, str]:
    devices = {"CPU": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices[f"CUDA:{i}"] = f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
    return devices


def main() -> None:
    """Print it all, and end quietly where the reader of the output has gone (`| head -1`)."""
    try:
        _print_all()
        sys.stdout.flush()  # at the interpreter's end it would be too late to catch its error
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(141)  # as shells say of a process that SIGPIPE ended


def _print_all() -> None:
    print(f"dbkernels {dbkernels.__version__} in {Path(dbkernels.__file__).parent}")
    print(f"Python {platform.python_version()}, {platform.system()}")
    print(f"torch {torch.__version__} (CUDA {torch.version.cuda}), Triton {_triton_version()}")
    print(f"backend {dbkernels.backend()} (DBKERNELS_BACKEND)")
    print(f"CPU library:  {_library_line('_C', 'CPU')}")
    if load_error("_C"):
        print(f"  to have it, {remedy()}")
    print(f"CUDA library: {_library_line('_C_cuda', 'CUDA')}")
    for device, description in _devices().items():
        print(f"\n{device}: {description}")
        for op, by_device in sorted(kernels().items()):
            print(f"  {op:<28} {by_device[device.split(':')[0]]}")
    if not torch.cuda.is_available():
        print("\nCUDA: no device here")


if __name__ == "__main__":
    main()
