"""What the ops that draw noise and edm_loss launch, and the Python functions they enter: on a fake GPU, since the host
side is all that matters."""

import shutil

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake driver")


def test_launches_and_functions():
    from fake_gpu import run_faked

    run_faked("faked_noise.py")
