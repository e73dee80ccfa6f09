"""Masked diffusion's schedule: arithmetic against its definition."""

import pytest
import torch

from diffusionblocks.noise import mask_schedule as masking


def test_alpha_falls_from_nearly_one_to_nearly_zero():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    values = masking.alpha(t)
    assert values[0] == pytest.approx(1 - 1e-4) and values[-1] == pytest.approx(1e-4) and (values.diff() < 0).all()


def test_weight_is_the_slope_over_the_masked_share():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64).requires_grad_()
    slope = torch.autograd.grad(masking.alpha(t).sum(), t)[0]
    torch.testing.assert_close(masking.weight(t), -slope / (1 - masking.alpha(t)))


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_edges_share_the_work_equally(blocks):
    edges = masking.edges(blocks)
    masses = masking.alpha(torch.tensor(edges, dtype=torch.float64)).diff()
    assert edges[0] == 1 and edges[-1] == 0 and len(edges) == blocks + 1
    torch.testing.assert_close(masses, masses[:1].expand(blocks))


def test_times_fall_one_in_each_part_and_cover_the_range():
    first = masking.times(0.9, 0.3, 12, seed=1)
    parts = ((first - 0.3) / 0.6 * 12).floor().sort().values
    assert parts.tolist() == list(range(12))
    assert torch.equal(first, masking.times(0.9, 0.3, 12, seed=1))
    many = torch.cat([masking.times(0.9, 0.3, 4, seed=1, offset=i) for i in range(500)])
    assert many.min() < 0.31 and many.max() > 0.89 and abs(float(many.mean()) - 0.6) < 0.01


@pytest.mark.parametrize(("call", "words"), [
    (lambda: masking.edges(0), "blocks=0"),
    (lambda: masking.times(0.2, 0.2, 3, seed=0), "low < high"),
    (lambda: masking.times(0.3, 0.2, 0, seed=0), "count=0"),
])  # fmt: skip
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
