"""What only a GPU can show of the modulated norms: the path past the dispatcher, launches, graphs, devices."""

import sys

import pytest
import torch

import dbkernels
from dbkernels import _norm_plans
from test_gated_residual_norm import example as gated_example

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPS = {
    "ada_layer_norm": lambda x, branch, gate, shift, scale, weight, bias: (
        dbkernels.ada_layer_norm(x, shift, scale, weight=weight, bias=bias),
    ),
    "ada_rms_norm": lambda x, branch, gate, shift, scale, weight, bias: (
        dbkernels.ada_rms_norm(x, shift, scale, weight=weight),
    ),
    "gated_residual_norm": lambda x, branch, gate, shift, scale, weight, bias: dbkernels.gated_residual_norm(
        x, branch, gate, shift, scale, weight=weight, bias=bias
    ),
}


def example(name, shape, dtype, device="cuda", affine=False):
    """Leaves, with None for what the op doesn't take."""
    leaves = [None if t is None else t.to(device).requires_grad_() for t in gated_example(shape, dtype, affine=affine)]
    if name != "gated_residual_norm":
        leaves[1] = leaves[2] = None
    if name == "ada_rms_norm":
        leaves[6] = None
    return leaves


def run(name, leaves, upstream):
    """Outputs and gradients of all that is given."""
    outs = OPS[name](*leaves)
    found = torch.autograd.grad(outs, [t for t in leaves if t is not None], upstream[: len(outs)])
    return [*(out.detach() for out in outs), *found]


@pytest.mark.smoke
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 70, 384), (2, 300, 1024)])
def test_both_paths_agree_bit_for_bit(monkeypatch, name, dtype, shape):
    """Past the dispatcher (which a plan shows) and through the op, whose kernels and order of sums are the same."""
    leaves = example(name, shape, dtype)
    upstream = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2)]
    past = run(name, leaves, upstream)
    assert any(_norm_plans._plans().values())
    for module in ("dbkernels.ada_norm", "dbkernels.gated_residual_norm"):
        monkeypatch.setattr(sys.modules[module], "direct", lambda *tensors: False)
    for a, b in zip(past, run(name, leaves, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_weight_and_bias_on_both_paths(monkeypatch, name, dtype):
    """Sums over samples: in another order past the dispatcher, so a few roundings apart."""
    leaves = example(name, (4, 70, 384), dtype, affine=True)
    upstream = [torch.randn(4, 70, 384, device="cuda", dtype=dtype) for _ in range(2)]
    past = run(name, leaves, upstream)
    for module in ("dbkernels.ada_norm", "dbkernels.gated_residual_norm"):
        monkeypatch.setattr(sys.modules[module], "direct", lambda *tensors: False)
    slack = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-18  # one rounding of the result, or some of sums of 280 rows
    for a, b in zip(past, run(name, leaves, upstream), strict=True):
        assert (a - b).abs().max() <= slack * b.abs().max()


@pytest.mark.parametrize("name", OPS)
def test_launches(name):
    """One forward, two backward: the sums of a sample take several programs here."""
    leaves = example(name, (4, 512, 384), torch.bfloat16)
    upstream = [torch.randn(4, 512, 384, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    run(name, leaves, upstream)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(name, leaves, upstream)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(kernels) == ["add_partial_kernel", "backward_kernel", "forward_kernel"]


@pytest.mark.parametrize("name", OPS)
def test_in_a_cuda_graph(name):
    """Captured and replayed with other values, forward and backward."""
    shape = (4, 70, 384)
    leaves = example(name, shape, torch.bfloat16, affine=True)
    upstream = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(name, leaves, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run(name, leaves, upstream)
    with torch.no_grad():
        for tensor in (*leaves, *upstream):
            if tensor is not None:
                tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for a, b in zip(held, run(name, leaves, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("name", OPS)
def test_on_a_device_that_is_not_current(name):
    leaves = example(name, (4, 70, 384), torch.float32, "cuda:1")
    upstream = [torch.randn(4, 70, 384, device="cuda:1") for _ in range(2)]
    assert torch.cuda.current_device() == 0
    elsewhere = run(name, leaves, upstream)
    here = [None if t is None else t.detach().to("cuda:0").requires_grad_() for t in leaves]
    for a, b in zip(elsewhere, run(name, here, [t.to("cuda:0") for t in upstream]), strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("name", OPS)
def test_compiled(name):
    """By Inductor, with gradients; its own operations around the op round differently."""
    leaves = example(name, (4, 70, 384), torch.float32)
    upstream = [torch.randn(4, 70, 384, device="cuda") for _ in range(2)]
    expected = run(name, leaves, upstream)
    outs = torch.compile(OPS[name], fullgraph=True)(*leaves)
    found = torch.autograd.grad(outs, [t for t in leaves if t is not None], upstream[: len(outs)])
    for a, b in zip((*outs, *found), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
