"""denoising_cross_entropy inside PyTorch: compile, torch.library's checks, autocast, empty input, what it refuses."""

import sys

import pytest
import torch

from dbkernels import denoising_cross_entropy
from test_denoising_cross_entropy import example


@pytest.mark.kernels
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_and_once(reduction, compile_counter):
    def step(h, weight, target):
        return denoising_cross_entropy(h * 2, weight, target, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, backend=compile_counter)
    for _ in range(3):
        target, _, leaves = example()
        given = [leaves[name].requires_grad_() for name in ("h", "weight")]
        ours = torch.autograd.grad(compiled(*given, target), given)
        assert all(
            torch.equal(a, b) for a, b in zip(ours, torch.autograd.grad(step(*given, target), given), strict=True)
        )
    assert compile_counter.frame_count == 1


@pytest.mark.kernels
def test_opcheck():
    target, _, leaves = example((9,))
    none = [None] * 8
    op = torch.ops.dbkernels.denoising_cross_entropy.default
    wants = [True, True, False, False, False, False]
    torch.library.opcheck(
        op, (leaves["h"], leaves["weight"], *none, False, None, target.clamp(min=-1), torch.ones(9), wants)
    )
    rows = torch.ops.dbkernels.cross_entropy_rows.default
    marks = torch.tensor([1, -1, 0, 6])
    torch.library.opcheck(rows, (torch.randn(4, 7), marks, torch.ones(4), torch.empty(4, 7)))
    columns = torch.ops.dbkernels.cross_entropy_columns.default
    torch.library.opcheck(
        columns, (torch.randn(4, 3), marks, torch.randn(4, 1), torch.rand(4), torch.ones(4), 2, torch.empty(4, 3))
    )


@pytest.mark.kernels
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_second_derivative(reduction):
    """Refused, whatever the upstream gradient hangs on: a constant one would let a penalty pass without a gradient."""
    target, _, leaves = example()
    h = leaves["h"].requires_grad_()
    loss = denoising_cross_entropy(h, leaves["weight"], target, reduction=reduction)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, h, torch.ones_like(loss), create_graph=True)


@pytest.mark.kernels
def test_no_gradients_are_found_under_no_grad(monkeypatch):
    target, _, leaves = example()
    given = [leaves[name].requires_grad_() for name in ("h", "weight")]
    expected = denoising_cross_entropy(*given, target)
    seen = []
    monkeypatch.setattr(
        sys.modules["dbkernels.denoising_cross_entropy"],
        "_call",
        lambda head, target, factor, wants: seen.append((factor, any(wants))) or (torch.zeros(45), {}),
    )
    with torch.no_grad():
        assert not denoising_cross_entropy(*given, target).requires_grad
    assert seen == [(None, False)] and expected.requires_grad


