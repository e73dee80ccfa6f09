"""Kernels that are missing: the build keeps the reason, and the package tells it with what to do."""

import os
import shutil
import sys
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).parents[1]
SETUP = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # these can't be imported
sys.argv[:] = ["setup.py", *sys.argv[1].split()]
runpy.run_path("setup.py", run_name="__main__")
"""


# As `python CODE`, without the finder of an editable install, which would find the checkout's library.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
FACTS = ALONE + "import runpy; runpy.run_module('dbkernels', run_name='__main__')"


def run(code, folder, *, path="", **variables):
    """Return the output of Python in a folder, without the checkout's packages unless `path` names them."""
    bins = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(path), "PATH": bins, "FORCE_CUDA": "0", **variables}
    done = warm.run(*code, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "dbkernels", tmp_path / "dbkernels", ignore=shutil.ignore_patterns("*.so", "*.txt"))
    (tmp_path / "python").mkdir()
    return tmp_path


def test_a_broken_compiler_is_told_by_the_package(checkout):
    run(["-c", SETUP, "build_ext --inplace"], checkout, CXX="/bin/false")
    reason = (checkout / "dbkernels/_C.not_built.txt").read_text()
    assert "/bin/false" in reason
    facts = run(["-c", FACTS], checkout)
    assert f"CPU library:  not built, {reason.strip()}" in facts
    assert "to have it, install torch, pybind11 and a C++17 compiler and reinstall: `pip install" in facts


@pytest.mark.parametrize("missing", ["torch", "pybind11"])
def test_a_build_without_torch_or_pybind11_keeps_the_reason(checkout, missing):
    words = run(["-c", SETUP, "build --build-lib made", missing], checkout)
    assert "no kernels are compiled" in words
    reason = (checkout / "made/dbkernels/_C.not_built.txt").read_text()
    assert reason == f"{missing} couldn't be imported where it was built\n"


def test_a_build_that_works_removes_an_old_reason(checkout):
    compiler = checkout / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in -dump*) echo 12.2.0; exit 0 ;; esac\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; exit 0; fi; shift; done\n'
    )
    compiler.chmod(0o755)
    note = checkout / "dbkernels/_C.not_built.txt"
    note.write_text("a broken compiler\n")
    run(["-c", SETUP, "build_ext --inplace"], checkout, CXX=str(compiler))
    assert not note.exists()


def test_a_checkout_that_hides_the_install_is_told(checkout, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(checkout / "dbkernels", site / "dbkernels")
    (site / "dbkernels/_C.abi3.so").touch()
    hint = f"run in another folder: {checkout / 'dbkernels'} here hides the package installed in {site}"
    assert f"to have it, {hint}" in run(["-c", FACTS], checkout, path=site)
    code = ALONE + "import dbkernels, torch; dbkernels.inject_noise(torch.zeros(4), 1.0, seed=1)"
    assert (
        "(not built), so inject_noise runs on its PyTorch definition on CPU: the same results, slower. "
        f"To have its kernel, {hint}" in run(["-c", code], checkout, path=site)
    )
