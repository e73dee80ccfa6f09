"""Run by test_noise_host.py on a fake GPU: launches and functions of each op that draws noise and of edm_loss."""

import importlib

import torch

import fake_gpu

NAMES = "_edm_loss", "_inject_noise", "edm_loss", "philox"
gpu = fake_gpu.activate(*(importlib.import_module(f"dbkernels.{name}") for name in NAMES))
from dbkernels import _address, edm_loss, inject_noise, philox_normal, philox_uniform  # noqa: E402

_address.readable = lambda tensor: False  # as on a GPU: an address in a tensor stays there
torch.set_num_threads(1)
SHAPE, S = (8, 4, 16), 0.5
F, y, z, upstream = torch.randn(4, *SHAPE)
sigma, table, indices = torch.rand(8) + 0.1, torch.randn(5, 16), torch.randint(5, (8, 4))
F_leaf, y_leaf, table_leaf = (t.clone().requires_grad_() for t in (F, y, table))
offset = torch.tensor(3)


def drawn_loss(**options):
    return edm_loss(F_leaf, None, y, sigma, sigma_data=S, seed=1, offset=3, **options)


def loss(F=F, **options):
    return edm_loss(F, z, y, sigma, sigma_data=S, **options)


# The call, its launches, and the most Python functions it may enter, a fifth above what it does: the dispatcher, an
# autograd function where no gradient is needed or the checks of a kind that has a plan would be more.
CASES = {
    "inject_noise": (lambda: inject_noise(y, sigma, seed=1, offset=3), 1, 35),
    "inject_noise, offset read": (lambda: inject_noise(y, sigma, seed=1, offset=offset), 1, 38),
    "inject_noise, a number": (lambda: inject_noise(y, 0.5, seed=1), 1, 36),
    "inject_noise forward, backward": (
        lambda: inject_noise(y_leaf, sigma, sigma_data=S, seed=1).backward(upstream), 2, 115,
    ),
    "inject_noise of a table": (lambda: inject_noise((indices, table), sigma, seed=1), 1, 36),
    "philox_normal": (lambda: philox_normal(SHAPE, seed=1), 1, 35),
    "philox_uniform": (lambda: philox_uniform(SHAPE, seed=1), 1, 38),
    "edm_loss": (loss, 2, 71),
    "edm_loss forward, backward": (lambda: loss(F_leaf).backward(), 3, 137),
    "edm_loss of samples, mean, backward": (lambda: loss(F_leaf, reduction="sample").mean().backward(), 2, 130),
    "edm_loss of elements, mean, backward": (lambda: loss(F_leaf, reduction="none").mean().backward(), 2, 130),
    "edm_loss, z drawn again, backward": (lambda: drawn_loss().backward(), 3, 139),
}  # fmt: skip


def host_side():
    """Check that later calls launch what they need, and enter few functions."""
    for name, (call, launches, most) in CASES.items():
        call(), gpu.launches(), call()
        found = gpu.launches(), fake_gpu.entered(call)
        assert found[0] == launches and found[1] <= most, f"{name}: launches, functions: {found}"


def unlike_inputs_are_checked():
    """Check that a kind of input that passed the checks doesn't admit another."""
    for call in (
        lambda: inject_noise(y.long(), sigma, seed=1),
        lambda: inject_noise(y, sigma[:3], seed=1),
        lambda: inject_noise(y, -1.0, seed=1),
        lambda: philox_normal(3, seed=-1),
        lambda: inject_noise(y, sigma, seed=-1),
        lambda: inject_noise(y, sigma, seed=1, offset=torch.tensor([3])),
        lambda: inject_noise(y, sigma, seed=1.0),
        lambda: inject_noise((indices, table[:, 0]), sigma, seed=1),
        lambda: loss(F, reduction="most"),
        lambda: loss(F[:, :1]),
        lambda: loss(F.long()),
        lambda: edm_loss(F, z, y, 0, sigma_data=S),
        lambda: edm_loss(F, z, y, sigma.clone().requires_grad_(), sigma_data=S),
        lambda: loss(F, seed=1),
        lambda: loss(F, weight=float("inf")),
    ):
        try:
            call()
        except (TypeError, ValueError):
            continue
        raise AssertionError("a bad argument was accepted")


def a_gradient_that_is_expected_takes_no_pass():
    """Check that backward is one launch, which reads the factors, and returns the memory that forward saved."""
    for options in (dict(), dict(reduction="sample"), dict(reduction="none"), dict(weight=0.25)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            value = loss(F_leaf, **options).mean()
        gpu.launches()
        (grad,) = torch.autograd.grad(value, F_leaf)
        assert gpu.launches() == 1 and gpu.grid() in ((1, 1, 1), (1, 8, 1)), options
        assert grad.data_ptr() in [kept.data_ptr() for kept in saved], options


def other_inputs_run():
    """Run half types, levels that need no cast and strides that need a copy."""
    half, levels = y.bfloat16(), sigma.double()
    for _ in range(2):
        inject_noise(half, levels, seed=1)
        inject_noise(half.transpose(0, 2), 0.5, sigma_data=S, seed=1, rounds=7)
        inject_noise((indices.int(), table.half()), levels.view(8, 1), normalize=True, seed=1, offset=offset)
        loss(half.requires_grad_(), weight=0.5).backward()
        edm_loss(F, None, y, levels, sigma_data=S, seed=offset, offset=offset, rounds=7)
        edm_loss(F[:0], z[:0], y[:0], 0.5, sigma_data=S)
        inject_noise(y[:0], 0.5, seed=1)
        half = half.detach()


host_side()
unlike_inputs_are_checked()
a_gradient_that_is_expected_takes_no_pass()
other_inputs_run()
print("faked: ok")
