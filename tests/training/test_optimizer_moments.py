"""bfloat16 moments of BlockAdamW: what they are, what they change, and that training goes on from a file to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small


def trained(dtype, *, groups=False, steps=20, **settings):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.ones(64, 32, dtype=dtype)) for _ in range(2)]
    given = [{"params": [p]} for p in params] if groups else params
    optimizer = db.BlockAdamW(given, lr=0.01, weight_decay=0.0, ema_decay=0.9, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradient = torch.randn(64, 32, generator=generator) + 0.5
        for p in params:
            p.grad = gradient.to(dtype)
        optimizer.step(max_norm=100.0)
    return params, optimizer


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_half_and_training_is_that_of_float32_moments(dtype, masters):
    masters = masters or dtype == torch.float16
    (p, _), wide = trained(dtype, masters=masters)
    (q, _), half = trained(dtype, masters=masters, moments=torch.bfloat16)
    expected = torch.float64 if dtype == torch.float64 else torch.bfloat16
    for key in ("exp_avg", "exp_avg_sq"):
        moment, exact = half.state[q][key], wide.state[p][key]
        assert moment.dtype == expected and exact.dtype != torch.bfloat16
        scale = exact.double().square().mean().sqrt()
        apart = (moment.double() - exact.double()).square().mean().sqrt() / scale
        assert apart == 0 if dtype == torch.float64 else 1e-4 < apart < 0.02, (key, apart)
    # .2 in all; what rounding adds to single steps is small beside it
    assert (q.double() - p.double()).square().mean().sqrt() < 0.005
    assert all(t.dtype != torch.bfloat16 for key, t in half.state[q].items() if "exp" not in key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_list_draws_its_own_bits(dtype):
    """Parameters of one list, of several groups, and optimizers of other seeds; the same seed repeats."""
    results = []
    for settings in (dict(), dict(), dict(groups=True), dict(seed=2**64 - 1), dict(groups=True, seed=2**64 - 1)):
        params, optimizer = trained(dtype, moments="bfloat16", **settings)
        results.append([optimizer.state[p]["exp_avg_sq"] for p in params])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for first, second in results:
        assert 0.1 < (first != second).float().mean() < 0.99
    assert not torch.equal(results[0][0], results[3][0])


@pytest.mark.parametrize(("settings", "words"), [
    (dict(moments="float16"), "moments must be float32 or bfloat16, got float16"),
    (dict(moments=torch.float64), "moments must be float32 or bfloat16, got float64"),
    (dict(seed=-1), r"seed must be in \[0, 2\^64\), got -1"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        db.BlockAdamW([nn.Parameter(torch.zeros(2))], **settings)


def test_the_trainers_setting_is_the_default_optimizers():
    with pytest.raises(ValueError, match="moments must be one of 'float32', 'bfloat16'"):
        db.Trainer(small.model(), moments="float16", device="cpu")
    with pytest.raises(ValueError, match="moments and optimizer both set the moments' dtype"):
        db.Trainer(small.model(), moments="bfloat16", optimizer=lambda params: torch.optim.SGD(params, 0.1))
    optimizers = db.Trainer(small.model(), moments="bfloat16", seed=3, device="cpu").optimizers
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    assert {group["moments"] for group in groups} == {"bfloat16"}
    assert len({group["seed"] for group in groups}) == len(optimizers) > 2, "every part has a seed of its own"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [None, "disk"])
def test_training_goes_on_from_a_file_bit_for_bit(tmp_path, precision, offload):
    def trainer(name):
        settings = dict(moments="bfloat16", precision=precision, offload=offload, ema=0.9, visit=2)
        return db.Trainer(small.model(), folder=tmp_path / name, device="cpu", **settings)

    whole = trainer("whole")
    whole.fit(small.Loader(), steps=14, progress=False)
    made, back = trainer("made"), trainer("back")
    made.fit(small.Loader(), steps=7, progress=False)
    made.save(tmp_path / "checkpoint")
    back.load(tmp_path / "checkpoint")
    back.fit(small.Loader(), steps=14, progress=False)
    expected, found = small.everything(whole), small.everything(back)
    assert {t.dtype for key, t in found.items() if "exp_avg" in key} == {torch.bfloat16}
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[key]) for key, t in found.items())
