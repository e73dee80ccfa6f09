"""denoising_cross_entropy as halves go on a GPU, on a CPU: only the products are NumPy's, and kernels definitions."""

import pytest
import torch

from gpu_library import stand_in
from numerics import EPSILON
from test_denoising_cross_entropy import OPTIONS, example, loss_and_gradients

# logits of a chunk, least rows: the head's gradient is found by words, in a sum, from one chunk, from all logits
CHUNKS = {"words": (16, 16), "sum": (1300, 16), "one chunk": (16, 64), "all": (10**6, 64)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("way", CHUNKS)
def test_against_float64(way, options, reduction, dtype, monkeypatch):
    """A logit errs by a unit of its terms, which reach 1/sigma² = 11 times the others with the readout, and its
    probability with it."""
    stand_in(monkeypatch, *CHUNKS[way])
    target, keywords, leaves = example(dtype=dtype, **OPTIONS[options])
    upstream = torch.randn(target.shape if reduction == "none" else ())
    exact = loss_and_gradients(target, keywords, leaves, upstream, reference=True, reduction=reduction)
    ours = loss_and_gradients(target, keywords, leaves, upstream, reduction=reduction)
    for name, a, b in zip(("loss", *leaves), ours, exact, strict=True):
        assert (a.double() - b).abs().max() <= 16 * EPSILON[dtype] * (b.abs().max() + 1e-6), name
