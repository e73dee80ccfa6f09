"""BlockAdamW against torch's AdamW where gradients are missing, not finite, sparse, or of several dtypes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import dbkernels
import diffusionblocks as db
from diffusionblocks.training.optimizer import keep_average

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parameter(dtype=torch.float32, shape=(2, 3)):
    count = torch.Size(shape).numel()
    return nn.Parameter(torch.linspace(0.5, 1.5, count, dtype=torch.float64).view(shape).to(dtype))


def state_of(optimizer):
    return [dict(optimizer.state[p]) for p in optimizer.params()]


@pytest.mark.parametrize(
    "has_gradient",
    [lambda step: True, lambda step: False, lambda step: step < 2, lambda step: step % 2 == 0, lambda step: step > 2],
    ids=["always", "never", "at first", "every other step", "later"],
)
def test_a_parameter_without_a_gradient_is_not_touched(has_gradient):
    """Nor are its moments, its average or its count of updates: as by torch's AdamW."""
    ours, theirs = ([parameter() for _ in range(2)] for _ in range(2))
    optimizer = db.BlockAdamW(ours, lr=0.1, weight_decay=0.1, ema_decay=0.9)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1)
    average, updates = ours[1].detach().clone(), 0
    for step in range(12):
        for params in (ours, theirs):
            params[0].grad = torch.full((2, 3), 1.0 + step)
            params[1].grad = torch.full((2, 3), 2.0 - step) if has_gradient(step) else None
        optimizer.step()
        reference.step()
        if has_gradient(step):
            updates += 1
            decay = min(0.9, (1 + updates) / (10 + updates))
            average = average * decay + ours[1].detach() * (1 - decay)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # a few roundings in another order
    assert optimizer.counts == [12, updates]
    if updates:
        torch.testing.assert_close(optimizer.state[ours[1]]["ema"], average, rtol=1e-5, atol=1e-6)
    else:
        assert ours[1] not in optimizer.state


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("masters", [True, False])
def test_state_created_before_the_first_step_changes_no_bit(masters, moments):
    """Gradients come always, from step 2 on, every other step and never; step 1 has a gradient that isn't finite."""

    def trained(prepared):
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16 if masters else torch.bfloat16)
        params = [parameter(dtype) for dtype in dtypes for _ in range(4)]
        groups = [{"params": params[:8]}, {"params": params[8:], "lr": 0.01}]
        optimizer = db.BlockAdamW(groups, lr=0.1, ema_decay=0.9, masters=masters, moments=moments)
        if prepared:
            optimizer.prepare()
            state = state_of(optimizer)
            assert all(not s["exp_avg"].any() and not s["exp_avg_sq"].any() for s in state)
            assert all(torch.equal(s["ema"], p.to(s["ema"].dtype)) for s, p in zip(state, params, strict=True))
            assert {len({id(s["next_step"]) for s in state[i : i + 4]}) for i in range(0, 16, 4)} == {1}
            assert all(set(s) >= {"master"} for s in state[8:]) == masters and optimizer.counts == [0] * 16
        for step in range(8):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.3 * step - i) if (True, step > 1, step % 2 == 0, False)[i % 4] else None
            if step == 1:
                params[0].grad[0, 0] = float("nan")
            optimizer.step(max_norm=1.0)
        return params, optimizer

    (params, plain), (others, prepared) = trained(False), trained(True)
    prepared.prepare()  # changes nothing that is there
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert torch.equal(p, q), i
        if i % 4 < 3:
            assert plain.state[p].keys() == prepared.state[q].keys()
            assert all(torch.equal(t, prepared.state[q][key]) for key, t in plain.state[p].items()), i
        else:
            assert p not in plain.state and not prepared.state[q]["exp_avg"].any()
            assert torch.equal(prepared.state[q]["ema"], q.to(prepared.state[q]["ema"].dtype))
    assert prepared.counts == plain.counts == [7, 6, 4, 0] * 4


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("skipped", [1, 3])
def test_a_skipped_update_leaves_no_trace(skipped, bad):
    def trained(skipped):
        p = nn.Parameter(torch.zeros(4))
        optimizer = db.BlockAdamW([p], lr=0.1, ema_decay=0.99)
        for _ in range(skipped):
            p.grad = torch.tensor([1.0, bad, 1.0, 1.0])
            optimizer.step()
        for _ in range(3):
            p.grad = torch.ones(4)
            optimizer.step()
        return p, optimizer

    (p, after), (q, plain) = trained(skipped), trained(0)
    assert torch.equal(p, q) and after.counts == plain.counts == [3]
    assert all(torch.equal(after.state[p][key], t) for key, t in plain.state[q].items())


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("empty_first", [False, True])
def test_a_norm_that_is_not_finite_holds_every_optimizer_back(max_norm, bad, empty_first):
    """Clipping by an infinite norm would zero what is finite, and the step would then decay it."""
    shapes = [(0,), (3, 2), ()] if empty_first else [(), (3, 2)]
    optimizers = []
    for b in range(2):
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizers.append(db.BlockAdamW(params, lr=0.1, weight_decay=0.1, ema_decay=0.9))
        for p in params:
            p.grad = torch.full_like(p, bad if b else 1.0)
    norm = dbkernels.total_norm([p.grad for o in optimizers for p in o.params()])
    assert not norm.isfinite()
    for optimizer in optimizers:
        optimizer.step(norm=norm, max_norm=max_norm)
        assert all(bool((p == 1).all()) for p in optimizer.params()) and set(optimizer.counts) == {0}
        assert all(bool((state["exp_avg"] == 0).all()) for state in state_of(optimizer))


