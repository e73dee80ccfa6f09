"""BlockAdamW is a torch optimizer as any other: groups, schedulers, closures, names, state_dicts, copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import diffusionblocks as db


def parameter(dtype=torch.float32, shape=(2, 3)):
    count = torch.Size(shape).numel()
    return nn.Parameter(torch.linspace(0.5, 1.5, count, dtype=torch.float64).view(shape).to(dtype))


def state_of(optimizer):
    return [dict(optimizer.state[p]) for p in optimizer.params()]


def test_groups_have_their_own_settings_and_follow_a_scheduler():
    ours, theirs = ([parameter(), parameter()] for _ in range(2))

    def trained(kind, params):
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.01, "weight_decay": 0.5}]
        optimizer = kind(groups, lr=0.1, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(4):
            for p in params:
                p.grad = torch.linspace(-1, 2, 6).view(2, 3) + step
            optimizer.step()
            schedule.step()
        return [group["lr"] for group in optimizer.param_groups]

    assert trained(db.BlockAdamW, ours) == trained(torch.optim.AdamW, theirs) == pytest.approx([0.02, 0.002])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_closure_computes_the_loss_with_gradients():
    p = parameter()
    optimizer = db.BlockAdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    expected = float(p.detach().square().sum())
    assert float(optimizer.step(closure).detach()) == pytest.approx(expected)
    assert optimizer.counts == [1] and float(p.detach().square().sum()) < expected


def test_parameters_come_by_name_and_in_later_groups():
    layer = nn.Linear(3, 2)
    optimizer = db.BlockAdamW(layer.named_parameters(), lr=0.1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer = db.BlockAdamW([layer.weight], lr=0.1)
    optimizer.add_param_group({"params": [layer.bias], "lr": 0.2})
    before = layer.bias.detach().clone()
    layer.bias.grad, layer.weight.grad = torch.ones(2), torch.ones(2, 3)
    optimizer.step()
    torch.testing.assert_close(before - layer.bias.detach(), torch.full((2,), 0.2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("masters", [True, False])
def test_its_state_goes_to_a_file_and_back_bit_for_bit(masters, moments):
    """Also where parameters had different numbers of updates, and state is wider than its parameter."""

    def make():
        dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16 if masters else torch.float32]
        params = [parameter(dtype) for dtype in (*dtypes, torch.bfloat16)]
        return params, db.BlockAdamW(params, lr=0.1, ema_decay=0.9, masters=masters, moments=moments)

    def train(params, optimizer, steps):
        for step in steps:
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.1 * step - i) if i < 4 or step % 2 else None
            optimizer.step()

    params, optimizer = make()
    train(params, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, loaded = make()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    loaded.load_state_dict(torch.load(file))
    assert loaded.counts == optimizer.counts == [5, 5, 5, 5, 2]
    train(params, optimizer, range(5, 9))
    train(others, loaded, range(5, 9))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    for a, b in zip(state_of(optimizer), state_of(loaded), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    assert loaded.counts == [9, 9, 9, 9, 4]


def test_loading_state_does_not_tie_two_optimizers():
    p, q = parameter(), parameter()
    one, two = db.BlockAdamW([p], lr=0.1), db.BlockAdamW([q], lr=0.1)
    p.grad = q.grad = torch.ones(2, 3)
    one.step()
    two.load_state_dict(one.state_dict())
    two.step()
    assert one.counts == [1] and two.counts == [2]
    assert not torch.equal(one.state[p]["exp_avg"], two.state[q]["exp_avg"])


@pytest.mark.parametrize("masters", [True, False])
def test_steps_below_a_half_weights_last_place_add_up(masters):
    """By a float32 master, or in the mean by stochastic rounding; rounded to nearest they would all be lost."""
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))  # 2^-8 apart below 1
    optimizer = db.BlockAdamW([p], lr=1e-4, weight_decay=0.0, masters=masters)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert ("master" in optimizer.state[p]) == masters
    values = p.detach().double()
    if masters:
        assert float(optimizer.state[p]["master"].double().mean()) == pytest.approx(0.99, abs=1e-5)
        assert len(values.unique()) == 1
    else:  # 4096 elements of standard deviation below 2^-8
        assert float(values.mean()) == pytest.approx(0.99, abs=4 * 2.0**-8 / 64)
        assert len(values.unique()) > 1


def test_a_copy_goes_on_alone():
    p = parameter()
    optimizer = db.BlockAdamW([p], lr=0.1, ema_decay=0.9)
    p.grad = torch.ones(2, 3)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (q,) = twin.params()
    q.grad = torch.ones(2, 3)
    twin.step()
    assert (optimizer.counts, twin.counts) == ([1], [2]) and not torch.equal(p, q)
