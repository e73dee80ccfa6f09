"""The install: with a compiler, without one, as definitions only, and what `python -m dbkernels` says of
it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

import dbkernels
import warm
from dbkernels import __main__ as command
from dbkernels import _library

ROOT = Path(__file__).parents[1]
SOURCES = [
    "setup.py",
    "pyproject.toml",
    "constraints.txt",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "csrc",
    "dbkernels",
    "python",
]

# A compiler whose objects are empty, and whose library is one that is there.
LINKER = """#!/bin/sh
case " $* " in
  *" -shared "*) from={library} ;;
  *" -c "*) from=/dev/null ;;
  *) exec c++ "$@" ;;
esac
while [ "$1" != -o ]; do shift; done
cp $from "$2"
"""


def python(code, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    # Away from the checkout, whose packages the current folder would put first.
    run = warm.run(*code, env=environment, cwd=os.sep)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_compiled_where_there_is_a_compiler():
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no compiler here")
    assert dbkernels.compiled() is not None, "a compiler is here, but the CPU library isn't built"
    assert all("C++" in dbkernels.kernels()[op]["CPU"] for op in ("inject_noise", "adamw_ema_step"))


def test_reference_backend_is_the_definition():
    code = (
        "import torch, warnings; warnings.simplefilter('error'); import dbkernels as k;"
        "from dbkernels.philox import normal_reference as n;"
        "y = torch.randn(3, 5, requires_grad=True); z = k.inject_noise(y, 2.0, seed=1);"
        "assert torch.equal(z, y + 2.0 * n((3, 5), seed=1)); z.sum().backward();"
        "assert k.compiled() is None and 'reference' in k.kernels()['inject_noise']['CPU']; print('fine')"
    )
    assert "fine" in python(["-c", code], DBKERNELS_BACKEND="reference")


def test_unknown_backend_is_refused():
    environment = {**os.environ, "DBKERNELS_BACKEND": "cuda", "PYTHONPATH": str(ROOT)}
    run = warm.run("-c", "import dbkernels", env=environment)
    assert run.returncode != 0 and "DBKERNELS_BACKEND='cuda' is unknown" in run.stderr


def test_facts_on_the_command_line():
    words = python(["-m", "dbkernels"])
    assert torch.__version__ in words and "inject_noise" in words and "adamw_ema_step" in words
    if dbkernels.compiled() is not None:
        assert "-O3" in words
    assert "portable" in python(["-m", "dbkernels"], DBKERNELS_CPU="portable") or dbkernels.compiled() is None


def test_the_portable_build_draws_the_same_noise():
    """Bit for bit where the portable build emulates fma: its double rounding shows in fewer than one in a
    million."""
    if dbkernels.compiled() is None:
        pytest.skip("the compiled library isn't here")
    code = "import dbkernels as k, torch; print(k.philox_normal(4099, seed=5).double().sum().item().hex())"
    outputs = {python(["-c", code], DBKERNELS_CPU=cpu).strip() for cpu in ("portable", "native")}
    assert len(outputs) == 1


def notices(monkeypatch, device_type, errors, *, triton=True):
    """Return what two definitions in a row say of a library that isn't there."""
    monkeypatch.setattr(_library, "_load_errors", errors)
    monkeypatch.setattr(_library, "_noticed", set())
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: triton or None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for op in ("adamw_ema_step", "edm_loss"):
            _library._notice(op, device_type)
    return [str(warning.message) for warning in seen]


