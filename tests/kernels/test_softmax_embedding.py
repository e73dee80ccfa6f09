"""softmax_embedding against its definition in float64."""

import sys

import pytest
import torch

import dbkernels
from numerics import EPSILON
from test_denoising_cross_entropy import DTYPES, OPTIONS, example, small_chunks  # noqa: F401  (a fixture for all)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "readout", "bias and cap"])
def test_softmax_embedding_against_float64(options, dtype):
    _, keywords, leaves = example(dtype=dtype, **OPTIONS[options])
    keywords.pop("row_weight", None)
    if "posterior" in keywords:
        keywords["posterior"] = (leaves["seen"], *keywords["posterior"][1:])
    named = keywords | {name: leaves[name] for name in ("bias", "logit_scale") if name in leaves}
    table, r = torch.randn(50, 7).to(dtype), torch.rand(5, 9)
    z = torch.randn(5, 9, 7).to(dtype)
    wide = {
        k: tuple(t.double() for t in v) if isinstance(v, tuple) else v.double() if isinstance(v, torch.Tensor) else v
        for k, v in named.items()
    }
    for step in (None, (z, r), (z, 0.25)):
        ours = dbkernels.softmax_embedding(leaves["h"], leaves["weight"], table, **named, step=step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["dbkernels.softmax_embedding"], "as_defined", lambda: True)
            given = None if step is None else (z.double(), step[1])
            exact = dbkernels.softmax_embedding(
                leaves["h"].double(), leaves["weight"].double(), table.double(), **wide, step=given
            )
        assert ours.dtype == dtype and ours.shape == z.shape
        unit = max(EPSILON[dtype], 16 * EPSILON[torch.float32 if dtype != torch.float64 else dtype])
        assert (ours.double() - exact).abs().max() <= unit * (1 + exact.abs().max())


def test_softmax_embedding_refuses():
    h, weight, table = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(ValueError, match="isn't differentiable"):
        dbkernels.softmax_embedding(h.requires_grad_(), weight, table)
    with pytest.raises(ValueError, match="table must be"):
        dbkernels.softmax_embedding(h.detach(), weight, table[:4])
    with pytest.raises(ValueError, match="step's z"):
        dbkernels.softmax_embedding(h.detach(), weight, table, step=(torch.zeros(4, 3), 0.5))
