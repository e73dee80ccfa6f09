"""adamw_ema_step: against torch.optim.AdamW(fused=True), against float64, skipping, layouts, torch.library's
checks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from numerics import EPSILON, ulps

SHAPES = [(48, 32), (48,), (17, 5), (1,), (100, 3, 3), (20000,)]
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


def state_of(params):
    wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    zeros = [torch.zeros_like(p, dtype=wide) for p in params]
    return zeros, [torch.zeros_like(z) for z in zeros], [p.detach().to(wide, copy=True) for p in params]


def random_list(shapes, dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def copies(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def torch_steps(params, gradients, clip, ema_decay, weight_decay, **options):
    """The same by torch: clipping by `clip(grads)` factors, fused AdamW, lerp."""
    leaves = [torch.nn.Parameter(p.clone()) for p in params]
    emas = [p.clone() for p in params]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(leaves, weight_decay, strict=True)]
    optimizer = torch.optim.AdamW(groups, fused=True, **options)
    for grads in gradients:
        factor = clip(grads)
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad * factor
        optimizer.step()
        for ema, leaf in zip(emas, leaves, strict=True):
            ema.lerp_(leaf.detach(), 1 - ema_decay)
    return [leaf.detach() for leaf in leaves], emas


def exact_factor(max_norm):
    """clip_grad_norm_'s factor from a norm summed in float64, as ours is; float32 arithmetic from there
    on."""

    def factor(grads):
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().float()
        return torch.clamp(max_norm / (norm + 1e-6), max=1.0)

    return factor


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize("decays", ["one", "each"])
def test_equals_torch_fused_to_the_last_bits(max_norm, decays):
    params = random_list(SHAPES)
    decay = [0.1] * len(SHAPES) if decays == "one" else [0.1, 0.0, 0.2, 0.0, 0.1, 0.3]
    gradients = [random_list(SHAPES) for _ in range(6)]
    factor = (lambda grads: 1.0) if max_norm is None else exact_factor(max_norm)
    expected, expected_emas = torch_steps(params, gradients, factor, 0.99, decay, **SETTINGS)
    ours = copies([params])[0]
    exp_avgs, exp_avg_sqs, emas = state_of(ours)
    for step, grads in enumerate(gradients, start=1):
        norm = dbkernels.adamw_ema_step(
            ours, grads, exp_avgs, exp_avg_sqs, emas, step=step, ema_decay=0.99, max_norm=max_norm,
            weight_decay=0.1 if decays == "one" else decay, **SETTINGS,
        )  # fmt: skip
        exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        assert norm.item() == pytest.approx(exact, rel=2 * EPSILON[torch.float32])
    compiled = dbkernels.compiled() is not None
    for a, b in zip(ours + emas, expected + expected_emas, strict=True):
        # With FMA both round alike, but torch's loop over the last elements of a tensor doesn't fuse: an ulp
        # of the second moment there, which may move a few updates of size lr by an ulp of themselves each
        # step.
        slack = 6 * EPSILON[torch.float32] * (SETTINGS["lr"] + b.abs())
        assert ((a - b).abs() <= slack).all()
        if compiled and a.numel() % 8 == 0 and max_norm is None:
            assert ulps(a, b).float().mean() < 0.01


def test_agrees_with_clip_grad_norm():
    """torch sums a float32 norm in float32, so its factor is off by up to about 1e-5 of itself where ours
    isn't."""
    params, gradients = random_list(SHAPES), [random_list(SHAPES) for _ in range(3)]

    def factor(grads):
        leaves = [torch.nn.Parameter(g.clone()) for g in grads]
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        return torch.clamp(1.0 / (norm + 1e-6), max=1.0)

    expected, _ = torch_steps(params, gradients, factor, 0.9, [0.0] * len(SHAPES), **SETTINGS)
    exp_avgs, exp_avg_sqs, emas = state_of(params)
    for step, grads in enumerate(gradients, start=1):
        dbkernels.adamw_ema_step(
            params, grads, exp_avgs, exp_avg_sqs, emas, step=step, ema_decay=0.9, max_norm=1.0, **SETTINGS
        )
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * SETTINGS["lr"])


