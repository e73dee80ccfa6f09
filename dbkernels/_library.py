"""The op library: one torch.library namespace, the compiled kernels if they were built, and their build facts.

An op is registered once. Its schema, its definition in PyTorch (which serves every device without a kernel), its fake
for torch.compile and its autograd formula are Python; the compiled libraries only add kernels under the CPU and CUDA
keys. So every op exists, with one schema, with or without a compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAMESPACE = "dbkernels"
BACKENDS = ("auto", "reference")

HAS_TRITON = importlib.util.find_spec("triton") is not None

lib = torch.library.Library(NAMESPACE, "DEF")


def backend() -> str:
    """Return "reference" if every op runs its definition, else "auto": the value of DBKERNELS_BACKEND at import.

    The reference, to bisect a bug, promises the ops' values and gradients up to rounding, with their shapes and dtypes,
    and can be differentiated any number of times. It doesn't promise what the kernels do beside: the memory saved for
    the backward pass, contiguous results, one graph under torch.compile, repeating bit for bit on any number of
    threads, and the refusal of bad values by ops whose kernels check them.
    """
    return _BACKEND


def _read_backend() -> str:
    value = os.environ.get("DBKERNELS_BACKEND", "auto").strip().lower() or "auto"
    if value not in BACKENDS:
        raise ValueError(f"DBKERNELS_BACKEND={value!r} is unknown: set it to one of {', '.join(BACKENDS)}")
    return value


_BACKEND = _read_backend()
_kernels: dict[str, dict[str, str]] = {}
_load_errors: dict[str, str] = {}
_noticed: set[str] = set()


def _load(name: str) -> ModuleType | None:
    """Import a compiled library; its kernels register themselves as it loads."""
    if _BACKEND == "reference":
        return None
    try:
        return importlib.import_module(f"{NAMESPACE}.{name}")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == f"{NAMESPACE}.{name}"
        _load_errors[name] = _why_not_built(name) if absent else f"built, but doesn't load: {error}"
        return None


def _why_not_built(name: str) -> str:
    """Return "not built", with the reason that the build left beside the library (setup.py)."""
    note = Path(__file__).with_name(f"{name}.not_built.txt")
    return f"not built, {note.read_text().strip()}" if note.exists() else "not built"


def shadowed() -> Path | None:
    """Return the folder of an installed dbkernels with a library, which this one without it stands in front of.

    So it is in a checkout, whose folder Python puts first on its path.
    """
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        folder = Path(entry or os.curdir).resolve() / NAMESPACE
        if folder != here and any(folder.glob("_C.*.so")):
            return folder
    return None


def remedy() -> str:
    """Return how to get the CPU library."""
    installed = shadowed() if _load_errors.get("_C", "").startswith("not built") else None
    if installed is not None:
        return f"run in another folder: {Path(__file__).parent} here hides the package installed in {installed.parent}"
    return (
        "install torch, pybind11 and a C++17 compiler and reinstall: `pip install --force-reinstall --no-deps "
        "--no-build-isolation .` in the checkout"
    )


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op: its schema, its definition for devices without a kernel, and its fake for the compiler."""
    lib.define(schema)
    name = schema.split("(", 1)[0]

    def definition(*args: Any, **kwargs: Any) -> Any:
        _notice(name, _device_type(args))
        return reference(*args, **kwargs)

    lib.impl(name, definition, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=lib)
    _kernels[name] = dict.fromkeys(("CPU", "CUDA"), "reference (PyTorch)")


def register(name: str, key: str, kernel: Callable[..., Any], label: str) -> None:
    """Give op `name` a Python-side kernel (a Triton launcher) under dispatch key `key`."""
    if _BACKEND == "reference":
        return
    lib.impl(name, kernel, key)
    _kernels[name][key] = label


def register_triton(name: str, launcher: Callable[..., Any]) -> None:
    """Give op `name` its Triton launcher on CUDA, where Triton can be imported."""
    if HAS_TRITON:
        register(name, "CUDA", launcher, "Triton")


def load_compiled() -> None:
    """Load the compiled libraries, after every op is defined; note which ops they serve."""
    for module, key in (("_C", "CPU"), ("_C_cuda", "CUDA")):
        loaded = _load(module)
        if loaded is not None:
            facts = loaded.build_info()
            for op in facts["ops"].split(","):
                _kernels[op][key] = f"{facts['language']} ({facts['kernel']})"


def compiled(module: str = "_C") -> dict[str, str] | None:
    """Return the build facts of a compiled library (`_C` for CPU, `_C_cuda`), or None if it isn't loaded."""
    loaded = _load(module)
    return None if loaded is None else dict(loaded.build_info())


def load_error(module: str = "_C") -> str | None:
    """Return why a compiled library isn't loaded: "not built", or the loader's error. None if it is loaded."""
    return _load_errors.get(module)


def kernels() -> dict[str, dict[str, str]]:
    """Return each op's kernel by device type: `{"inject_noise": {"CPU": "C++ (AVX2)", "CUDA": "Triton"}, ...}`."""
    return {name: dict(by_device) for name, by_device in _kernels.items()}


def _device_type(values: Sequence[Any]) -> str:
    """Return the device type of an op's first tensor, which may be the first of a list."""
    for value in values:
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cpu"


def _lacking(device_type: str) -> tuple[str, str] | None:
    """Return what is missing if a definition serves `device_type`, and how to get it. None if nothing is."""
    if device_type == "cpu" and "_C" in _load_errors:
        return f"its CPU library ({_load_errors['_C']})", remedy()
    if device_type != "cuda" or "_C_cuda" not in _load_errors:
        return None
    library = f"its CUDA library ({_load_errors['_C_cuda']})"
    if importlib.util.find_spec("triton") is None:
        return f"Triton (not installed) and {library}", "`pip install triton`, which every op has a CUDA kernel in"
    return library, "reinstall with FORCE_CUDA=1, a CUDA build of torch and its CUDA toolkit (CUDA_HOME)"


def _notice(name: str, device_type: str) -> None:
    """Warn once per process and device type that kernels are missing: silence would hide a slow install."""
    if _BACKEND == "reference" or device_type in _noticed:
        return
    _noticed.add(device_type)
    lacking = _lacking(device_type)
    if lacking is None:
        return
    missing, remedy = lacking
    warnings.warn(
        f"dbkernels is installed without {missing}, so {name} runs on its PyTorch definition on {device_type.upper()}: "
        f"the same results, slower. To have its kernel, {remedy}; `python -m dbkernels` shows the state of every op. "
        "DBKERNELS_BACKEND=reference silences this.",
        stacklevel=4,
    )
