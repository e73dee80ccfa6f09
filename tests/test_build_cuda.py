"""The build of the CUDA library: left out with a word, or built, or the install fails.

Compilers and what torch reports are fakes here, so that every path runs without a GPU; the last test builds with the
real nvcc, by torch's own extension.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import setup_script
import warm

ROOT = Path(__file__).parents[1]
# Runs setup.py as if torch were a CUDA build: its version, the toolkit's folder, whether a GPU is here.
SETUP = """
import runpy, sys
import torch
from torch.utils import cpp_extension
version, home, gpu = sys.argv[1:4]
torch.version.cuda, cpp_extension.CUDA_HOME = version or None, home or None
torch.cuda.is_available = lambda: bool(gpu)
sys.argv[:] = ["setup.py", "build_ext", "--build-lib", "made", "--build-temp", "objects"]
runpy.run_path("setup.py", run_name="__main__")
"""
# Writes an empty file where a compiler or linker would write its result; fails where the test says so.
CXX = """#!/bin/sh
case "$*" in
  -dump*) echo 12.2.0; exit 0 ;;
  *-lc10_cuda*) if [ -n "$FAKE_LINK_ERROR" ]; then echo "/usr/bin/ld: $FAKE_LINK_ERROR"; exit 1; fi ;;
esac
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; exit 0; fi
  shift
done
"""
NVCC = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0 ;; esac
if [ -n "$FAKE_NVCC_ERROR" ]; then
  echo "adamw_ema.cu(12): warning #177-D: unused"
  echo "adamw_ema.cu(169): error: $FAKE_NVCC_ERROR" >&2
  echo "adamw_ema.cu(202): error: another" >&2
  exit 1
fi
exec "$CXX" "$@"
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for package in ("dbkernels", "python/diffusionblocks"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


@pytest.fixture
def fakes(checkout):
    """A compiler and a toolkit that write empty files."""
    for name, script in {"g++": CXX, "toolkit/bin/nvcc": NVCC}.items():
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    return {"CXX": str(checkout / "g++")}


def build(checkout, *, cuda="13.0", home="toolkit", gpu="", **variables):
    """Return the exit code, the output, and the names of the libraries made."""
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("FORCE_CUDA", "CC")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TORCH_CUDA_ARCH_LIST": "9.0a",
        **variables,
    }
    home = home and str(checkout / home)
    run = warm.run("-c", SETUP, cuda, home, gpu, cwd=checkout, env=environment)
    made = {path.name.split(".")[0] for path in checkout.glob("made/dbkernels/*.so")}
    return run.returncode, (run.stdout + run.stderr)[-5000:], made


def test_both_libraries_where_the_compilers_work(checkout, fakes):
    code, words, made = build(checkout, FORCE_CUDA="1", **fakes)
    assert code == 0 and made == {"_C", "_C_cuda"}, words
    assert "dbkernels._C_cuda: built" in words


@pytest.mark.parametrize("wish", [{"FORCE_CUDA": "1"}, {"gpu": "yes"}], ids=["forced", "with a GPU"])
def test_a_cuda_library_that_does_not_compile_fails_the_build(checkout, fakes, wish):
    code, words, made = build(checkout, FAKE_NVCC_ERROR='identifier "X" is undefined', **wish, **fakes)
    assert code != 0 and made == {"_C"}, words
    assert 'First error: adamw_ema.cu(169): error: identifier "X" is undefined' in words
    assert "FORCE_CUDA=0" in words


def test_a_cuda_library_that_does_not_link_fails_the_build(checkout, fakes):
    code, words, _ = build(checkout, FORCE_CUDA="1", FAKE_LINK_ERROR="cannot find -lc10_cuda", **fakes)
    assert code != 0 and "First error: /usr/bin/ld: cannot find -lc10_cuda" in words


def test_a_silent_compiler_fails_the_build_too(checkout, fakes):
    code, words, _ = build(checkout, FORCE_CUDA="1", CXX="/bin/false")
    assert code != 0 and "dbkernels._C: NOT built" in words and "The CUDA library doesn't build" in words


def test_what_is_left_out_is_said(checkout, fakes):
    code, words, made = build(checkout, **fakes)
    assert code == 0 and made == {"_C"}, words
    assert "CUDA library: no, no GPU here (FORCE_CUDA=1 builds for others)" in words


@pytest.fixture
def decide(monkeypatch):
    """setup.py's decision for a machine, as if torch were a CUDA build."""
    setup = setup_script.load()

    def wanted(force=None, cuda="13.0", home="/toolkit", gpu=False):
        monkeypatch.delenv("FORCE_CUDA", raising=False)
        if force is not None:
            monkeypatch.setenv("FORCE_CUDA", force)
        monkeypatch.setattr(setup.torch.version, "cuda", cuda)
        monkeypatch.setattr(setup.torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", home)
        return setup.cuda_wanted()

    wanted.setup = setup
    return wanted


@pytest.mark.parametrize(
    "machine,reason",
    [
        ({"gpu": False}, "no GPU here"),
        ({"cuda": None}, "is a CPU build"),
        ({"gpu": True, "home": None}, "no CUDA toolkit was found"),
        ({"gpu": True, "force": "0"}, "FORCE_CUDA=0"),
    ],
)
def test_the_cuda_library_is_left_out(decide, machine, reason):
    wanted, why = decide(**machine)
    assert not wanted and reason in why


@pytest.mark.parametrize("machine", [{"gpu": True}, {"gpu": True, "force": "1"}, {"gpu": False, "force": "1"}])
def test_the_cuda_library_is_wanted(decide, machine):
    assert decide(**machine)[0]


def test_what_is_forced_and_impossible_ends_the_build(decide, monkeypatch):
    with pytest.raises(SystemExit, match="CPU build: install a CUDA one"):
        decide(force="1", cuda=None)
    with pytest.raises(SystemExit, match="set CUDA_HOME"):
        decide(force="1", home=None)
    monkeypatch.setattr(decide.setup, "torch", None)
    with pytest.raises(SystemExit, match="torch isn't importable"):
        decide.setup.cuda_wanted()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("c++") is None, reason="needs nvcc and a compiler")
def test_nvcc_builds_the_library_by_torchs_extension(checkout):
    """With every flag that torch passes. The libraries of a CUDA torch are empty ones: only their names are linked."""
    for path in (checkout / "csrc/cpu").glob("*.cpp"):
        path.unlink()  # the CPU library is compiled by every install, and slow
    for name in ("module.cpp", "bindings.cpp"):
        (checkout / "csrc" / name).write_text("")
    (quick := checkout / "c++").write_text('#!/bin/sh\nexec c++ "$@" -O0\n')  # of nvcc's flags none is changed
    quick.chmod(0o755)
    for name in ("c10_cuda", "torch_cuda", "cudart"):
        subprocess.run(["c++", "-shared", "-o", checkout / f"lib{name}.so", "-x", "c", os.devnull], check=True)
    # nvcc on the path may be a wrapper: the toolkit's folder is the one it names itself.
    dry = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    home = re.search(r"TOP=(.*)/bin", dry).group(1)
    release = re.search(r"release ([\d.]+)", version).group(1)
    code, words, made = build(
        checkout, cuda=release, home=home, FORCE_CUDA="1", CXX=str(quick), LIBRARY_PATH=str(checkout)
    )
    assert code == 0 and made == {"_C", "_C_cuda"}, words
