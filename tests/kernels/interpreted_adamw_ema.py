"""Run by test_adamw_ema_triton.py with TRITON_INTERPRET=1: the kernels on the CPU, against the definition."""

import itertools

import torch

from dbkernels import adamw_ema_step_reference
from dbkernels.triton import adamw_ema_list
from dbkernels.triton.adamw_ema import GRAD, PARAM
from dbkernels.triton.adamw_ema_list import Plan, plan_for, rows_of, step
from dbkernels.triton.total_norm import BLOCK, CHUNK, NUMEL, START
from numerics import EPSILON, thinned

SEED, OFFSET = 2**63 + 5, 2**32 - 1
SIGNED = SEED - 2**64
# Odd sizes, none, one, a whole block, a chunk and more; 280 are more than the kernels look at together.
SHAPES = [(7, 3), (0,), (1,), (), (BLOCK,), (CHUNK + 5,)]
MANY = [(i % 30 if i % 5 == 0 else 0,) for i in range(280)]  # a program for each that isn't empty
WAYS = {
    "nearest": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "masters": (torch.float16, torch.bfloat16),
    "stochastic": (torch.bfloat16,),
}


def lists_of(shapes, dtype, way, averaged=True, moments=None):
    """params, grads, exp_avgs, exp_avg_sqs, emas, masters"""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    dtypes = moments or wide, moments or wide, wide
    state = [[torch.rand(shape).to(of) for shape in shapes] for of in dtypes]
    masters = [p.float() for p in params] if way == "masters" else []
    grads = [torch.randn(shape).to(dtype) for shape in shapes]
    return [params, grads, *state[:2], state[2] if averaged else [], masters]


