"""adamw_ema_step: numbers as tensors, step counts of skipped updates, and what the definition needs of memory."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import dbkernels
from dbkernels import _adamw_ema_definition as definition
from dbkernels import _pieces
from test_adamw_ema import SETTINGS, SHAPES, copies, random_list, state_of

SEED = 2**63 + 11


def flat(lists):
    return [tensor for tensors in lists for tensor in tensors]


def equal(lists, others):
    return all(torch.equal(a, b) for a, b in zip(flat(lists), flat(others), strict=True))


def numbers(step, device="cpu", **changes):
    """The five numbers as Python's and as tensors."""
    plain = dict(step=step, lr=1.1e-3 / step, ema_decay=0.9, seed=SEED, offset=2**32 - 1 - step % 1000) | changes
    signed = plain | {"seed": plain["seed"] - 2**64}
    wide = {"lr": torch.float64, "ema_decay": torch.float64}
    return plain, {n: torch.tensor(v, dtype=wide.get(n, torch.int64), device=device) for n, v in signed.items()}


def run(lists, given, function=dbkernels.adamw_ema_step):
    options = dict(betas=(0.9, 0.95), max_norm=1.0, weight_decay=0.1, stochastic_rounding=True)
    return function(*lists, **options, **given)


@pytest.mark.parametrize("step", [1, 2, 3, 1000, 2**40 + 12345])
def test_tensors_give_the_bits_of_numbers(step):
    plain, tensors = numbers(step)
    lists = [random_list(SHAPES, torch.bfloat16), random_list(SHAPES, torch.bfloat16)]
    lists += state_of(lists[0])
    twin = copies(lists)
    assert torch.equal(run(lists, plain), run(twin, tensors)) and equal(lists, twin)
    assert tensors["step"] == step + 1 and tensors["step"].dtype == torch.int64


@pytest.mark.parametrize("name", ["step", "lr", "ema_decay", "seed", "offset"])
def test_each_number_alone_may_be_a_tensor(name):
    plain, tensors = numbers(7)
    lists = [random_list(SHAPES, torch.bfloat16), random_list(SHAPES, torch.bfloat16)]
    lists += state_of(lists[0])
    twin, kept = copies(lists), tensors[name].clone()
    assert torch.equal(run(lists, plain), run(twin, plain | {name: tensors[name]})) and equal(lists, twin)
    assert tensors[name] == kept + (name == "step")


def by_definition(lists, step, lr, ema_decay, seed, offset):
    """What a GPU without kernels runs: tensors stay tensors."""
    seed = seed if isinstance(seed, torch.Tensor) else seed - 2**64
    return dbkernels.adamw_ema_step_reference(
        *lists, step, lr, 0.9, 0.95, 1e-8, [0.1] * len(lists[0]), 1.0, ema_decay, [], True, seed, offset
    )


@pytest.mark.parametrize("step", [1, 2, 1000, 2**40 + 12345])
def test_the_definition_gives_the_bits_of_numbers_without_reading_them(step):
    plain, tensors = numbers(step)
    lists = [random_list(SHAPES, torch.bfloat16), random_list(SHAPES, torch.bfloat16)]
    lists += state_of(lists[0])
    twin = copies(lists)
    norm = by_definition(lists, **plain)
    item, torch.Tensor.item = torch.Tensor.item, None
    try:
        assert_norm = by_definition(twin, **tensors)
    finally:
        torch.Tensor.item = item
    assert torch.equal(norm, assert_norm) and equal(lists, twin) and tensors["step"] == step + 1


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("exponent", [1, 2, 3, 10, 1001, 10**6])
def test_power_is_exact_to_its_roundings_and_alike_in_both_forms(base, exponent):
    ours = definition.power(base, exponent)
    assert definition.power(base, torch.tensor(exponent)).item() == ours
    # Each squaring doubles the relative error of what it squares: 2^-53 times the exponent, at most.
    assert math.isclose(ours, base**exponent, rel_tol=2.0**-52 * exponent, abs_tol=1e-320)


@pytest.mark.parametrize("form", [dbkernels.adamw_ema_step, "definition"])
def test_a_skipped_update_does_not_count(form):
    """After two skipped steps the third is the first: Adam's first step moves by lr exactly."""
    params, step = [torch.zeros(4)], torch.tensor(1)
    lists = [params, [torch.tensor([1.0, float("inf"), 1.0, 1.0])], *state_of(params)]
    for grads in (lists[1], lists[1], [torch.ones(4)]):
        lists[1] = grads
        if form == "definition":
            dbkernels.adamw_ema_step_reference(*lists, step, 0.1, 0.9, 0.999, 0.0, [0.0], 1.0, 0.99)
        else:
            form(*lists, step=step, lr=0.1, eps=0.0, max_norm=1.0, ema_decay=0.99)
    assert step == 2
    torch.testing.assert_close(params[0], torch.full((4,), -0.1))
    torch.testing.assert_close(lists[4][0], torch.full((4,), -0.001))


