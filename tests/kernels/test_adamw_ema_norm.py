"""adamw_ema_step by a given norm: that of several lists together, which clips and holds back all of them."""

import pytest
import torch

import dbkernels
from numerics import EPSILON
from test_adamw_ema import SETTINGS, SHAPES, assert_compiled_alike, by_hand, copies, random_list, state_of
from test_adamw_ema_numbers import equal, flat, numbers
from test_adamw_ema_numbers import run as stochastic_run

OTHER = [(30, 20), (7,), (9000,)]
COMMON = dict(step=2, ema_decay=0.9, weight_decay=0.1, **SETTINGS)


def part(shapes, dtype=torch.float32, device="cpu"):
    """params, grads, exp_avgs, exp_avg_sqs, emas"""
    params = random_list(shapes, dtype, device)
    return [params, random_list(shapes, dtype, device), *state_of(params)]


def by_norm(parts, max_norm, step=dbkernels.adamw_ema_step, **options):
    norm = dbkernels.total_norm([grad for lists in parts for grad in lists[1]])
    for lists in parts:
        wide = lists[2][0].dtype
        result = step(*lists, max_norm=max_norm, norm=norm.to(wide), **COMMON, **options)
        assert torch.equal(result, norm.to(wide)) and result.data_ptr() != norm.data_ptr()
    return norm


def by_torch(parts, max_norm, norm):
    """Scale all gradients by torch, in a pass of its own, then the op without clipping."""
    leaves = [torch.nn.Parameter(p.clone()) for lists in parts for p in lists[0]]
    for leaf, grad in zip(leaves, [g for lists in parts for g in lists[1]], strict=True):
        leaf.grad = grad.clone()
    torch.nn.utils.clip_grads_with_norm_(leaves, max_norm, norm)
    scaled = iter([leaf.grad for leaf in leaves])
    for lists in parts:
        grads = [next(scaled) for _ in lists[1]]
        dbkernels.adamw_ema_step(lists[0], grads, *lists[2:], **COMMON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [1.0, 0.7, 1 / 3, 1e6])
def test_two_parts_are_torchs_clipping_bit_for_bit(dtype, max_norm):
    parts = [part(SHAPES, dtype), part(OTHER, dtype)]
    twins = [copies(lists) for lists in parts]
    norm = by_norm(parts, max_norm)
    by_torch(twins, max_norm, norm)
    for lists, twin in zip(parts, twins, strict=True):
        assert equal([lists[0], *lists[2:]], [twin[0], *twin[2:]])
    assert norm > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_scaled_in_float32(dtype):
    """torch rounds scaled gradients to their dtype; inside the op they aren't rounded, so it is nearer to the exact."""
    parts = [part(SHAPES, dtype), part(OTHER)]
    twins, start = [copies(lists) for lists in parts], copies(parts[0])
    norm = by_norm(parts, 0.7)
    by_torch(twins, 0.7, norm)
    factor = torch.clamp(0.7 / (norm.double() + 1e-6), max=1.0)
    for ours, theirs, old, grad in zip(parts[0][2], twins[0][2], start[2], start[1], strict=True):
        wanted = 0.9 * old.double() + 0.1 * grad.double() * factor
        assert ((ours - wanted).abs() <= 4 * EPSILON[torch.float32] * wanted.abs()).all()
        assert ((theirs - wanted).abs() <= EPSILON[dtype] * wanted.abs() + 2.0**-26).all()  # and float16's subnormals
    assert equal(parts[1], twins[1])


