"""Memory that denoising_cross_entropy takes for halves on a GPU: measured at small sizes, reckoned at large ones."""

import pytest
import torch

from dbkernels import _logit_chunks as chunks
from dbkernels import compiled, denoising_cross_entropy
from gpu_library import stand_in

ROW_NUMBERS = 64  # bytes a row of targets, places, losses, factors


def reckoned(rows, width, words, budget):
    """Bytes at the peak, without h and weight: both gradients, and the larger walk's chunk with its float32 product."""
    step, columns = chunks.chunk_rows(rows, words, budget), chunks.chunk_words(rows, width, budget)
    stride = -(-words // chunks.ALIGNED) * chunks.ALIGNED
    by_rows = 4 * step * (stride + width)
    by_words = 4 * columns * (rows + width)
    return 2 * (rows + words) * width + max(by_rows, by_words) + ROW_NUMBERS * rows


def peak(call):
    """Bytes at the peak by the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def gradients(h, weight, target):
    return torch.autograd.grad(denoising_cross_entropy(h, weight, target), (h, weight))


@pytest.mark.skipif(compiled() is None, reason="the definition of cross_entropy_rows takes temporaries")
@pytest.mark.parametrize(("rows", "width", "words"), [(256, 64, 1024), (200, 96, 1501), (64, 128, 2048)])
def test_both_gradients_and_a_chunk(rows, width, words, monkeypatch):
    budget = 2**14
    stand_in(monkeypatch, budget, least_rows=16, tile=16)
    h = torch.randn(rows, width).bfloat16().requires_grad_()
    weight = torch.randn(words, width).bfloat16().requires_grad_()
    target = torch.randint(words, (rows,))
    target[3] = -100
    measured, expected = peak(lambda: gradients(h, weight, target)), reckoned(rows, width, words, budget)
    assert 0.9 * expected <= measured <= expected, (measured, expected)


@pytest.mark.parametrize(
    ("rows", "width", "words", "mebibytes", "liger"), [(16384, 768, 32000, 136, 102), (8192, 4096, 128256, 1196, 1129)]
)
def test_reckoned_at_the_sizes_of_docs(rows, width, words, mebibytes, liger):
    """Liger 0.8.5 holds both gradients and bfloat16 logits of next_power_of_2(rows·width / words) rows."""
    ours = reckoned(rows, width, words, chunks.GPU_LOGITS) / 2**20
    assert round(ours) == mebibytes and ours <= 1.35 * liger


@pytest.mark.gpu
def test_gpu_peak():
    rows, width, words = 4096, 1024, 32000
    h = torch.randn(rows, width, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(words, width, device="cuda").bfloat16().requires_grad_()
    target = torch.randint(words, (rows,), device="cuda")
    gradients(h, weight, target)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = gradients(h, weight, target)
    torch.cuda.synchronize()
    # The library's workspaces were taken by the first call.
    assert torch.cuda.max_memory_allocated() - before <= reckoned(rows, width, words, chunks.GPU_LOGITS) + 2**21
    assert found[1].dtype == torch.bfloat16
