"""Models of other dtypes, and under torch.compile: they predict, sample and learn."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import diffusionblocks as db
import small
import warm

DTYPES = (torch.float64, torch.bfloat16, torch.float16)


def of(kind, dtype):
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in small.batch(kind))
    model = small.model(kind)
    model.target.shape = model.target.sample_shape(y)
    return model.to(dtype).eval(), x, y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", small.KINDS)
def test_a_converted_model_predicts_samples_and_learns(kind, dtype):
    model, x, y = of(kind, dtype)
    assert torch.isfinite(model(x)).all()
    assert len(db.sample(model, x, steps=4)) == len(x)
    assert db.sample(model, x, steps=4, sampler="dpmpp_2m").shape[0] == len(x)
    loss = model.loss(0, x, y, seed=0, step=0).loss
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_a_double_model_predicts_as_the_float_one():
    (double, x, _), (single, _, _) = of("images", torch.float64), of("images", torch.float32)
    torch.testing.assert_close(double(x), single(x), rtol=1e-4, atol=1e-5)


def test_neighbouring_levels_stay_apart_in_a_half_model():
    model, x, _ = of("labels", torch.bfloat16)
    seen = []
    model.stem_head.stem.noise.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    model(x)
    assert set(seen) == {torch.float32}


def test_a_compiled_model_warns_of_nothing():
    code = (
        "import warnings; warnings.simplefilter('error'); import torch, small; model = small.model().eval(); "
        "x, _ = small.batch(); compiled = torch.compile(model, backend='eager'); "
        "torch.testing.assert_close(compiled(x), model(x)); print('same')"
    )
    run = warm.run("-c", code, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, imports=warm.TRAINING)
    assert run.stdout == "same\n" and not run.stderr, run.stderr
