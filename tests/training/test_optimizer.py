"""PartOptimizer against torch's AdamW where gradients are missing, not finite, sparse, or of several dtypes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import tiny
from diffusionblocks.experiments import snapshots
from diffusionblocks.training.optimizer import PartOptimizer, clip_gradients

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "has_gradient",
    [lambda step: True, lambda step: False, lambda step: step < 2, lambda step: step % 2 == 0, lambda step: step > 2],
    ids=["always", "never", "at first", "every other step", "later"],
)
def test_a_parameter_without_a_gradient_is_torchs(has_gradient):
    """One whose .grad is None isn't touched, nor are its moments, its average or its count of updates."""
    ours, theirs = ([nn.Parameter(torch.linspace(1, 2, 4).view(2, 2)) for _ in range(2)] for _ in range(2))
    mine = PartOptimizer([("used", ours[0]), ("other", ours[1])], weight_decay=0.1, ema_decay=0.9)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1)
    average, updates = ours[1].detach().clone(), 0
    for step in range(12):
        for params in (ours, theirs):
            params[0].grad = torch.full((2, 2), 1.0 + step)
            params[1].grad = torch.full((2, 2), 2.0 - step) if has_gradient(step) else None
        mine.step(0.1)
        reference.step()
        if has_gradient(step):
            updates += 1
            decay = min(0.9, (1 + updates) / (10 + updates))
            average = average * decay + ours[1].detach() * (1 - decay)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # a few roundings in another order
    torch.testing.assert_close(mine.emas[1], average, rtol=1e-5, atol=1e-6)
    assert mine.counts == {"used": 12, "other": updates}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("skipped", [1, 3])
def test_a_skipped_update_leaves_no_trace(skipped, bad):
    def trained(skipped):
        p = nn.Parameter(torch.zeros(4))
        optimizer = PartOptimizer([("p", p)], ema_decay=0.99)
        for _ in range(skipped):
            p.grad = torch.tensor([1.0, bad, 1.0, 1.0])
            assert not optimizer.step(0.1).isfinite()
        for _ in range(3):
            p.grad = torch.ones(4)
            optimizer.step(0.1)
        return p, optimizer

    (p, after), (q, plain) = trained(skipped), trained(0)
    assert torch.equal(p, q) and after.counts == plain.counts == {"p": 3}
    for name, t in plain.tensors().items():
        assert torch.equal(after.tensors()[name], t), name


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("empty_first", [False, True])
def test_a_norm_that_is_not_finite_holds_every_part_back(max_norm, bad, empty_first):
    """Clipping by an infinite norm would zero what is finite, and the step would then decay it."""
    shapes = [(0,), (3, 2), ()] if empty_first else [(), (3, 2)]
    parts = []
    for b in range(2):
        params = [(str(i), nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes)]
        parts.append(PartOptimizer(params, weight_decay=0.1, ema_decay=0.9))
        for _, p in params:
            p.grad = torch.full_like(p, bad if b else 1.0)
    assert not clip_gradients(parts, max_norm).isfinite()
    for part in parts:
        part.step(0.1)
        assert all(bool((p == 1).all()) for p in part.params) and part.steps == 0
        assert all(bool((t == 0).all()) for t in part.exp_avgs)


def test_one_dtype_that_is_not_finite_holds_the_others_back():
    params = [(str(dtype), nn.Parameter(torch.ones(3, dtype=dtype))) for dtype in DTYPES]
    optimizer = PartOptimizer(params)
    for i, (_, p) in enumerate(params):
        p.grad = torch.full_like(p, float("inf") if i == 1 else 1.0)
    assert not optimizer.step(0.1).isfinite()
    assert all(bool((p == 1).all()) for _, p in params) and set(optimizer.counts.values()) == {0}


