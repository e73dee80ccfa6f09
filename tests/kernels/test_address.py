"""(seed, offset) as ints and as 0-dim tensors: the same bits, compiled and captured too; Philox with seven rounds."""

import math
import sys

import pytest
import torch

import dbkernels
from dbkernels import edm_loss, inject_noise, philox
from dbkernels.philox import normal_reference
from numerics import ulps

S = 0.5
SEED = 2**64 - 3  # -3 as a signed int


def example(device, *, grad):
    generator = torch.Generator().manual_seed(7)
    y, F = torch.randn(2, 6, 5, 8, generator=generator).to(device)
    table, indices = torch.randn(9, 8, generator=generator).to(device), torch.arange(30, device=device).view(6, 5) % 9
    sigma = torch.rand(6, generator=generator).to(device) + 0.1
    return [t.requires_grad_(grad) for t in (y, F, table, sigma)], indices


def graded(z, *leaves):
    return [z.detach(), *torch.autograd.grad(z.square().sum(), leaves)]


def dense(seed, offset, device, rounds=10):
    (y, _, _, sigma), _ = example(device, grad=True)
    return graded(inject_noise(y, sigma, sigma_data=S, seed=seed, offset=offset, rounds=rounds), y, sigma)


def rows(seed, offset, device, rounds=10):
    (_, _, table, sigma), indices = example(device, grad=True)
    z = inject_noise((indices, table), sigma, sigma_data=S, normalize=True, seed=seed, offset=offset, rounds=rounds)
    return graded(z, table, sigma)


def loss(seed, offset, device, rounds=10):
    (y, F, _, sigma), _ = example(device, grad=True)
    source = dict(sigma_data=S, reduction="sample", seed=seed, offset=offset, rounds=rounds)
    return graded(edm_loss(F, None, y, sigma.detach(), **source), F, y)


def normal(seed, offset, device, rounds=10):
    return [dbkernels.philox_normal((3, 7), seed=seed, offset=offset, device=device, rounds=rounds)]


def uniform(seed, offset, device):
    return [dbkernels.philox_uniform((3, 7), seed=seed, offset=offset, device=device)]


ROUNDED = [dense, rows, loss, normal]
DRAWS = [*ROUNDED, uniform]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tensors_are_the_ints_that_they_hold(draw, dtype):
    seed, offset = torch.tensor(-3, dtype=dtype), torch.tensor(5, dtype=dtype)
    seed_word = SEED  # either dtype: a negative number's bits go on to the left
    expected = draw(seed_word, 5, "cpu")
    for given in ((seed, offset), (seed, 5), (seed_word, offset)):
        assert same(draw(*given, "cpu"), expected)
    assert not same(draw(seed, offset + 1, "cpu")[:1], expected[:1])
    assert not same(draw(seed + 1, offset, "cpu")[:1], expected[:1])


