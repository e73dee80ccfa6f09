"""The spaces noise is added in: readouts by hand, Bayes' rule, codebooks, label checks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusionblocks.targets.base import Features, Noised
from diffusionblocks.targets.codebook import spread_codebook
from diffusionblocks.targets.continuous import ContinuousTarget
from diffusionblocks.targets.devices import send_batch
from diffusionblocks.targets.labels import LabelTarget

K, D, N = 7, 5, 6


class LinearHead(nn.Module):
    """Logits from features alone; `scale` 0 says nothing about the label."""

    def __init__(self, scale: float):
        super().__init__()
        weight = torch.randn(K, D, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(scale * weight)

    def forward(self, h, cond):
        return h @ self.weight.T


def label_target(table: torch.Tensor) -> LabelTarget:
    return LabelTarget(*table.shape, table=table)


def batch(spread: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    table, h, eps = (torch.randn(n, D, generator=generator) for n in (K, N, N))
    sigma = torch.tensor([0.05, 0.2, 0.5, 1.0, 5.0, 80.0])
    y = torch.arange(N) % K
    return spread * table, h, spread * table[y] + sigma[:, None] * eps, sigma, y


@pytest.mark.parametrize("spread", [1.0, 0.3])
def test_posterior_readout_of_a_silent_head_is_bayes_rule(spread):
    table, h, z, sigma, _ = batch(spread)  # rows of unequal norm: |E|^2 / 2 counts
    output = label_target(table).read(Features(LinearHead(0), h, None), z, sigma)
    distance = (z[:, None].double() - table.double()).square().sum(-1)
    likelihood = torch.exp(-(distance - distance.min(1, keepdim=True).values) / (2 * sigma[:, None].double() ** 2))
    posterior = likelihood / likelihood.sum(1, keepdim=True)
    # Logits reach |E|^2 / sigma^2, some thousands at sigma = .05, each rounded to 6e-8 of itself.
    assert torch.allclose(output.raw.double().softmax(-1), posterior, atol=2e-4)
    assert torch.allclose(output.denoised.double(), posterior @ table.double(), atol=1e-3)


def test_posterior_readout_multiplies_the_heads_prior_by_the_likelihood():
    table, h, z, sigma, _ = batch()
    head = LinearHead(1.0)
    got = label_target(table).read(Features(head, h, None), z, sigma).raw.double().softmax(-1)
    prior = head(h, None).double().softmax(-1)
    likelihood = torch.exp(
        -((z[:, None].double() - table.double()).square().sum(-1)) / (2 * sigma[:, None].double() ** 2)
    )
    want = prior * likelihood
    rows = sigma >= 0.5  # below, the likelihood itself underflows when written plainly
    assert torch.allclose(got[rows], (want / want.sum(1, keepdim=True))[rows], atol=1e-4)


def test_logits_and_estimate_stay_float32_under_autocast():
    table, h, z, sigma, _ = batch()
    target, head = label_target(table), LinearHead(0)
    exact = target.read(Features(head, h, None), z, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = target.read(Features(head, h, None), z, sigma)
    assert output.raw.dtype == output.denoised.dtype == torch.float32
    assert torch.equal(output.raw, exact.raw)  # the evidence is large at low noise: bfloat16 would ruin it


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_loss_is_the_cross_entropy_of_each_sample(dtype):
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    y = torch.arange(N)
    want = torch.stack([logits[i].double().exp().sum().log() - logits[i, y[i]].double() for i in range(N)])
    target = LabelTarget(K, K, table=torch.eye(K))
    features = Features(lambda h, cond: h, logits, None)
    z = torch.zeros(N, K)  # equal evidence for all
    got = target.loss(features, Noised(z, z, z), y.to(dtype), torch.ones(N)).per_sample
    assert torch.allclose(got.double(), want, rtol=1e-5)  # float32 log-sum-exp
    target.check(y.to(dtype))


@settings(deadline=None)
@given(classes=st.integers(2, 40), extra=st.integers(0, 30), seed=st.integers(0, 100))
def test_codebook_is_orthonormal_where_it_fits(classes, extra, seed):
    table = spread_codebook(classes, classes + extra, seed=seed).double()
    assert torch.allclose(table @ table.T, torch.eye(classes).double(), atol=1e-6)  # rounded to float32


@given(classes=st.integers(3, 60), dim=st.integers(1, 8))
def test_codebook_of_more_classes_than_dimensions_has_unit_rows(classes, dim):
    table = spread_codebook(classes, dim)
    assert table.shape == (classes, dim) and table.is_contiguous()
    assert torch.allclose(table.double().norm(dim=-1), torch.ones(classes).double(), atol=1e-6)


def test_codebook_depends_on_the_seed_alone():
    torch.manual_seed(5)
    one = spread_codebook(10, 16, seed=1)
    torch.manual_seed(6)
    assert torch.equal(one, spread_codebook(10, 16, seed=1))
    assert not torch.equal(one, spread_codebook(10, 16, seed=2))


def test_sigma_data_of_a_class_target_is_its_root_mean_square():
    table = spread_codebook(10, 16)
    assert label_target(table).sigma_data == pytest.approx(float(table.square().mean().sqrt()), rel=1e-6)


CLASS, IMAGE = LabelTarget(K, K, table=torch.eye(K)), ContinuousTarget()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *[
            (lambda y=y: CLASS.check(y), "labels")
            for y in (
                torch.zeros(0, dtype=torch.int64),
                torch.zeros(2, 1, dtype=torch.int64),
                torch.tensor(1),
                torch.zeros(2),
                torch.zeros(2, dtype=torch.bool),
                torch.tensor([0, K]),
                torch.tensor([-1, 0]),
            )
        ],
        *[
            (lambda z=z: CLASS.check_noised(z), "z must")
            for z in (
                torch.zeros(2, K + 1),
                torch.zeros(K),
                torch.zeros(0, K),
                torch.zeros(2, K, dtype=torch.int64),
            )
        ],
        *[
            (lambda y=y: IMAGE.check(y), "target y")
            for y in (torch.zeros(0, 2), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(1.0))
        ],
        (lambda: IMAGE.check_noised(torch.tensor(1.0)), "z must"),
        (lambda: ContinuousTarget(0), "sigma_data"),
        (lambda: ContinuousTarget(math.nan), "sigma_data"),
        (lambda: LabelTarget(K, 4, sigma_data=-1), "sigma_data"),
        (lambda: LabelTarget(K, K, table=torch.zeros(K)), "table"),
        (lambda: LabelTarget(1, K, table=torch.zeros(1, K)), "table"),
        (lambda: LabelTarget(1, K), "num_classes"),
        (lambda: LabelTarget(K, 0), "dim"),
        (lambda: spread_codebook(1, 4), "classes"),
        (lambda: spread_codebook(4, 0), "dim"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_labels_are_looked_at_before_they_leave_the_host():
    target, x, device = LabelTarget(3, 8), torch.zeros(2, 4), torch.device("meta")
    assert send_batch(x, torch.tensor([0, 2]), device, target.check)[1].device == device
    with pytest.raises(ValueError, match="-100 to 2"):
        send_batch(x, torch.tensor([-100, 2]), device, target.check)