def by_hand(params, grads, exp_avgs, exp_avg_sqs, emas, step, decay, max_norm, ema_decay):
    """One step in float64, from the paper's lines."""
    grads = [g.double() for g in grads]
    norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    factor = min(1.0, max_norm / (norm + 1e-6))
    (beta1, beta2), lr, eps = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["eps"]
    results = []
    for p, g, m, v, e in zip(params, grads, exp_avgs, exp_avg_sqs, emas, strict=True):
        g = g * factor
        m = beta1 * m.double() + (1 - beta1) * g
        v = beta2 * v.double() + (1 - beta2) * g * g
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p = p.double() * (1 - lr * decay) - lr * update
        results.append((p, m, v, ema_decay * e.double() + (1 - ema_decay) * p))
    return results


@pytest.mark.parametrize("run", [dbkernels.adamw_ema_step, "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_against_float64(dtype, run):
    params, grads = random_list(SHAPES, dtype), random_list(SHAPES, dtype)
    exp_avgs, exp_avg_sqs, emas = state_of(params)
    expected = by_hand(params, grads, exp_avgs, exp_avg_sqs, emas, 3, 0.1, 0.5, 0.9)
    if run == "reference":
        lists = params, grads, exp_avgs, exp_avg_sqs, emas
        decay = [0.1] * len(params)
        dbkernels.adamw_ema_step_reference(*lists, 3, 1e-2, 0.9, 0.95, 1e-8, decay, 0.5, 0.9)
    else:
        run(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            emas,
            step=3,
            weight_decay=0.1,
            max_norm=0.5,
            ema_decay=0.9,
            **SETTINGS,
        )
    wide = EPSILON[exp_avgs[0].dtype]
    state_slack = 64 if dtype == torch.float64 else 8  # the norm's sum of 24,000 squares is float64 itself
    for (p, m, v, e), *ours in zip(expected, params, exp_avgs, exp_avg_sqs, emas, strict=True):
        # The state: a handful of roundings of its dtype. The parameter: its own rounding; the EMA averages it
        # as stored.
        assert ((ours[0].double() - p).abs() <= EPSILON[dtype] * p.abs() + 8 * wide).all()
        for value, exact in ((ours[1], m), (ours[2], v)):
            assert ((value.double() - exact).abs() <= state_slack * wide * (exact.abs() + 1e-4)).all()
        assert ((ours[3].double() - e).abs() <= 0.1 * EPSILON[dtype] * p.abs() + 8 * wide * (1 + e.abs())).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_skips_when_the_norm_is_not_finite(value):
    lists = [random_list(SHAPES), random_list(SHAPES), *state_of(random_list(SHAPES))]
    lists[1][4].view(-1)[77] = value
    before = copies(lists)
    norm = dbkernels.adamw_ema_step(*lists, step=1, max_norm=1.0, ema_decay=0.9, **SETTINGS)
    assert not torch.isfinite(norm)
    for old, new in zip(before, lists, strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_float32_norm_does_not_overflow_where_it_fits():
    """Squares of 1e25 overflow float32; the sum is float64, so the norm is right and the step is taken."""
    params, grads = [torch.ones(8)], [torch.full((8,), 1e25)]
    norm = dbkernels.adamw_ema_step(params, grads, *state_of(params)[:2], None, step=1, max_norm=1.0, **SETTINGS)
    assert norm.item() == pytest.approx(1e25 * math.sqrt(8), rel=1e-6)
    assert torch.isfinite(params[0]).all() and (params[0] < 1).all()


def test_gradients_stay_and_versions_advance():
    params = [p.requires_grad_() for p in random_list([(4, 4)])]
    grads, kept = random_list([(4, 4)]), None
    kept = grads[0].clone()
    loss = (params[0] * params[0]).sum()
    exp_avgs, exp_avg_sqs, _ = state_of(params)
    dbkernels.adamw_ema_step(params, grads, exp_avgs, exp_avg_sqs, None, step=1, max_norm=0.1, **SETTINGS)
    assert torch.equal(grads[0], kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strided_tensors():
    shape = (6, 5)
    flat = [random_list([shape]), random_list([shape]), *state_of(random_list([shape]))]
    strided = [[t.t().contiguous().t() for t in tensors] for tensors in flat]
    for lists in (flat, strided):
        dbkernels.adamw_ema_step(*lists, step=2, max_norm=1.0, ema_decay=0.9, **SETTINGS)
    for a, b in zip(flat, strided, strict=True):
        assert not b[0].is_contiguous()
        torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-7)  # the norm adds in another order


@given(st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_shapes_agree_with_the_definition(shapes, with_ema):
    params, grads = random_list(shapes), random_list(shapes)
    lists = [params, grads, *state_of(params)]
    twin = copies(lists)
    if not with_ema:
        lists[4], twin[4] = None, []
    decay = 0.9 if with_ema else None
    norm = dbkernels.adamw_ema_step(*lists, step=1, weight_decay=0.1, max_norm=1.0, ema_decay=decay, **SETTINGS)
    expected = dbkernels.adamw_ema_step_reference(*twin, 1, 1e-2, 0.9, 0.95, 1e-8, [0.1] * len(shapes), 1.0, decay)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b in zip(sum((part or [] for part in lists), []), sum(twin, []), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_repeats_bit_for_bit_whatever_the_threads():
    lists = [random_list(SHAPES), random_list(SHAPES), *state_of(random_list(SHAPES))]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            run = copies(lists)
            norm = dbkernels.adamw_ema_step(*run, step=1, max_norm=1.0, ema_decay=0.9, **SETTINGS)
            results.append([norm, *sum(run, [])])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_opcheck():
    shapes = [(4, 3), (5,)]
    lists = [random_list(shapes), random_list(shapes), *state_of(random_list(shapes))]
    arguments = (*lists, 2, 1e-3, 0.9, 0.99, 1e-8, [0.1, 0.0], 1.0, 0.9, [], False, 0, 0)
    for norm in (None, torch.tensor(7.0)):
        torch.library.opcheck(torch.ops.dbkernels.adamw_ema_step.default, (*arguments, norm))


def assert_compiled_alike(lists, others):
    """To the bit; a compiler that sees the definition decomposes its addcmul, which then rounds twice."""
    rounding = EPSILON[torch.float32] if dbkernels.backend() == "reference" else 0.0
    for a, b in zip(sum(lists, []), sum(others, []), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * rounding, atol=rounding)


def test_compiles_whole():
    def step(params, grads, exp_avgs, exp_avg_sqs, emas):
        return dbkernels.adamw_ema_step(
            params, grads, exp_avgs, exp_avg_sqs, emas, step=4, max_norm=1.0, ema_decay=0.9, **SETTINGS
        )

    lists = [random_list(SHAPES), random_list(SHAPES), *state_of(random_list(SHAPES))]
    twin = copies(lists)
    norm = torch.compile(step, fullgraph=True, backend="aot_eager")(*lists)
    assert torch.equal(norm, step(*twin))
    assert_compiled_alike(lists, twin)


@pytest.mark.gpu
def test_gpu_skips_without_a_host_sync():
    lists = [random_list(SHAPES, device="cuda"), random_list(SHAPES, device="cuda")]
    lists += state_of(lists[0])
    lists[1][0][3, 3] = float("nan")
    before = copies(lists[:1])[0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = dbkernels.adamw_ema_step(*lists, step=1, max_norm=1.0, ema_decay=0.9, **SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, lists[0], strict=True))
