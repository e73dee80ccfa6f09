"""Some hundred random cases of the ops; tests/kernels/fuzz.py runs as many as one likes."""

import random

import pytest
import torch

import dbkernels
import fuzz
from interpreter import run_interpreted


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_random_cases_against_float64(seed):
    assert fuzz.run(seconds=600, seed=seed, most=300) == 300


@pytest.mark.slow
def test_random_cases_of_interpreted_triton():
    pytest.importorskip("triton")
    run_interpreted("interpreted_fuzz.py")


def test_every_op_comes_up():
    ops = {random.Random(f"0/{number}").choice(fuzz.OPS) for number in range(200)}
    assert ops == set(fuzz.OPS)


def beyond(x, *rest, **options):
    """A norm that takes x for contiguous, as a kernel does that forgets strides."""
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    flat = x.as_strided(x.shape, torch.empty(x.shape).stride()) if room >= x.numel() else x
    return dbkernels.ada_rms_norm(flat, *rest, **options)


def constant(x, *rest, **options):
    """A norm whose gradient isn't its own."""
    return dbkernels.ada_rms_norm(x, *rest, **options) + 0.1 * (x - x.detach())


def writing(x, *rest, **options):
    with torch.no_grad():
        x.fill_(2.0)
    return dbkernels.ada_rms_norm(x, *rest, **options)


@pytest.mark.parametrize("broken", [beyond, constant, writing], ids=lambda f: f.__name__)
def test_it_bites(broken, monkeypatch):
    plain = fuzz.results

    def results(op, given, upstream):
        exact = given["x"].dtype == torch.float64 and given["x"].is_contiguous()  # what the others are compared with
        return plain(dbkernels.ada_rms_norm if exact else op, given, upstream)

    def case_of(op):
        return lambda draw, dtype: (op, {"x": fuzz.tensor(draw, 3, 5, 17, dtype=dtype), "eps": 0.1})

    monkeypatch.setattr(fuzz, "results", results)
    monkeypatch.setattr(fuzz, "OPS", (case_of(dbkernels.ada_rms_norm),))
    assert fuzz.run(seconds=5, seed=0, most=20) == 20
    monkeypatch.setattr(fuzz, "OPS", (case_of(broken),))
    with pytest.raises(AssertionError, match=r"python tests/kernels/fuzz\.py --seed 0 --case \d+"):
        fuzz.run(seconds=5, seed=0)
