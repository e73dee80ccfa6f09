"""How a path is chosen: tried, compared, timed once; and what it falls back to."""

import math

import pytest
import torch

from dbkernels._fastest import Choice, fastest, refusal
from dbkernels.two_stream_choice import two_stream_choice
from two_streams import example


def test_the_fastest_of_those_that_agree():
    right, off = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.2])
    seconds = {"first": 3.0, "quick": 1.0, "slow": 5.0, "wrong": 0.1, "broken": 0.1, "nan": 0.1}

    def broken():
        raise RuntimeError("no engine\nmore words")

    ways = {"first": lambda: [right], "quick": lambda: [right + 1e-3], "slow": lambda: [right], "wrong": lambda: [off]}
    ways |= {"broken": broken, "nan": lambda: [right * torch.nan]}
    names = {call: name for name, call in ways.items()}
    choice = fastest(ways, lambda call: seconds[names[call]])
    assert choice.name == "quick" and choice.milliseconds == {"first": 3.0, "quick": 1.0, "slow": 5.0}
    for words in ("wrong: it returns other values", "nan: it returns other values", "broken: no engine"):
        assert words in choice.reason


def test_what_is_no_reason_to_refuse():
    def full():
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        refusal(full)
    assert refusal(lambda: [torch.zeros(0), torch.ones(2)], [torch.zeros(0), torch.ones(2)]) is None


def test_nothing_is_compared_with_values_that_are_not_finite():
    choice = fastest({"first": lambda: [torch.tensor([math.inf])], "other": lambda: [torch.ones(1)]})
    assert choice.name == "first" and not choice.milliseconds


@pytest.mark.kernels
@pytest.mark.parametrize("clean", [True, False])
def test_on_a_cpu_there_is_one(clean):
    for choice in two_stream_choice(*example(clean=clean)):
        assert choice.name == "PyTorch's flash attention, merged" and "cpu" in choice.reason and not choice.milliseconds
    with pytest.raises(ValueError, match="group_size=99"):
        two_stream_choice(*example(clean=clean), group_size=99)


class Plan:
    """Stands for the plans of two_stream_plans.py."""

    backward, bucket, paths, choice = True, ("a bucket",), ["triton", "cudnn"], None

    def __init__(self, accepts=True):
        self.accepts, self.runs = accepts, []

    def run(self, path, *arguments):
        self.runs.append(path)
        if path != "triton" and not self.accepts:
            raise RuntimeError("unsupported strides")
        return [torch.ones(2)]


@pytest.fixture
def paths(monkeypatch):
    paths = pytest.importorskip("dbkernels.triton.two_stream")
    monkeypatch.setattr(paths, "_chosen", {})
    monkeypatch.setattr(paths, "untimed", lambda: False)
    monkeypatch.setattr(paths, "fastest", lambda ways: Choice("cudnn", "timed", dict.fromkeys(ways, 1.0)))
    return paths


def test_a_timing_serves_its_bucket_but_every_kind_is_tried(paths):
    first, second, third = Plan(), Plan(), Plan(accepts=False)
    assert paths.path_of(first, (), ()) == "cudnn" and not first.runs
    assert paths.path_of(second, (), ()) == "cudnn" and second.runs == ["cudnn"]
    assert paths.path_of(second, (), ()) == "cudnn" and second.runs == ["cudnn"]
    assert paths.path_of(third, (), ()) == "triton" and "unsupported strides" in third.choice.reason


def test_a_timing_serves_one_layout():
    plans = pytest.importorskip("dbkernels.triton.two_stream_plans")
    t = torch.zeros(2, 4, 160, 32)
    others = t.transpose(1, 2).contiguous().transpose(1, 2), t[:, :1].expand(2, 4, 160, 32)
    buckets = {plans.Forward(plans.Options(1, 0.1, None), t, k, t, t).bucket for k in (t, t[..., :150, :], *others)}
    assert len(buckets) == 3


def test_values_that_are_not_finite_decide_nothing(paths, monkeypatch):
    plan = Plan()
    with monkeypatch.context() as patch:
        patch.setattr(paths, "fastest", lambda ways: Choice("triton", "values that aren't finite can't be compared"))
        assert paths.path_of(plan, (), ()) == "triton" and plan.choice is None
    assert paths.path_of(plan, (), ()) == "cudnn"


def test_what_forbids_cudnn(paths, monkeypatch):
    plan, odd = Plan(), torch.zeros(9)[1:]
    assert paths.path_of(plan, (), (odd, None)) == "triton" and plan.choice is None
    monkeypatch.setattr(paths, "untimed", lambda: True)
    assert paths.path_of(plan, (), ()) == "triton" and plan.choice is None
    monkeypatch.setattr(paths, "untimed", lambda: False)
    assert paths.path_of(plan, (), ()) == "cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        assert paths.path_of(plan, (), ()) == "triton"
        plan.backward = False
        assert paths.path_of(plan, (), ()) == "cudnn"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch._C, "_get_cudnn_sdp_enabled", lambda: False)
    assert paths.path_of(plan, (), ()) == "triton"
