"""The Triton under test is the one that was asked for, here and in the scripts that tests start."""

import os
import re
from pathlib import Path

import pytest

from interpreter import run_interpreted

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_the_oldest_triton_is_what_the_package_allows():
    oldest = re.search(r"^OLD_TRITON \?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    allowed = set(re.findall(r"\"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text()))
    assert {oldest.removesuffix(".0")} == allowed


def test_the_triton_that_was_asked_for_is_tested_in_scripts_too():
    wanted = os.environ.get("TRITON_WANTED", triton.__version__)
    assert triton.__version__ == wanted
    assert run_interpreted("interpreted_version.py").splitlines()[0] == wanted