@pytest.mark.parametrize("draw", ROUNDED)
@pytest.mark.parametrize("rounds", [10, 7])
def test_the_definition_takes_both_forms(draw, rounds, monkeypatch):
    """As an op on a device without a kernel runs it, tensors and all."""
    for name in ("_inject_noise", "edm_loss"):
        monkeypatch.setattr(sys.modules[f"dbkernels.{name}"], "as_defined", lambda: True)
    monkeypatch.setattr("dbkernels._address.readable", lambda tensor: False)
    expected = draw(SEED, 5, "cpu", rounds)
    assert same(draw(torch.tensor(-3), torch.tensor(5), "cpu", rounds), expected)
    monkeypatch.undo()
    for ours, theirs in zip(draw(torch.tensor(-3), torch.tensor(5), "cpu", rounds), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draw", ROUNDED)
def test_seven_rounds_are_other_noise(draw):
    ten, seven = draw(SEED, 5, "cpu", 10)[0], draw(SEED, 5, "cpu", 7)[0]
    assert not torch.isclose(ten, seven).all()


@pytest.mark.parametrize("draw", DRAWS)
def test_compiles_whole_and_once_over_changing_addresses(draw, compile_counter):
    plain = {dense: _dense_plain, rows: _rows_plain, loss: _loss_plain}.get(draw, draw)
    compiled = torch.compile(lambda seed, offset: plain(seed, offset, "cpu"), fullgraph=True, backend=compile_counter)
    for step in range(4):
        ours = compiled(torch.tensor(-3), torch.tensor(step))
        assert same(ours, plain(SEED, step, "cpu"))
    assert compile_counter.frame_count == 1


def _dense_plain(seed, offset, device):
    (y, _, _, sigma), _ = example_plain
    return [inject_noise(y, sigma, sigma_data=S, seed=seed, offset=offset)]


def _rows_plain(seed, offset, device):
    (_, _, table, sigma), indices = example_plain
    return [inject_noise((indices, table), sigma, seed=seed, offset=offset)]


def _loss_plain(seed, offset, device):
    (y, F, _, sigma), _ = example_plain
    return [edm_loss(F, None, y, sigma, sigma_data=S, weight=0.25, seed=seed, offset=offset)]


example_plain = example("cpu", grad=False)


@pytest.mark.parametrize("scaled", [None, S])
def test_compiled_gradients(scaled):
    """Of the overloads that take tensors: with them the eager ones, bit for bit."""
    torch._dynamo.reset()
    (y, F, table, sigma), indices = example("cpu", grad=True)

    def step(seed, offset):
        z = inject_noise(y, sigma, sigma_data=scaled, seed=seed, offset=offset)
        rows = inject_noise((indices, table), sigma, sigma_data=scaled, seed=seed, offset=offset)
        drawn = edm_loss(F, None, y, sigma.detach(), sigma_data=S, reduction="sample", seed=seed, offset=offset)
        return (z + rows).square().sum() + drawn.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(run(torch.tensor(-3), torch.tensor(2)), (y, F, table, sigma)) for run in (compiled, step)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_tensor_changed_before_its_gradient_is_noticed():
    """The gradient of sigma draws the noise again: it must not draw another."""
    (y, _, _, sigma), _ = example("cpu", grad=True)
    offset = torch.tensor(5)
    op = torch.ops.dbkernels.inject_noise.at
    z = op(y, sigma, None, None, offset, 1, 0, 10)
    offset += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize(
    "changes,error,words",
    [
        (dict(seed=torch.tensor([1])), ValueError, r"seed has shape \(1,\)"),
        (dict(seed=torch.tensor(1.0)), TypeError, "seed must be an int or a tensor of integers"),
        (dict(seed=torch.tensor(True)), TypeError, "seed must be an int or a tensor of integers"),
        (dict(offset=torch.tensor(1, device="meta")), ValueError, "offset is on meta"),
        (dict(offset=torch.tensor(2**32)), ValueError, "offset=4294967296 is outside"),
        (dict(offset=torch.tensor(-1)), ValueError, "offset=-1 is outside"),
        (dict(offset=[1]), TypeError, "offset must be a Python int"),
    ],
)
@pytest.mark.parametrize("draw", DRAWS)
def test_bad_tensors_are_refused(draw, changes, error, words):
    with pytest.raises(error, match=words):
        draw(**{"seed": 1, "offset": 1, "device": "cpu", **changes})


@pytest.mark.parametrize("rounds", [6, 8, 20, "10", None])
def test_other_rounds_are_refused(rounds):
    for draw in ROUNDED:
        with pytest.raises(ValueError, match=r"rounds=.* must be 10 or 7"):
            draw(1, 1, "cpu", rounds)


# Random123's known-answer vectors for philox4x32-7: counter, key, result.
SEVEN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize("counter,key,result", SEVEN)
def test_known_answers_of_seven_rounds(counter, key, result):
    assert tuple(int(word) for word in philox.philox_4x32(counter, key, 7)) == result


def test_seven_rounds_are_normal():
    """Kolmogorov-Smirnov's 99.9 % point, and no correlation between neighbours or steps (five standard errors)."""
    n = 200_000
    x = dbkernels.philox_normal(n, seed=3, rounds=7).double()
    u = torch.special.ndtr(x).sort().values
    steps = torch.arange(n, dtype=torch.float64) / n
    assert torch.maximum((u - steps).abs().max(), (steps + 1 / n - u).abs().max()) < 1.95 / math.sqrt(n)
    for other in (x.roll(1), x.roll(4), dbkernels.philox_normal(n, seed=3, offset=1, rounds=7)):
        assert abs((x * other).mean()) < 5 / math.sqrt(n)


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("draw", DRAWS)
def test_gpu_a_captured_graph_moves_on(draw):
    """Each replay draws by what the tensors hold by then: what ints give, bit for bit."""
    seed, offset = torch.tensor(-3, device="cuda"), torch.tensor(5, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        draw(seed, offset, "cuda")  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = draw(seed, offset, "cuda")
    for word, step in ((-3, 5), (-3, 6), (2**40 + 7, 2**32 - 1)):
        seed.fill_(word), offset.fill_(step)
        graph.replay()
        assert same(ours, draw(word % 2**64, step, "cuda"))


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("rounds", [10, 7])
def test_gpu_normals_are_the_definitions(rounds):
    """2 ulp, as on the CPU: the polynomials are written as fused multiply-adds, and no other product that
    rounds meets a sum, which the compiler would fuse."""
    draw = dbkernels.philox_normal(1_000_003, seed=SEED, offset=9, rounds=rounds, device="cuda").cpu()
    assert ulps(draw, normal_reference((1_000_003,), seed=SEED, offset=9, rounds=rounds)).max() <= 2
