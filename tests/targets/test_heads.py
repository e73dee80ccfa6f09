"""Losses are those of the logits, whatever a head does to make them; a linear map's are never made all at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffusionblocks.convert.conditioning import PlainHead
from diffusionblocks.noise import mask_schedule
from diffusionblocks.targets.base import Features, linear_of
from diffusionblocks.targets.codebook import spread_codebook
from diffusionblocks.targets.masked import MaskedTarget
from diffusionblocks.targets.tokens import TokenTarget

K, DIM = 5, 6


class Promised(nn.Linear):
    is_linear = True

    def features(self, h):
        return h

    def forward(self, h, cond):
        return super().forward(h)


class Inside(nn.Module):
    is_linear = True

    def __init__(self, linear=None):
        super().__init__()
        self.linear = nn.Linear(DIM, K) if linear is None else linear

    def forward(self, h, cond):
        return self.linear(h)


class NotPromised(nn.Linear):
    def forward(self, h, cond):
        return -super().forward(h)


class Capped(Inside):
    def forward(self, h, cond):
        return super().forward(h, cond).tanh()


class Scaled(nn.Linear):
    def forward(self, h):
        return 10 * super().forward(h)


def patched(head):
    plain = head.forward
    head.forward = lambda *arguments: 3 * plain(*arguments)
    return head


def hooked(head):
    head.register_forward_hook(lambda module, arguments, out: 3 * out)
    return head


LINEAR = {
    "promised": lambda: Promised(DIM, K),
    "inside": Inside,
    "wrapped": lambda: PlainHead(nn.Linear(DIM, K, bias=False)),
    "weight norm": lambda: Inside(nn.utils.parametrizations.weight_norm(nn.Linear(DIM, K))),
}
MORE = {
    "not promised": lambda: NotPromised(DIM, K),
    "a forward of its own": Capped,
    "a map with a forward of its own": lambda: Inside(Scaled(DIM, K)),
    "wrapped, with a forward of its own": lambda: PlainHead(Scaled(DIM, K)),
    "a hook": lambda: hooked(Promised(DIM, K)),
    "a hook on the map": lambda: Inside(hooked(nn.Linear(DIM, K))),
    "a hook on what is wrapped": lambda: PlainHead(hooked(nn.Linear(DIM, K))),
    "a replaced forward": lambda: patched(Inside()),
    "a replaced forward of the map": lambda: Inside(patched(nn.Linear(DIM, K))),
    "a hook that makes the weight": lambda: Inside(nn.utils.spectral_norm(nn.Linear(DIM, K))),
    "a sequence": lambda: PlainHead(nn.Sequential(nn.Linear(DIM, K), nn.Tanh())),
}


@pytest.mark.parametrize("kind", [*LINEAR, *MORE])
def test_which_heads_are_a_linear_map(kind):
    assert (linear_of((LINEAR | MORE)[kind]()) is not None) == (kind in LINEAR)


@pytest.mark.parametrize("kind", [*LINEAR, *MORE])
def test_tokens(kind):
    head, y, h = (LINEAR | MORE)[kind](), torch.randint(K, (3, 7)), 3 * torch.randn(3, 7, DIM)
    head(h, None)  # a hook that makes the weight does so anew in each call of training
    target, features = TokenTarget(spread_codebook(K, 4)), Features(head.eval(), h, None)
    sigma = torch.rand(target.level_shape(y)) + 0.3
    noised = target.add_noise(y, sigma, seed=1, offset=2)
    logits = target.read(features, noised.z, sigma).raw
    found = target.loss(features, noised, y, sigma).per_sample.mean()
    torch.testing.assert_close(found, functional.cross_entropy(logits.flatten(0, 1), y.flatten()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*LINEAR, *MORE])
def test_masks(kind):
    """At t = 1 all places are masked, and a token's loss has the weight of t there, over the length."""
    head, y, h = (LINEAR | MORE)[kind](), torch.randint(K, (3, 7)), 3 * torch.randn(3, 7, DIM)
    head(h, None)
    target, features, t = MaskedTarget(K), Features(head.eval(), h, None), torch.ones(3)
    noised = target.add_noise(y, t, seed=1, offset=2)
    entropy = functional.cross_entropy(head(h, None).transpose(1, 2), y, reduction="none") * (noised.z == K)
    expected = mask_schedule.weight(t) * entropy.mean(1)
    torch.testing.assert_close(target.loss(features, noised, y, t).per_sample, expected, rtol=1e-4, atol=1e-5)
