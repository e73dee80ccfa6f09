"""Launches that were prepared once: on a fake GPU, since their host side is all that matters."""

import shutil

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake driver")


def test_a_prepared_launch_is_tritons_own():
    from fake_gpu import run_faked

    run_faked("faked_launch.py")