def test_one_dtype_that_is_not_finite_holds_the_others_back():
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in DTYPES]
    optimizer = db.BlockAdamW(params, lr=0.1)
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, float("inf") if i == 1 else 1.0)
    optimizer.step()
    assert all(bool((p == 1).all()) for p in params) and set(optimizer.counts) == {0}


@pytest.mark.parametrize(("max_norm", "factor"), [(None, 1.0), (1.0, 0.2), (10.0, 1.0)])
def test_gradients_are_clipped_by_the_norm_given(max_norm, factor):
    optimizers = [db.BlockAdamW([nn.Parameter(torch.zeros(2))], lr=0.1) for _ in range(2)]
    gradients = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    for optimizer, gradient in zip(optimizers, gradients, strict=True):
        optimizer.params()[0].grad = gradient.clone()
    norm = dbkernels.total_norm(list(gradients))
    assert norm == 5
    for optimizer, gradient in zip(optimizers, gradients, strict=True):
        optimizer.step(norm=norm, max_norm=max_norm)
        moment = state_of(optimizer)[0]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * factor * gradient, rtol=1e-5, atol=1e-8)  # beta 0.9


def test_by_default_the_norm_is_the_optimizers_own():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = db.BlockAdamW([p, q], lr=0.1)
    p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)
    optimizer.step(max_norm=1.0)
    assert [float(state["exp_avg"]) for state in state_of(optimizer)] == pytest.approx([0.06, 0.08], rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_floating_dtype_trains_in_its_own(dtype):
    p = parameter(dtype)
    q = nn.Parameter(p.detach().double())
    ours = db.BlockAdamW([p], lr=0.01, weight_decay=0.1, ema_decay=0.9)
    exact = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    for step in range(5):
        gradient = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3) * (step + 1)
        p.grad, q.grad = gradient.to(dtype), gradient.to(dtype).double()
        ours.step()
        exact.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = {key: t for key, t in ours.state[p].items() if key != "next_step"}
    assert {t.dtype for t in state.values()} == {wide} and p.dtype == dtype
    assert ("master" in state) == (p.element_size() == 2)
    # a half is its master rounded once; float64 is exact but for the order of operations
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(p.double(), q.detach(), rtol=0, atol=tolerance)
    if "master" in state:
        torch.testing.assert_close(state["master"].double(), q.detach(), rtol=0, atol=1e-6)


def test_several_dtypes_and_sparse_gradients_in_one_optimizer():
    table = nn.Embedding(5, 3, sparse=True)
    linear = nn.Linear(3, 2).to(torch.bfloat16)
    double = nn.Parameter(torch.ones(2, dtype=torch.float64))
    params = [table.weight, *linear.parameters(), double]
    optimizer, before = db.BlockAdamW(params, lr=0.1), [p.detach().clone() for p in params]
    out = linear(table(torch.tensor([1, 3])).bfloat16()).double() * double
    out.square().sum().backward()
    assert table.weight.grad.is_sparse
    optimizer.step()
    assert all(not torch.equal(a, p) for a, p in zip(before, params, strict=True))
    assert torch.equal(table.weight[0], before[0][0] * (1 - 0.1 * 0.01)), "a row without a gradient is only decayed"


def test_only_matrices_are_decayed():
    params = [nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (3,), (), (2, 2, 2))]
    optimizer = db.BlockAdamW(params, lr=0.5, weight_decay=0.1)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [float(p.detach().mean()) for p in params] == pytest.approx([0.95, 1.0, 1.0, 0.95])


@pytest.mark.parametrize(("settings", "error", "words"), [
    (dict(ema_decay=1.0), ValueError, r"ema_decay must be in \[0, 1\)"),
    (dict(weight_decay=-1.0), ValueError, "weight_decay must be zero or positive"),
    (dict(weight_decay=float("nan")), ValueError, "weight_decay must be zero or positive"),
    (dict(lr=-1.0), ValueError, "lr must be zero or positive"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(settings, error, words):
    with pytest.raises(error, match=words):
        db.BlockAdamW([parameter()], **settings)


def test_what_cannot_be_trained_is_refused_at_once():
    optimizer = db.BlockAdamW([parameter()], masters=False)
    for dtype, words in ((torch.complex64, r"shape \(2,\) is torch\.complex64: only real floats"),
                         (torch.float16, "float16 parameters need masters=True")):  # fmt: skip
        p = nn.Parameter(torch.zeros(2, dtype=dtype))
        with pytest.raises(TypeError, match=words):
            db.BlockAdamW([p], masters=False)
        with pytest.raises(TypeError, match=words):
            optimizer.add_param_group({"params": [p]})


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_is_kept_beside_any_optimizer(dtype):
    p, untouched = parameter(dtype), parameter(dtype)
    optimizer = torch.optim.SGD([p, untouched], lr=0.1)
    keep_average(optimizer, 0.9)
    values = []
    for _ in range(30):
        p.grad = torch.ones_like(p)
        optimizer.step()
        values.append(p.detach().double().clone())
    average = values[0]
    for updates, value in itertools.islice(enumerate(values, 1), 1, None):
        decay = min(0.9, (1 + updates) / (10 + updates))  # warms up, then 0.9
        average = average * decay + value * (1 - decay)
    state = optimizer.state[p]
    assert state["ema_updates"] == 30 and "ema" not in optimizer.state[untouched]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert state["ema"].dtype == wide
    torch.testing.assert_close(state["ema"].double(), average, rtol=0, atol=1e-12 if wide == torch.float64 else 1e-5)
