"""mask_tokens by address, and the loss of the masked places alone."""

import pytest
import torch
import torch.nn.functional as functional

from dbkernels import mask_tokens, masked_cross_entropy
from dbkernels.masked_cross_entropy import _of_all


def test_masks_have_the_share_that_alpha_leaves_and_nothing_else_changes():
    tokens = torch.randint(100, (4, 5000))
    alpha = torch.tensor([0.0, 0.25, 0.7, 1.0])
    noised, masked = mask_tokens(tokens, alpha, 100, seed=5, offset=2)
    assert torch.equal(noised, torch.where(masked, 100, tokens)) and noised.dtype == tokens.dtype
    share = masked.float().mean(1)
    assert share[0] == 1 and share[3] == 0
    assert ((share - (1 - alpha)).abs() < 4 * (0.25 / 5000) ** 0.5).all()
    again, elsewhere = (mask_tokens(tokens, alpha, 100, seed=5, offset=o)[1] for o in (2, 3))
    assert torch.equal(masked, again) and not torch.equal(masked, elsewhere)
    assert torch.equal(mask_tokens(tokens, 0.25, 100, seed=5, offset=2)[1][1], masked[1])
    assert mask_tokens(tokens.int(), 0.5, 100, seed=1)[0].dtype == torch.int32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False])
def test_against_the_dense_loss(reduction, weighted):
    h, weight, bias = torch.randn(3, 40, 16), torch.randn(20, 16), torch.randn(20)
    target, masked = torch.randint(20, (3, 40)), torch.rand(3, 40) < 0.4
    row_weight = torch.rand(3, 40) if weighted else None
    leaves = [t.double().requires_grad_() for t in (h, weight, bias)]
    ours = masked_cross_entropy(
        leaves[0], leaves[1], target, masked, bias=leaves[2], row_weight=row_weight, reduction=reduction
    )
    plain = functional.cross_entropy((leaves[0] @ leaves[1].T + leaves[2]).transpose(1, 2), target, reduction="none")
    plain = plain * masked * (1 if row_weight is None else row_weight)
    plain = plain if reduction == "none" else plain.sum() / (masked.sum() if reduction == "mean" else 1)
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn(plain.shape, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(loss, leaves, upstream) for loss in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_that_are_not_masked_never_meet_the_head():
    h = torch.randn(2, 10, 4)
    h[~(masked := torch.rand(2, 10) < 0.5)] = torch.nan
    assert masked_cross_entropy(h, torch.randn(6, 4), torch.zeros(2, 10).long(), masked).isfinite()
    nothing = torch.zeros(2, 10, dtype=torch.bool)
    assert masked_cross_entropy(h, torch.randn(6, 4), torch.zeros(2, 10).long(), nothing, reduction="sum") == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("more", [{}, dict(ignore_index=3)])
def test_all_rows_give_the_same(reduction, more):
    """The way without a wait, which a CUDA graph can capture; h isn't finite where not masked."""
    weight, target, masked = torch.randn(6, 4), torch.randint(6, (2, 10)), torch.rand(2, 10) < 0.5
    row_weight, results = torch.rand(2, 10), []
    for op in (
        masked_cross_entropy,
        lambda *given, row_weight, reduction, **head: _of_all(*given, row_weight, reduction, head),
    ):
        leaves = [torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(1)), weight.clone()]
        leaves[0][~masked] = torch.inf
        leaves = [leaf.requires_grad_() for leaf in leaves]
        loss = op(*leaves, target, masked, row_weight=row_weight, reduction=reduction, **more)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_captured(dtype):
    """Two replays of one graph: the losses and gradients of the eager way for other inputs in the same place."""
    h, weight = torch.randn(2, 40, 16, device="cuda").to(dtype), torch.randn(20, 16, device="cuda").to(dtype)
    leaves = [h.requires_grad_(), weight.requires_grad_()]
    target, masked = torch.randint(20, (2, 40), device="cuda"), torch.rand(2, 40, device="cuda") < 0.5

    def step():
        loss = masked_cross_entropy(*leaves, target, masked)
        return loss, *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _of_all(*leaves, target, masked, None, "mean", {}).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        masked.copy_(torch.rand(2, 40, device="cuda") < 0.5)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            # The same sums over other rows: a half's product may round once more.
            unit = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-17
            assert (a - b).abs().max() <= unit * b.abs().max()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mask_tokens(torch.zeros(2, 3), 0.5, 9, seed=0), TypeError, "tokens must be int64"),
        (lambda: mask_tokens(torch.zeros(3).long(), 0.5, 9, seed=0), ValueError, r"tokens must be \(B, N\)"),
        (lambda: mask_tokens(torch.zeros(2, 3).long(), 1.5, 9, seed=0), ValueError, "alpha=1.5"),
        (lambda: mask_tokens(torch.zeros(2, 3).long(), "x", 9, seed=0), TypeError, "alpha must be a float"),
        (lambda: mask_tokens(torch.zeros(2, 3).long(), torch.zeros(3), 9, seed=0), ValueError, "alpha must have shape"),
        (lambda: masked_cross_entropy(*example(masked=torch.zeros(2, 3))), TypeError, "masked must be a bool"),
        (lambda: masked_cross_entropy(*example(masked=torch.zeros(2, 4).bool())), ValueError, "masked has shape"),
        (lambda: masked_cross_entropy(*example(h=torch.zeros(2, 4, 5))), ValueError, "h has shape"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


def example(h=None, masked=None):
    h = torch.zeros(2, 3, 5) if h is None else h
    return h, torch.zeros(7, 5), torch.zeros(2, 3).long(), torch.zeros(2, 3).bool() if masked is None else masked