@pytest.mark.parametrize("form", [dbkernels.adamw_ema_step, "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_against_float64(dtype, form):
    """By a joint norm of 3 and max_norm 0.5, gradients are a sixth of themselves, whatever their own norm."""
    lists = part(SHAPES, dtype)
    own = torch.stack([g.double().square().sum() for g in lists[1]]).sum().sqrt().item()
    exact = by_hand(*lists, 2, 0.1, own / 6, 0.9)
    norm = torch.tensor(3.0, dtype=lists[2][0].dtype)
    if form == "reference":
        decay = [0.1] * len(SHAPES)
        dbkernels.adamw_ema_step_reference(*lists, 2, 1e-2, 0.9, 0.95, 1e-8, decay, 0.5, 0.9, norm=norm)
    else:
        form(*lists, max_norm=0.5, norm=norm, **COMMON)
    for (p, m, v, _), *ours in zip(exact, lists[0], lists[2], lists[3], strict=True):
        assert ((ours[0].double() - p).abs() <= EPSILON[dtype] * p.abs() + 2e-6).all()
        for value, wanted in ((ours[1], m), (ours[2], v)):  # by_hand adds 1e-6 to another norm: 3e-7 of the factor
            assert ((value.double() - wanted).abs() <= 2e-6 * (wanted.abs() + 1e-4)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_value_in_one_part_holds_back_both(value, bad):
    parts, step = [part(SHAPES, torch.bfloat16), part(OTHER)], torch.tensor(4)
    parts[bad][1][2].view(-1)[1] = value
    before = [copies(lists) for lists in parts]
    norm = dbkernels.total_norm(parts[0][1] + parts[1][1])
    for lists in parts:
        dbkernels.adamw_ema_step(*lists, **COMMON | dict(step=step), max_norm=1.0, norm=norm)
    assert not norm.isfinite() and step == 4
    for lists, old in zip(parts, before, strict=True):
        assert equal([lists[0], *lists[2:]], [old[0], *old[2:]])


def test_gradients_are_not_asked():
    """The norm alone decides: a NaN under a finite one goes through to its own element and no other."""
    lists = part([(5,)])
    lists[1][0][3] = float("nan")
    dbkernels.adamw_ema_step(*lists, norm=torch.tensor(1.0), **COMMON)
    assert torch.equal(lists[0][0].isnan(), torch.arange(5) == 3)


def test_own_norm_given_is_the_one_call_form():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        lists = part(SHAPES, dtype)
        twin = copies(lists)
        by_norm([lists], 0.7)
        dbkernels.adamw_ema_step(*twin, max_norm=0.7, **COMMON)
        assert equal(lists, twin)


def test_tensors_give_the_bits_of_numbers():
    plain, tensors = numbers(3)
    lists = part(SHAPES, torch.bfloat16)
    twin, norm = copies(lists), torch.tensor(55.0)
    assert torch.equal(stochastic_run(lists, plain | dict(norm=norm)), norm)
    assert torch.equal(stochastic_run(twin, tensors | dict(norm=norm)), norm)
    assert equal(lists, twin) and tensors["step"] == 4


def test_compiles_whole():
    def step(first, second):
        norm = dbkernels.total_norm([*first[1], *second[1]])
        for lists in (first, second):
            dbkernels.adamw_ema_step(*lists, max_norm=0.7, norm=norm, **COMMON)
        return norm

    parts = [part(SHAPES), part(OTHER)]
    twins = [copies(lists) for lists in parts]
    norm = torch.compile(step, fullgraph=True, backend="aot_eager")(*parts)
    assert torch.equal(norm, step(*twins))
    for lists, twin in zip(parts, twins, strict=True):
        assert_compiled_alike(lists, twin)


@pytest.mark.parametrize("form", ["numbers", "tensor"])
@pytest.mark.parametrize(
    "norm,error,words",
    [
        (2.0, TypeError, "norm must be a tensor, got float: pass the result of dbkernels.total_norm"),
        (torch.tensor(2.0).double(), TypeError, r"norm must be torch.float32 .* pass norm.to\(torch.float32\)"),
        (torch.tensor(2), TypeError, "norm must be torch.float32 .* got torch.int64"),
        (torch.tensor([2.0]), ValueError, r"norm has shape \(1,\)"),
        (torch.tensor(2.0, device="meta"), ValueError, "norm is on meta"),
    ],
)
def test_errors_name_the_norm(norm, error, words, form):
    lists = part([(3,)])
    before, step = copies(lists), 2 if form == "numbers" else torch.tensor(2)
    with pytest.raises(error, match=words):
        dbkernels.adamw_ema_step(*lists, norm=norm, **COMMON | dict(step=step))
    assert equal(lists, before)


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gpu_agrees_with_the_cpu_and_holds_back_both(dtype):
    """To some roundings: of the two devices' fused products, and of the norm where sums of float64 differ."""
    parts = [part(SHAPES, dtype), part(OTHER)]
    there = [[[x.cuda() for x in tensors] for tensors in lists] for lists in parts]
    by_norm(parts, 0.7)
    by_norm(there, 0.7)
    for lists, others in zip(parts, there, strict=True):
        for a, b in zip(flat(lists[2:4]), flat(others[2:4]), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=8 * EPSILON[torch.float32], atol=1e-6)
        for a, b in zip(lists[0], others[0], strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=EPSILON[a.dtype] + 8 * EPSILON[torch.float32], atol=1e-6)
    there[1][1][0][2, 3] = float("nan")
    before = [copies(lists) for lists in there]
    assert by_norm(there, 0.7).isnan()
    for lists, old in zip(there, before, strict=True):
        assert equal([lists[0], *lists[2:]], [old[0], *old[2:]])