def test_what_is_missing_is_named(monkeypatch):
    both = {"_C": "not built", "_C_cuda": "built, but doesn't load: undefined symbol"}
    (cuda,) = notices(monkeypatch, "cuda", both)
    assert "without its CUDA library (built, but doesn't load: undefined symbol)" in cuda and "FORCE_CUDA=1" in cuda
    assert "adamw_ema_step runs on its PyTorch definition on CUDA" in cuda and "C++" not in cuda
    (cuda,) = notices(monkeypatch, "cuda", both, triton=False)
    assert "without Triton (not installed) and its CUDA library" in cuda and "pip install triton" in cuda
    (cpu,) = notices(monkeypatch, "cpu", both)
    assert "without its CPU library (not built)" in cpu and "C++17 compiler" in cpu and "CUDA" not in cpu
    assert not notices(monkeypatch, "cuda", {"_C": "not built"})
    assert not notices(monkeypatch, "cpu", {"_C_cuda": "not built"})


def test_the_device_is_that_of_the_first_tensor():
    tensor = torch.empty(1, device="meta")
    assert _library._device_type([1.0, None, tensor]) == "meta"
    assert _library._device_type([[], [tensor, torch.empty(1)]]) == "meta"
    assert _library._device_type([3]) == "cpu"


def test_the_command_says_what_a_missing_cuda_library_costs(monkeypatch):
    def line(labels, cuda="13.0"):
        monkeypatch.setattr(command, "compiled", lambda module: None)
        monkeypatch.setattr(command, "load_error", lambda module: "not built")
        monkeypatch.setattr(command, "kernels", lambda: {op: {"CUDA": label} for op, label in labels.items()})
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return command._library_line("_C_cuda", "CUDA")

    on_triton = {"adamw_ema_step": "Triton", "edm_loss": "Triton", "softmax_embedding": "PyTorch, in chunks"}
    assert line(on_triton) == "not built: no op needs it, kernels run on Triton"
    assert line({**on_triton, "adamw_ema_step": "reference (PyTorch)"}) == (
        "not built: these ops run on their PyTorch definitions: adamw_ema_step"
    )
    assert "is a CPU build" in line(on_triton, cuda=None)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves the checkout alone."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("*.so", "__pycache__", "build")
            shutil.copytree(source, folder / name, ignore=skip)
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def wheel(checkout, target, **variables):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(target),
        "-v",
        ".",
    ]
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
    shutil.rmtree(checkout / "build", ignore_errors=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout + run.stderr


@pytest.mark.slow
def test_without_a_compiler_it_installs_runs_and_says_so_once(checkout, tmp_path):
    words = wheel(checkout, tmp_path, CXX="/bin/false", CC="/bin/false", FORCE_CUDA="0")
    assert "dbkernels._C: NOT built" in words
    code = (
        # An editable install would find the checkout's library for this package, which has none.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import dbkernels as k, torch, warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): z = k.inject_noise(torch.zeros(4), 1.0, seed=1)\n"
        "said = [w for w in seen if 'CPU library (not built' in str(w.message)]\n"
        "assert k.compiled() is None and len(said) == 1; print('once', k.__file__)"
    )
    assert f"once {tmp_path}" in python(["-c", code], PYTHONPATH=str(tmp_path))


@pytest.mark.slow
def test_the_wheel_has_both_packages_and_the_library(checkout, tmp_path):
    if dbkernels.compiled() is None:
        pytest.skip("the compiled library isn't here")
    # The checkout's own build has compiled the same sources by the same setup.py: its library is what this one links.
    (linker := tmp_path / "c++").write_text(LINKER.format(library=sys.modules["dbkernels._C"].__file__))
    linker.chmod(0o755)
    words = wheel(checkout, tmp_path, CXX=str(linker))
    assert "CPU library: yes" in words and "CUDA library:" in words and "dbkernels._C: built" in words
    assert (tmp_path / f"dbkernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    for name in (
        "dbkernels/py.typed",
        "dbkernels/triton/inject_noise.py",
        "diffusionblocks/noise/edm.py",
        "diffusionblocks/experiments/tasks/vit.py",
    ):
        assert (tmp_path / name).exists(), name
    code = "import dbkernels; assert dbkernels.compiled(), 'not loaded'; print('loaded', dbkernels.__file__)"
    assert f"loaded {tmp_path}" in python(["-c", code], PYTHONPATH=str(tmp_path))