@pytest.mark.kernels
@pytest.mark.parametrize("bad", [5, -2, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_a_target_that_is_no_word_shows(reduction, bad):
    """No check of values is compiled, so the loss and the gradients are NaN."""
    torch._dynamo.reset()
    h, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    compiled = torch.compile(denoising_cross_entropy, backend="aot_eager")
    loss = compiled(h, weight, torch.tensor([0, bad, -100, 1]), reduction=reduction)
    found = torch.autograd.grad(loss.sum(), (h, weight))
    assert loss.isnan().any() and found[0][1].isnan().all() and found[1].isnan().all()
    if reduction == "none":
        assert loss.isnan().tolist() == [False, True, False, False]
        assert found[0][[0, 2, 3]].isfinite().all()


def test_on_the_meta_device():
    h, weight = torch.randn(4, 3, device="meta", requires_grad=True), torch.randn(5, 3, device="meta")
    loss = denoising_cross_entropy(h, weight, torch.zeros(4, dtype=torch.int64, device="meta"))
    assert loss.shape == () and torch.autograd.grad(loss, h)[0].shape == h.shape


@pytest.mark.kernels
def test_autocast():
    target, _, leaves = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = denoising_cross_entropy(leaves["h"], leaves["weight"], target)
    assert torch.equal(loss, denoising_cross_entropy(leaves["h"].bfloat16(), leaves["weight"].bfloat16(), target))


def test_empty_and_all_ignored():
    weight = torch.randn(5, 3, requires_grad=True)
    empty = denoising_cross_entropy(torch.zeros(0, 3), weight, torch.zeros(0).long(), reduction="sum")
    assert empty == 0 and torch.autograd.grad(empty, weight)[0].abs().sum() == 0
    ignored = torch.full((4,), -100)
    assert denoising_cross_entropy(torch.randn(4, 3), weight, ignored, reduction="sum") == 0
    assert denoising_cross_entropy(torch.randn(4, 3), weight, ignored).isnan()


@pytest.mark.parametrize("rows", [(0,), (2, 0), (4,)])
@pytest.mark.parametrize("reference", [False, True])
def test_the_mean_of_nothing_is_nan_and_its_gradient_0(rows, reference, monkeypatch):
    """As torch.nn.functional.cross_entropy's, whether there are no rows or all are ignored."""
    if reference:
        monkeypatch.setattr(sys.modules["dbkernels.denoising_cross_entropy"], "as_defined", lambda: True)
    h, weight = torch.randn(*rows, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = denoising_cross_entropy(h, weight, torch.full(rows, -100))
    assert loss.isnan()
    if not reference:
        assert all(grad.abs().sum() == 0 for grad in torch.autograd.grad(loss, (h, weight)))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(reduction="avg"), ValueError, "reduction='avg'"),
        (dict(h=torch.zeros(4, 3).long()), TypeError, "h must be"),
        (dict(weight=torch.zeros(5, 4)), ValueError, r"weight must be \(V, d\)"),
        (dict(weight=torch.zeros(5, 3).half()), ValueError, "weight is"),
        (dict(target=torch.zeros(4)), TypeError, "target must be an int64"),
        (dict(target=torch.zeros(3).long()), ValueError, "target has shape"),
        (dict(target=torch.tensor([0, 1, 2, 5])), ValueError, r"target 5 is outside \[0, 5\)"),
        (dict(z=torch.zeros(4, 3)), ValueError, "z and c_skip go together"),
        (dict(z=torch.zeros(4, 3), c_skip=torch.zeros(3)), ValueError, "c_skip must be a float or have shape"),
        (dict(bias=torch.zeros(4)), ValueError, "bias must have shape"),
        (dict(logit_scale=torch.zeros(1)), ValueError, "logit_scale must have shape"),
        (dict(softcap=0.0), ValueError, "softcap=0.0"),
        (dict(posterior=(torch.zeros(4, 2), torch.zeros(4, 2), 1.0)), ValueError, "posterior's z"),
        (dict(row_weight=torch.zeros(4, requires_grad=True)), ValueError, "row_weight requires a gradient"),
    ],
)
def test_errors_name_the_argument(changes, error, words):
    given = dict(h=torch.zeros(4, 3), weight=torch.zeros(5, 3), target=torch.zeros(4).long()) | changes
    with pytest.raises(error, match=words):
        denoising_cross_entropy(**given)


def test_the_transforms_of_torch_func_run_the_definition():
    h, weight = torch.randn(3, 5, 8), torch.randn(7, 8)
    target = torch.tensor([[0, 3, 6, -100, 1]]).expand(3, 5)

    def loss(h, target):
        return denoising_cross_entropy(h, weight, target)

    grads = torch.func.vmap(torch.func.grad(loss))(h, target)
    for one, rows, words in zip(grads, h, target, strict=True):
        leaf = rows.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, words), leaf)
        torch.testing.assert_close(one, expected)
    _, slope = torch.func.jvp(lambda h: loss(h, target[0]), (h[0],), (torch.ones_like(h[0]),))
    torch.testing.assert_close(slope, grads[0].sum())