def copies(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def equal(lists, others):
    return all(torch.equal(a, b) for a, b in zip(itertools.chain(*lists), itertools.chain(*others), strict=True))


def call(
    function, lists, decays, way, *, number=3, lr=2.0**-7, max_norm=1.0, norm=None, ema=0.875, seed=SIGNED,
    offset=OFFSET,
):  # fmt: skip
    """The interpreter takes Python floats for float32: these lose nothing by it."""
    return function(
        *lists[:5], number, lr, 0.875, 0.9375, 2.0**-27, decays, max_norm, ema if lists[4] else None, lists[5],
        way == "stochastic", seed, offset, norm,
    )  # fmt: skip


def assert_close(ours, theirs, dtype, case):
    """Some roundings of the state's dtype. The interpreter's bfloat16 is cut, not rounded: a unit, of which an average
    takes an eighth; a rounding by chance falls the other way where its float32 value differs."""
    for i, tensors in enumerate(ours):
        for a, b, param in zip(tensors, theirs[i], theirs[0], strict=False):  # emas and masters may be none
            error, size = (a.double() - b.double()).abs(), b.double().abs()
            drawn = i in (2, 3) and a.dtype == torch.bfloat16
            allowed = 2.0**-7 * size if drawn else 4 * EPSILON[a.dtype] * (size + 0.1)
            assert not drawn or (a != b).sum() <= 1 + a.numel() // 500, (case, i)
            if i == 4:
                allowed = allowed + EPSILON[dtype] / 8 * param.double().abs()
            assert (error <= allowed).all(), (case, i, error.max())


def every_kind():
    """Any two of dtype, averages, a largest norm and the moments' dtype come together; all four needn't."""
    kinds = [(way, dtype) for way, dtypes in WAYS.items() for dtype in dtypes]
    for index, ((way, dtype), averaged) in thinned(enumerate(itertools.product(kinds, (True, False)))):
        max_norm, moments = (1.0 if averaged else None), (torch.bfloat16 if (index // 2 + index) % 2 else None)
        if dtype == torch.float64:
            moments = None
        lists = lists_of(SHAPES, dtype, way, averaged, moments)
        decays = [0.1 * (i % 2) for i in range(len(SHAPES))]
        twin = copies(lists)
        norm = call(step, lists, decays, way, max_norm=max_norm)
        expected = call(adamw_ema_step_reference, twin, decays, way, max_norm=max_norm)
        case = way, dtype, averaged, max_norm, moments
        assert norm.dtype == expected.dtype and norm.dim() == 0
        # A sum of 9,000 squares, which float64 doesn't round away.
        assert abs(norm - expected) <= 16 * EPSILON[norm.dtype] * expected, case
        assert_close(lists, twin, dtype, case)


def stochastic_bits():
    """Where float32 agrees to the bit, so do the roundings: a step that decay alone makes, of exact values."""
    lists = lists_of([(5,), (2 * BLOCK + 3,), (9,)], torch.bfloat16, "stochastic")
    for tensors in lists[1:4]:
        for tensor in tensors:
            tensor.zero_()
    twin = copies(lists)
    for f, x in ((step, lists), (adamw_ema_step_reference, twin)):
        call(f, x, [0.5] * 3, "stochastic", lr=2.0**-9)
    assert all(torch.equal(a, b) for a, b in zip(lists[0], twin[0], strict=True))


def moment_bits():
    """The definition's bits where float32 loses nothing: moments and gradients of few digits, which round by chance."""
    for way, dtype in (("nearest", torch.float32), ("masters", torch.bfloat16), ("stochastic", torch.bfloat16)):
        lists = lists_of([(5,), (CHUNK + 3,), (9,)], dtype, way, moments=torch.bfloat16)
        for tensor in itertools.chain(*lists[1:4]):
            tensor.copy_(torch.randint(0, 128, tensor.shape) / 64)
        twin, before = copies(lists), copies(lists)
        for f, x in ((step, lists), (adamw_ema_step_reference, twin)):
            call(f, x, [0.5] * 3, way, lr=2.0**-9, max_norm=None)
        assert equal(lists[2:4], twin[2:4]), way
        for i, weight in ((2, 0.125), (3, 0.0625)):  # some up and some down
            grads = [g.float() ** (i - 1) for g in lists[1]]
            exact = torch.cat([m.float().lerp(g, weight) for m, g in zip(before[i], grads, strict=True)])
            above = torch.cat(lists[i]).float() > exact
            assert 0.2 < above.float().mean() < 0.6, (way, i, above.float().mean())


def unaligned():
    kinds = (
        ("nearest", torch.float32, None),
        ("masters", torch.bfloat16, None),
        ("nearest", torch.float32, torch.bfloat16),
    )
    for way, dtype, moments in kinds:
        shapes = [(BLOCK + 9,), (CHUNK + 1,)]
        start = lists_of(shapes, dtype, way, moments=moments)
        lists = [[torch.cat([t.new_zeros(1), t])[1:] for t in tensors] for tensors in start]
        twin = copies(lists)
        for f, x in ((step, lists), (adamw_ema_step_reference, twin)):
            call(f, x, [0.1, 0.0], way)
        assert_close(lists, twin, dtype, way)


def many():
    lists = lists_of(MANY, torch.float32, "nearest")
    decays = [0.1 * (i % 2) for i in range(len(MANY))]
    twin = copies(lists)
    for f, x in ((step, lists), (adamw_ema_step_reference, twin)):
        call(f, x, decays, "nearest")
    assert_close(lists, twin, torch.float32, "many")


def nothing():
    lists = lists_of([(0,), (3, 0)], torch.float32, "nearest")
    assert call(step, lists, [0.0, 0.0], "nearest") == 0


def skipped():
    values = float("inf"), float("nan"), -float("inf")
    for index, (value, way) in thinned(enumerate(itertools.product(values, WAYS))):
        moments = torch.bfloat16 if index % 2 else None
        lists = lists_of(SHAPES, torch.bfloat16, way, moments=moments)
        lists[1][5][CHUNK + 1] = value
        lists[3][0][0, 0] = float("inf")  # state that arithmetic by zero would turn into NaN
        before, number = copies(lists), torch.tensor(3)
        norm = call(step, lists, [0.1] * len(SHAPES), way, number=number)
        assert not norm.isfinite() and number == 3
        for a, b in zip(itertools.chain(*lists), itertools.chain(*before), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), (value, way)


def given_norm():
    """The definition's update by the norm that is given, whatever the gradients' own, and none if it isn't finite."""
    for way, dtypes in WAYS.items():
        for index, dtype in enumerate(dtypes):
            max_norm = None if index % 2 else 0.75
            lists = lists_of(SHAPES, dtype, way, moments=torch.bfloat16 if dtype == torch.float16 else None)
            norm = torch.tensor(3.0, dtype=lists[4][0].dtype)
            twin = copies(lists)
            for f, x in ((step, lists), (adamw_ema_step_reference, twin)):
                result = call(f, x, [0.1] * len(SHAPES), way, max_norm=max_norm, norm=norm)
                assert torch.equal(result, norm) and result.data_ptr() != norm.data_ptr()
            assert_close(lists, twin, dtype, (way, dtype, max_norm))
    for value in (float("inf"), float("nan")):
        lists, number = lists_of(SHAPES, torch.bfloat16, "masters"), torch.tensor(3)
        before = copies(lists)
        norm = call(step, lists, [0.1] * len(SHAPES), "masters", number=number, norm=torch.tensor(value))
        assert not norm.isfinite() and number == 3 and equal(lists, before)


def tensors_for_numbers():
    """The same bits as Python numbers, and the step advanced; numbers that take many products too."""
    lr, ema = 9 * 2.0**-13, 1 - 2.0**-9
    for number in (1, 2, 3, 1000, 123457):
        moments = torch.bfloat16 if number % 2 else None
        lists = lists_of([(BLOCK,), (5,)], torch.bfloat16, "stochastic", moments=moments)
        twin = copies(lists)
        call(step, lists, [0.1, 0.0], "stochastic", number=number, lr=lr, ema=ema)
        counter = torch.tensor(number)
        numbers = dict(lr=torch.tensor(lr, dtype=torch.float64), ema=torch.tensor(ema, dtype=torch.float64))
        numbers |= dict(number=counter, seed=torch.tensor(SIGNED), offset=torch.tensor(OFFSET))
        call(step, twin, [0.1, 0.0], "stochastic", **numbers)
        assert counter == number + 1
        assert equal(lists, twin), number


def flat():
    """Views that lie behind each other in every list are one tensor to the kernels, and the result is the same."""
    sizes = [40, BLOCK, 8, CHUNK]
    dtypes = dict(nearest=torch.float32, stochastic=torch.bfloat16, masters=torch.float16)
    for (way, dtype), moments in zip(dtypes.items(), (torch.bfloat16, None, torch.bfloat16), strict=True):
        apart = lists_of([(size,) for size in sizes], dtype, way, moments=moments)
        joined = [list(torch.cat(tensors).split(sizes)) if tensors else [] for tensors in apart]
        assert len(rows_of(joined, [0.1] * 4, True)) == 1
        assert [row[0] for row in rows_of(joined, [0.1, 0.1, 0.0, 0.0], False)] == [40 + BLOCK, 8 + CHUNK]
        for lists in (apart, joined):
            call(step, lists, [0.1] * 4, way)
        assert equal(apart, joined), way
    odd = [list(torch.randn(20).split([5, 15])) for _ in range(6)]
    assert len(rows_of(odd, [0.0, 0.0], False)) == 1 and len(rows_of(odd, [0.0, 0.0], True)) == 2
    assert len(rows_of([odd[0], odd[1], odd[2], odd[3], odd[4], odd[5][::-1]], [0.0] * 2, False)) == 2


def tables():
    """The table has each tensor's addresses, and a plan serves the lists it was made for and no others."""
    lists = lists_of([(3, 4), (CHUNK + 1,), (5,)], torch.float32, "nearest")
    plan = Plan(lists, [0.1, 0.0, 0.2], False)
    table = plan.table.view(10, 3).tolist()
    assert table[START.value] == [0, 1, 3] and table[NUMEL.value] == [12, CHUNK + 1, 5] and plan.chunks == 4
    for field, tensors in ((PARAM, lists[0]), (GRAD, lists[1])):
        assert table[field.value] == [tensor.data_ptr() for tensor in tensors]
    calls = []

    def found(lists, decay=0.1, stochastic=False):
        return plan_for(lists, decay, stochastic, lambda: calls.append(1) or [decay] * 3)

    first = found(lists)
    assert found(lists) is first and len(calls) == 1
    odd = [list(torch.zeros(20, dtype=of).split([5, 15])) for of in (torch.float32,) * 2 + (torch.bfloat16,) * 2]
    assert Plan([*odd, [], []], [0.0] * 2, False).tensors == 2, "the second's random words begin anew"
    assert found(lists, 0.2) is not first and found(lists, stochastic=True) is not first and len(calls) == 3
    for changed in (lists[1][0].view(4, 3), lists[1][0].view(torch.int32), lists[1][0].clone()):
        assert found([lists[0], [changed, *lists[1][1:]], *lists[2:]]) is not first
    assert found([[lists[0][0].view(4, 3).t(), *lists[0][1:]], *lists[1:]]) is None
    assert len(calls) <= 6
    adamw_ema_list._plans.clear()


torch.manual_seed(0)
every_kind()
stochastic_bits()
moment_bits()
unaligned()
many()
nothing()
skipped()
given_norm()
tensors_for_numbers()
flat()
tables()
print("interpreted: ok")
