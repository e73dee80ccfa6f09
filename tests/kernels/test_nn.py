"""The modules: their own weights reach the op, and their names are those of PyTorch's modules."""

import pytest
import torch
from torch import nn

import dbkernels
from dbkernels.nn import AdaLayerNorm, AdaRMSNorm, EDMLoss, GatedResidualNorm


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (AdaLayerNorm(24, affine=True, eps=1e-5), nn.LayerNorm(24)),
        (AdaLayerNorm(24, affine=True, bias=False, eps=1e-5), nn.LayerNorm(24, bias=False)),
        (AdaLayerNorm(24, eps=1e-5), nn.LayerNorm(24, elementwise_affine=False)),
        (AdaRMSNorm(24, affine=True), nn.RMSNorm(24, eps=1e-6)),
    ],
)
def test_norms_stand_for_those_of_pytorch(ours, theirs):
    state = {name: torch.randn_like(t) for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    shift, scale = torch.randn(2, 3, 1, 24)
    torch.testing.assert_close(ours(x, shift, scale), theirs(x) * (1 + scale) + shift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("affine", [False, True])
def test_gated_residual_norm(norm, affine):
    module = GatedResidualNorm(24, norm=norm, affine=affine)
    for p in module.parameters():
        nn.init.normal_(p)
    x, branch = torch.randn(2, 3, 5, 24, requires_grad=True).unbind()
    gate, shift, scale = torch.randn(3, 3, 1, 24)
    h, out = module(x, branch, gate, shift, scale)
    kind = nn.LayerNorm(24, 1e-6, affine) if norm == "layer" else nn.RMSNorm(24, 1e-6, affine)
    kind.load_state_dict(module.state_dict())
    torch.testing.assert_close(h, x + gate * branch)
    torch.testing.assert_close(out, kind(h) * (1 + scale) + shift, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_edm_loss():
    F, z, y = torch.randn(3, 4, 6)
    sigma = torch.rand(4) + 0.1
    module = EDMLoss(0.25, "sample")
    expected = dbkernels.edm_loss(F, z, y, sigma, sigma_data=0.25, reduction="sample")
    assert torch.equal(module(F, z, y, sigma), expected) and "0.25" in repr(module)


def test_wrong_arguments():
    for make in (AdaLayerNorm, AdaRMSNorm, GatedResidualNorm):
        with pytest.raises(ValueError, match="dim=0 must be at least 1"):
            make(0)
        with pytest.raises(ValueError, match=r"eps=-1\.0 must be zero or positive"):
            make(4, eps=-1.0)
    with pytest.raises(ValueError, match="norm must be"):
        GatedResidualNorm(4, norm="batch")