@pytest.mark.kernels
def test_compiles_once_over_changing_tensors(compile_counter):
    lists = [random_list(SHAPES, torch.bfloat16), random_list(SHAPES, torch.bfloat16)]
    lists += state_of(lists[0])
    twin = copies(lists)
    given = numbers(1)[1]
    compiled = torch.compile(lambda lists, given: run(lists, given), fullgraph=True, backend=compile_counter)
    for step in range(1, 6):
        plain, tensors = numbers(step)
        assert given["step"] == step  # advanced by the step before
        for name, tensor in given.items():
            if name != "step":
                tensor.copy_(tensors[name])
        assert torch.equal(compiled(lists, given), run(twin, plain)) and equal(lists, twin)
        if step == 1:
            first = compile_counter.frame_count
    assert compile_counter.frame_count == first


def test_opcheck():
    params = random_list([(4, 3), (5,)], torch.bfloat16)
    lists = [params, random_list([(4, 3), (5,)], torch.bfloat16), *state_of(params)]
    plain = (1, 0.0, 0.9, 0.99, 1e-8, [0.1, 0.0], 1.0, 1.0, [], True, 0, 0, torch.tensor(7.0))
    for given in (tuple(numbers(3)[1].values()), (torch.tensor(2), None, None, None, None)):
        torch.library.opcheck(torch.ops.dbkernels.adamw_ema_step.capturable, (*lists, *plain, *given))


def test_versions_advance():
    step, params = torch.tensor(1), random_list([(3,)])
    lists = [params, random_list([(3,)]), *state_of(params)[:2], None]
    versions = step._version, params[0]._version
    dbkernels.adamw_ema_step(*lists, step=step, **SETTINGS)
    assert step._version > versions[0] and params[0]._version > versions[1]


@pytest.mark.parametrize(
    "changes,error,words",
    [
        (dict(step=torch.tensor(1.0)), TypeError, "step must be torch.int64"),
        (dict(step=torch.tensor([1])), ValueError, r"step has shape \(1,\)"),
        (dict(step=torch.tensor(0)), ValueError, "step=0 must be 1 or more"),
        (dict(step=torch.tensor(1, device="meta")), ValueError, "step is on meta"),
        (dict(lr=torch.tensor(0.1)), TypeError, "lr must be torch.float64"),
        (dict(lr=torch.tensor(-0.1).double()), ValueError, "lr=-0.1"),
        (dict(emas=[torch.ones(3)], ema_decay=torch.tensor(1.5).double()), ValueError, "ema_decay=1.5"),
        (dict(seed=torch.tensor(1)), ValueError, "seed and stochastic_rounding"),
        (dict(offset=torch.tensor(1).int()), TypeError, "offset must be torch.int64"),
        (dict(offset=torch.tensor(2**32)), ValueError, "offset=4294967296"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, error, words):
    one = [torch.ones(3)]
    given = dict(params=one, grads=one, exp_avgs=one, exp_avg_sqs=one, emas=None, step=1, lr=0.1)
    with pytest.raises(error, match=words):
        dbkernels.adamw_ema_step(**{**given, **changes})


def peak_bytes(call):
    """The most memory that was allocated at one time beyond what was at the start, by the profiler's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("masters", [False, True])
def test_the_definition_needs_no_more_than_a_tensor(dtype, masters):
    """Four pieces in the state's dtype, whatever the list's length and the tensors' sizes."""
    if masters and dtype not in (torch.float16, torch.bfloat16):
        return
    count = 5 * _pieces.PIECE
    params = [torch.zeros(count, dtype=dtype) for _ in range(2)]
    lists = [params, [torch.ones_like(p) for p in params], *state_of(params)]
    copies_of = [p.float() for p in params] if masters else []
    peak = peak_bytes(
        lambda: dbkernels.adamw_ema_step_reference(*lists, 1, 0.1, 0.9, 0.95, 1e-8, [0.1, 0.0], 1.0, 0.9, copies_of)
    )
    state = lists[2][0]
    assert _pieces.PIECE * state.element_size() < peak < state.numel() * state.element_size(), peak


def test_pieces_do_not_change_the_bits(monkeypatch):
    """Also of roundings by chance, whose draws go by the element's place."""
    shapes, outcomes = [(100, 33), (7,), (5000,)], []
    start = [random_list(shapes, torch.bfloat16), random_list(shapes, torch.bfloat16)]
    start += state_of(start[0])
    for piece in (2**20, 64, 1024):
        monkeypatch.setattr(_pieces, "PIECE", piece)
        lists = copies(start)
        outcomes.append([by_definition(lists, **numbers(3)[0]), *flat(lists)])
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
