"""adamw_ema_step on a GPU, by whichever kernel serves it there: Triton's, the CUDA library's, or the definition."""

import pytest
import torch

import dbkernels
from dbkernels import _pieces
from numerics import EPSILON
from test_adamw_ema import SETTINGS, SHAPES, copies, random_list, state_of
from test_adamw_ema_numbers import equal, flat, numbers, run

pytestmark = pytest.mark.gpu
MANY = [(1000, 333), (7,), (0,), *[(64, 9)] * 300]  # more tensors than one look or launch of a kernel holds
TOGETHER = dict(step=2, weight_decay=0.1, max_norm=1.0, ema_decay=0.9)


def bfloat16_lists(shapes=SHAPES):
    lists = [random_list(shapes, torch.bfloat16, "cuda"), random_list(shapes, torch.bfloat16, "cuda")]
    return [*lists, *state_of(lists[0])]


def unaligned(tensor):
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda tensor: tensor, id="aligned", marks=pytest.mark.smoke),
        pytest.param(unaligned, id="unaligned"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_agrees_with_the_definition(dtype, place):
    params = [place(p) for p in random_list(MANY, dtype, "cuda")]
    lists = [params, [place(g) for g in random_list(MANY, dtype, "cuda")], *state_of(params)]
    lists[2:] = [[place(tensor) for tensor in tensors] for tensors in lists[2:]]
    twin = copies(lists)
    norm = dbkernels.adamw_ema_step(*lists, **TOGETHER, **SETTINGS)
    decay = [0.1] * len(MANY)
    expected = dbkernels.adamw_ema_step_reference(*twin, 2, 1e-2, 0.9, 0.95, 1e-8, decay, 1.0, 0.9)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b in zip(flat(lists[:4]), flat(twin[:4]), strict=True):
        torch.testing.assert_close(a, b, rtol=4 * EPSILON[a.dtype], atol=1e-6)
    # A parameter whose float32 value differs in the last place may round to the other half: its average takes a tenth.
    for a, b, p, q in zip(lists[4], twin[4], params, twin[0], strict=True):
        assert (
            (a - b).abs() <= 4 * EPSILON[a.dtype] * b.abs() + 1e-6 + 0.11 * (p.to(a.dtype) - q.to(a.dtype)).abs()
        ).all()


def test_views_of_flat_buffers_take_the_same_step():
    apart = bfloat16_lists([(2048,), (4096,), (64,), (20_000,)])
    joined = [list(torch.cat(tensors).split([2048, 4096, 64, 20_000])) for tensors in apart]
    for lists in (apart, joined):
        run(lists, numbers(3)[0])
    assert equal(apart, joined)


@pytest.mark.parametrize("step", [1, 3, 100_003])
def test_tensors_give_the_bits_of_numbers(step):
    plain, tensors = numbers(step, "cuda")
    lists = bfloat16_lists()
    twin = copies(lists)
    assert torch.equal(run(lists, plain), run(twin, tensors)) and equal(lists, twin)
    assert tensors["step"] == step + 1


@pytest.mark.smoke
def test_a_captured_step_moves_on():
    """Replayed with new values in its tensors it is the eager step with numbers, bit for bit; a skipped one doesn't
    count."""
    lists = bfloat16_lists()
    twin, tensors = copies(lists), numbers(1, "cuda")[1]
    run(copies(lists), {name: tensor.clone() for name, tensor in tensors.items()})  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = run(lists, tensors)
    run(copies(lists), numbers(9, "cuda")[0])  # another list in between: the graph has a table of its own
    assert tensors["step"] == 1 and equal(lists, twin)
    for step in (1, 2, 3, 4):
        plain, following = numbers(step, "cuda")
        for name, tensor in tensors.items():
            if name != "step":
                tensor.copy_(following[name])
        for skipped in (True, False):
            for grad, same in zip(lists[1], twin[1], strict=True):
                grad.copy_(torch.randn(grad.shape, device="cuda"))
                same.copy_(grad)
            if skipped:
                lists[1][0][0, 0] = float("nan")
                graph.replay()
                assert norm.isnan() and tensors["step"] == step
                assert equal([lists[0], *lists[2:]], [twin[0], *twin[2:]])
                lists[1][0].copy_(twin[1][0])
        graph.replay()
        assert torch.equal(norm, run(twin, plain)) and equal(lists, twin) and tensors["step"] == step + 1


def test_new_gradients_and_other_streams():
    """Addresses that change from step to step, and a step on another stream than the one before."""
    lists = bfloat16_lists()
    twin, kept = copies(lists), []
    stream = torch.cuda.Stream()
    for step in (1, 2, 3, 4):
        kept.append(lists[1])  # so that the next ones lie elsewhere
        lists[1] = random_list(SHAPES, torch.bfloat16, "cuda")
        twin[1] = [grad.clone() for grad in lists[1]]
        run(twin, numbers(step)[0])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if step % 2 else torch.cuda.current_stream()):
            run(lists, numbers(step)[0])
        torch.cuda.synchronize()
    assert equal(lists, twin)


def test_needs_less_memory_than_a_tensor():
    """Kernels take some kilobytes; the definition a few pieces."""
    shapes = [(5, _pieces.PIECE), (3,)]
    params = random_list(shapes, torch.float32, "cuda")
    lists = [params, random_list(shapes, torch.float32, "cuda"), *state_of(params)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dbkernels.adamw_ema_step(*lists, **TOGETHER, **SETTINGS)
    peak = torch.cuda.max_memory_allocated() - before
    kernels = dbkernels.kernels()["adamw_ema_step"]["CUDA"]
    assert peak < (5 * _pieces.PIECE * 4 if "PyTorch" in kernels else 2**20), (kernels, peak)
