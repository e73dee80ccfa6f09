"""The Fréchet distance by hand, and the classifier whose features it is taken in."""

from __future__ import annotations

import math

import pytest
import torch

from diffusionblocks.experiments.data.images import Split, load
from diffusionblocks.experiments.metrics import frechet as metrics
from diffusionblocks.experiments.metrics.frechet import FeatureNet, Judge, frechet

CPU = torch.device("cpu")


def exactly(mean: torch.Tensor, cov: torch.Tensor, count: int = 500) -> torch.Tensor:
    """Samples whose mean and covariance are the given ones, not only in expectation."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return whitened @ torch.linalg.cholesky(cov).T + mean


def test_frechet_of_gaussians_by_hand():
    zero, identity = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    a = exactly(zero, identity)
    shifted = exactly(zero + torch.tensor([1.0, 2.0, 2.0]), identity, 300)
    assert frechet(a, shifted) == pytest.approx(9, abs=1e-9)
    # diagonal covariances: the sum of (std_a - std_b)^2
    wide = exactly(zero, torch.diag(torch.tensor([4.0, 9.0, 0.25], dtype=torch.float64)))
    assert frechet(a, wide) == pytest.approx(1 + 4 + 0.25, abs=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    """In two dimensions tr (A B)^1/2 = sqrt(tr(A B) + 2 sqrt(det A det B))."""
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    B = torch.tensor([[1.0, -0.5], [-0.5, 4.0]], dtype=torch.float64)
    assert not torch.allclose(A @ B, B @ A)
    cross = math.sqrt(float((A @ B).trace()) + 2 * math.sqrt(float(A.det() * B.det())))
    want = float(A.trace() + B.trace()) - 2 * cross
    zero = torch.zeros(2, dtype=torch.float64)
    assert frechet(exactly(zero, A), exactly(zero, B, 300)) == pytest.approx(want, abs=1e-9)


def test_frechet_is_symmetric_and_nothing_for_the_same_samples_even_without_full_rank():
    few, other = torch.randn(5, 16), torch.randn(7, 16) * 2 + 1
    assert frechet(few, few[torch.randperm(5)]) == pytest.approx(0, abs=1e-12)  # some roundings of a trace of 16
    assert frechet(few, other) == pytest.approx(frechet(other, few), rel=1e-12) and frechet(few, other) > 1


@pytest.mark.parametrize(
    ("count", "width", "size"), [(2, 32, 1.0), (31, 32, 1e3), (33, 32, 1.0), (10, 512, 1.0), (100, 64, 1e6)]
)
def test_frechet_of_few_samples_is_never_negative(count, width, size):
    """Against the nuclear norm of the samples' own products, which no covariance is needed for."""
    a, b = size * torch.randn(count, width), size * torch.randn(count + 1, width)
    x, y = (t.double() - t.double().mean(0) for t in (a, b))
    cross = torch.linalg.svdvals(x @ y.T).sum() / ((count - 1) * count) ** 0.5
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    want = means + x.square().sum() / (count - 1) + y.square().sum() / count - 2 * cross
    trace = float(x.square().sum() / (count - 1))
    assert frechet(a, b) == pytest.approx(float(want), abs=1e-12 * trace)
    assert 0 <= frechet(a, a.flip(0)) <= 1e-12 * trace


@pytest.mark.parametrize(
    "shapes", [((1, 4), (5, 4)), ((5, 4), (1, 4)), ((5, 4), (5, 3)), ((5,), (5,)), ((5, 2, 2), (5, 2, 2))]
)
def test_features_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="features must be"):
        frechet(*(torch.zeros(shape) for shape in shapes))


@pytest.fixture(scope="module")
def short():
    """Less of the classifier's training: enough to tell digits apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "STEPS", 100)
        patch.setattr(metrics, "EPOCHS", 0)
        yield Judge(load("digits"), CPU)


def test_the_classifier_is_the_same_each_time(short, monkeypatch):
    monkeypatch.setattr(metrics, "STEPS", 3)
    monkeypatch.setattr(metrics, "EPOCHS", 0)
    torch.manual_seed(1)
    one = Judge(load("digits"), CPU)
    torch.manual_seed(2)
    two = Judge(load("digits"), CPU)
    for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
        assert torch.equal(a, b)
    untrained = FeatureNet(1, 10).last.weight
    assert not torch.equal(one.network.last.weight, untrained)


def test_a_judge_is_trained_once(monkeypatch):
    trained = []
    monkeypatch.setattr(metrics, "Judge", lambda data, device: trained.append(data.name) or object())
    metrics.judge.cache_clear()
    assert metrics.judge("digits", None, CPU) is metrics.judge("digits", None, CPU)
    assert trained == ["digits"]
    metrics.judge.cache_clear()


def test_worse_images_are_farther(short):
    data = load("digits")
    real, other = data.test, data.train.take(torch.arange(360))
    noise = torch.randint(-150, 151, other.images.shape, generator=torch.Generator().manual_seed(0))
    noisy = Split((other.images + noise).clamp(0, 255).to(torch.uint8), other.labels)
    wrong = Split(other.images, (other.labels + 1) % 10)
    plain, noised, mislabelled = (short.compare(real, split) for split in (other, noisy, wrong))
    assert plain["real_accuracy"] > 90 and plain["class_accuracy"] > 90
    assert noised["frechet"] > 2 * plain["frechet"] and noised["class_accuracy"] < plain["class_accuracy"]
    assert mislabelled["class_accuracy"] < 10 and mislabelled["frechet"] == plain["frechet"]
    one_class = other.take((other.labels == 3).nonzero().flatten())
    assert short.compare(real, one_class)["frechet"] > 2 * plain["frechet"], "a sampler of one class must not pass"
