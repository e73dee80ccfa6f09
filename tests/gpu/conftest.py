"""The library where its blocks live on a GPU. Every test also runs on the CPU, where it must hold just as well."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Return the device under test."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _full_float32():
    """Convolve without TF32, whose 10 bits cuDNN takes by default: comparisons are with the CPU."""
    assert not torch.backends.cuda.matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def repeatable(monkeypatch):
    """Compute the same bits every time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with sdpa_kernel(SDPBackend.MATH):  # the others add gradients in an order of chance
        yield
