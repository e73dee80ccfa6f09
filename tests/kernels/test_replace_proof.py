"""replace swaps what a trial proves and leaves the rest: eps of any name, half precision, other forms of norms."""

import copy

import pytest
import torch
from torch import nn

from dbkernels import replace


class Norm(nn.Module):
    """x·rsqrt(mean x² + eps)·weight with its number under a name of its own."""

    def __init__(self, dim=8, name="eps", eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, dim))
        setattr(self, name, eps)
        self.key = name

    def root(self, x):
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(self, self.key))

    def forward(self, x):
        return x * self.root(x) * self.weight


class PlainRMSNorm(Norm):
    pass


class CastingRMSNorm(Norm):
    def forward(self, hidden_states):
        wide = hidden_states.float()
        return self.weight * (wide * self.root(wide)).to(hidden_states.dtype)


class OutsideRMSNorm(Norm):
    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class ClampedRMSNorm(Norm):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1, eps=self.eps) * x.shape[-1] ** 0.5 * self.weight


class ResidualRMSNorm(Norm):
    def forward(self, x, residual=None):
        return super().forward(x if residual is None else x + residual)


class ManyRMSNorm(Norm):
    def forward(self, *tensors):
        return super().forward(sum(tensors))


class DroppingRMSNorm(Norm):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class DetachedRMSNorm(Norm):
    def forward(self, x):
        return x * self.root(x).detach() * self.weight


class CountingRMSNorm(Norm):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


class ChildRMSNorm(Norm):
    def __init__(self):
        super().__init__()
        self.child = nn.Identity()


class InPlaceRMSNorm(Norm):
    def forward(self, x):
        return x.mul_(self.root(x)).mul_(self.weight)


class TupleRMSNorm(Norm):
    def forward(self, x):
        return super().forward(x), x


class ChannelsRMSNorm(Norm):
    def forward(self, x):
        _, _, _, _ = x.shape
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight.view(1, -1, 1, 1)


class FailingRMSNorm(Norm):
    def forward(self, x):
        raise IndexError("never")


class ShiftedRMSNorm(Norm):
    def forward(self, x):
        return x * self.root(x) * (1 + self.weight)


NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps", "_eps")


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("name", NAMES)
def test_eps_under_any_name(name, eps):
    model = nn.Sequential(nn.RMSNorm(8), PlainRMSNorm(name=name, eps=eps))
    before = copy.deepcopy(model)
    assert [r.name for r in replace(model, "ada_rms_norm")] == ["0", "1"]
    assert getattr(model[1], name) == eps  # for code that reads it
    for size in (1e-6, 1e-3, 1.0, 1e3):
        x = size * torch.randn(64, 8)
        torch.testing.assert_close(model[1](x), before[1](x), rtol=1e-5, atol=1e-6)


OTHERS = (OutsideRMSNorm, ClampedRMSNorm, ResidualRMSNorm, ManyRMSNorm, DroppingRMSNorm, DetachedRMSNorm,
          CountingRMSNorm, ChildRMSNorm, InPlaceRMSNorm, TupleRMSNorm, ChannelsRMSNorm, FailingRMSNorm,
          ShiftedRMSNorm)  # fmt: skip


@pytest.mark.parametrize("norm", OTHERS, ids=lambda norm: norm.__name__)
def test_what_computes_something_else_is_left_and_stops_nothing(norm):
    theirs = norm()
    model = nn.Sequential(PlainRMSNorm(), theirs, nn.RMSNorm(8))
    state = copy.deepcopy(theirs.state_dict())
    assert [r.name for r in replace(model, "ada_rms_norm")] == ["0", "2"]
    assert model[1] is theirs
    torch.testing.assert_close(dict(theirs.state_dict()), dict(state), rtol=0, atol=0)


def test_a_width_that_the_ops_refuse_stops_nothing():
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(20000), nn.RMSNorm(20000), nn.RMSNorm(8))
    assert [r.name for r in replace(model)] == ["0", "3"]


@pytest.mark.parametrize("affine", [True, False])
def test_the_default_eps_follows_the_inputs_dtype(affine):
    model = nn.Sequential(nn.RMSNorm(8, elementwise_affine=affine))
    before = copy.deepcopy(model)
    assert len(replace(model, "ada_rms_norm")) == 1
    for dtype in (torch.float32, torch.float64):
        x = 1e-6 * torch.randn(64, 8, dtype=dtype)
        ours, theirs = model.to(dtype)(x), before.to(dtype)(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_halves_in_float32_norms_come_back_as_before():
    model = nn.Sequential(CastingRMSNorm(), PlainRMSNorm(), nn.LayerNorm(8))
    before = copy.deepcopy(model)
    replace(model)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(64, 8).to(dtype)
        for i, band in ((0, 2e-2), (1, 2e-2), (2, 2e-2)):
            torch.testing.assert_close(model[i](x), before[i](x), rtol=band, atol=band)  # dtypes too


def test_it_is_called_as_the_module_it_stands_for():
    model = nn.Sequential(CastingRMSNorm(), nn.LayerNorm(8))
    before = copy.deepcopy(model)
    replace(model)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model[0](hidden_states=x), before[0](x))
    torch.testing.assert_close(model[1](input=x), before[1](x))
    for call in (lambda: model[0](x, x), lambda: model[0](x=x), lambda: model[1](), lambda: model[1](x, shift=x)):
        with pytest.raises(TypeError, match="takes one tensor"):
            call()
    assert model[1].normalized_shape == (8,)


def test_a_trial_leaves_no_trace():
    torch.manual_seed(3)
    expected = torch.randn(4)
    model = nn.Sequential(PlainRMSNorm().eval(), DroppingRMSNorm())
    torch.manual_seed(3)
    replace(model, "ada_rms_norm")
    assert torch.equal(torch.randn(4), expected)
    assert not model[0].training and model[1].training
    assert all(p.grad is None for p in model.parameters())