def test_gradients_are_clipped_over_all_parts():
    parts = [PartOptimizer([("p", nn.Parameter(torch.zeros(2)))]) for _ in range(2)]
    for part, grad in zip(parts, ([3.0, 0.0], [0.0, 4.0]), strict=True):
        part.params[0].grad = torch.tensor(grad)
    assert clip_gradients(parts, 1.0) == 5
    torch.testing.assert_close(parts[0].params[0].grad, torch.tensor([0.6, 0.0]), rtol=1e-5, atol=0)
    assert clip_gradients(parts, 0.0) == pytest.approx(1.0, rel=1e-5)  # 0 clips nothing
    torch.testing.assert_close(parts[1].params[0].grad, torch.tensor([0.0, 0.8]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_floating_dtype_trains_in_its_own(dtype):
    p = nn.Parameter(torch.linspace(0.5, 1.5, 6, dtype=torch.float64).view(2, 3).to(dtype))
    q = nn.Parameter(p.detach().double())
    ours = PartOptimizer([("p", p)], weight_decay=0.1, ema_decay=0.9)
    exact = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    for step in range(5):
        grad = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3) * (step + 1)
        p.grad, q.grad = grad.to(dtype), grad.to(dtype).double()
        ours.step(0.01)
        exact.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in ours.tensors().values()} == {wide} and p.dtype == dtype
    # a half loses up to half of its last place in each of five updates
    torch.testing.assert_close(p.double(), q.detach(), rtol=0, atol=max(1e-6, 4 * torch.finfo(dtype).eps))


def test_several_dtypes_and_sparse_gradients_in_one_part():
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, sparse=True)
    linear = nn.Linear(3, 2).to(torch.bfloat16)
    double = nn.Parameter(torch.ones(2, dtype=torch.float64))
    named = [("table", table.weight), *linear.named_parameters(), ("double", double)]
    optimizer, before = PartOptimizer(named), [p.detach().clone() for _, p in named]
    out = linear(table(torch.tensor([1, 3])).bfloat16()).double() * double
    out.square().sum().backward()
    assert table.weight.grad.is_sparse
    assert optimizer.step(0.1).isfinite()
    assert all(not torch.equal(a, p) for a, (_, p) in zip(before, named, strict=True))
    assert torch.equal(table.weight[0], before[0][0] * (1 - 0.1 * 0.01)), "a row without a gradient is only decayed"


def test_what_cannot_be_trained_is_named_at_once():
    with pytest.raises(TypeError, match=r"parameter phase is torch\.complex64: only real floating point is trained"):
        PartOptimizer([("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_the_averages_changes_no_bit(dtype):
    p = nn.Parameter(torch.linspace(0.5, 1.5, 64).view(8, 8).to(dtype))
    optimizer = PartOptimizer([("p", p)], ema_decay=0.999)
    optimizer.emas[0].copy_(torch.linspace(0.5, 1.5, 64).view(8, 8) * (1 + 2.0**-13))
    weights, averages = p.detach().clone(), optimizer.emas[0].clone()
    for _ in range(3):
        optimizer.swap_ema()
        assert torch.equal(p, averages.to(dtype))
        optimizer.swap_ema()
        assert torch.equal(p, weights) and torch.equal(optimizer.emas[0], averages)


def test_averages_within_averages_change_nothing(tmp_path):
    session = tiny.session(tiny.config(tmp_path))
    residency = session.residency
    residency.activate(1)
    for ema in itertools.chain(*(optimizer.emas for optimizer in session.optimizers.values())):
        if ema.numel():
            ema.add_(1.0)
    live = {name: t.clone() for name, t in residency.tensors("block_1").items()}
    with residency.averages():
        outer = {name: t.clone() for name, t in residency.weights().items()}
        with residency.averages():
            inner = residency.weights()
        assert all(torch.equal(outer[name], inner[name]) for name in outer)
        assert all(torch.equal(outer[name], t) for name, t in residency.weights().items())
    assert all(torch.equal(live[name], t) for name, t in residency.tensors("block_1").items())


def test_counts_travel_with_a_checkpoint(tmp_path):
    session = tiny.session(tiny.config(tmp_path))
    session.residency.activate(0)
    optimizer = session.optimizers["block_0"]
    for step in range(3):
        for i, p in enumerate(optimizer.params):
            p.grad = torch.ones_like(p) if i or step == 0 else None
        optimizer.step(1e-3)
    snapshots.save(session, tmp_path / "checkpoint", seconds=0.0)
    back = tiny.session(tiny.config(tmp_path))
    snapshots.restore(back, tmp_path / "checkpoint")
    counts = back.optimizers["block_0"].counts
    assert counts == optimizer.counts and sorted(set(counts.values())) == [1, 3]
    assert back.optimizers["block_1"].steps == 0
