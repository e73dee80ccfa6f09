"""Fuzz the ops against their definitions in float64: shapes, strides, dtypes, zero sizes, options, gradients.

    python tests/kernels/fuzz.py --seconds 3600 --seed 0 [--case N]

Each case compares the kernel (C++ here, Triton in its interpreter under TRITON_INTERPRET=1) and the definition in the
case's dtype with the definition on contiguous float64 copies: outputs and gradients. Inputs must keep their bits.
"""

import argparse
import contextlib
import os
import random
import sys
import time

import torch

import dbkernels as dk
from fuzz_tensors import tensor, words

# Of values and gradients about 1 that are sums of up to some hundred: tens of roundings in the dtype, or in float32
# behind a cancellation; a wrong stride or mask is off by 1.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def rows(draw):
    shape = draw.choice([(3, 5), (2, 1), (1, 7), (0, 3), (3, 0), (2, 3, 2)])
    return *shape, draw.choice([1, 3, 8, 17, 64, 130])


def norm(draw, dtype):
    shape, layer = rows(draw), draw.random() < 0.5
    per_sample = (shape[0], *[1] * (len(shape) - 2), shape[-1])
    options = {n: tensor(draw, *draw.choice([shape, per_sample]), dtype=dtype) for n in ("shift", "scale")}
    options |= {n: tensor(draw, shape[-1], dtype=dtype) for n in ("weight", "bias")[: 2 if layer else 1]}
    given = {n: t for n, t in options.items() if draw.random() < 0.6}
    # Rows that hardly vary are divided by a standard deviation of eps: of the rounding of their mean
    return dk.ada_layer_norm if layer else dk.ada_rms_norm, {
        "x": tensor(draw, *shape, dtype=dtype),
        **given,
        "eps": 0.1,
    }


def gated(draw, dtype):
    shape = rows(draw)
    names = ("x", "branch", "gate", "shift", "scale")
    return dk.gated_residual_norm, {n: tensor(draw, *shape, dtype=dtype) for n in names} | {"eps": 0.1}


def edm_loss(draw, dtype):
    shape = rows(draw)
    given = {n: tensor(draw, *shape, dtype=dtype) for n in ("F", "z", "y")}
    sigma = tensor(draw, *shape[: draw.randint(0, 2)], dtype=torch.float32).abs() + 0.3
    if draw.random() < 0.3:
        given |= {"z": None, "seed": draw.getrandbits(64), "offset": draw.getrandbits(32)}
    reduction = draw.choice(["mean", "sum", "none", "sample"])
    return dk.edm_loss, {**given, "sigma": sigma, "sigma_data": 0.5, "reduction": reduction}


def inject_noise(draw, dtype):
    shape = rows(draw)
    sigma = tensor(draw, *shape[: draw.randint(0, 2)], dtype=torch.float32).abs() + 0.1
    options = {"sigma_data": draw.choice([None, 0.5]), "seed": draw.getrandbits(64), "offset": draw.getrandbits(32)}
    return dk.inject_noise, {"y": tensor(draw, *shape, dtype=dtype), "sigma": sigma, **options}


def inject_rows(draw, dtype):
    count, width = draw.choice([2, 7]), draw.choice([3, 8, 17])
    indices, table = words(draw, count, 3, draw.choice([0, 4])), tensor(draw, count, width, dtype=dtype)
    sigma, normalize, seed = tensor(draw, 3).abs() + 0.1, draw.random() < 0.5, draw.getrandbits(64)
    return lambda table, sigma: dk.inject_noise((indices, table), sigma, normalize=normalize, seed=seed), {
        "table": table,
        "sigma": sigma,
    }


def two_streams(draw, dtype):
    ratio, n, d = draw.choice([1, 2]), draw.choice([1, 5, 12, 33]), draw.choice([8, 16, 32])
    names = ("q", "k", "v", "q_noisy", "k_noisy", "v_noisy")
    given = {m: tensor(draw, 2, 2 * (ratio if m[0] == "q" else 1), n, d, dtype=dtype) for m in names}
    given["q"] = None if draw.random() < 0.2 else given["q"]
    return dk.two_stream_attention, given | {"group_size": draw.randint(1, min(n, 4))}


def decode(draw, dtype):
    n, length, d = draw.choice([1, 4]), draw.choice([0, 1, 9]), draw.choice([8, 16])
    given = {m: tensor(draw, 2, 2, n, d, dtype=dtype) for m in ("q_noisy", "k_noisy", "v_noisy")}
    given |= {m: tensor(draw, 2, 2, length, d, dtype=dtype) for m in ("k_cache", "v_cache")}
    lengths = draw.choice([None, torch.tensor([draw.randint(0, length) for _ in range(2)])])
    return torch.no_grad()(dk.two_stream_decode), given | {"cache_lengths": lengths}


def attention(draw, dtype):
    n, d = draw.choice([1, 5, 12]), draw.choice([8, 16])
    given = {m: tensor(draw, 2, 2, n, d, dtype=dtype) for m in ("q", "k", "v")}
    return dk.attention, given | {"causal": draw.random() < 0.5}


def head(draw, dtype):
    count, width, shape = draw.choice([2, 9, 40]), draw.choice([3, 8, 17]), draw.choice([(3,), (2, 4), (1,)])
    given = {"h": tensor(draw, *shape, width, dtype=dtype), "weight": tensor(draw, count, width, dtype=dtype)}
    return count, shape, given | ({"bias": tensor(draw, count, dtype=dtype)} if draw.random() < 0.5 else {})


def cross_entropy(draw, dtype):
    count, shape, given = head(draw, dtype)
    if draw.random() < 0.3:
        given["row_weight"] = tensor(draw, *shape).abs()
    if draw.random() < 0.3:
        given["softcap"] = 5.0
    reduction = draw.choice(["mean", "sum", "none"])
    return dk.denoising_cross_entropy, given | {"target": words(draw, count, *shape), "reduction": reduction}


def embedding(draw, dtype):
    count, _, given = head(draw, dtype)
    return torch.no_grad()(dk.softmax_embedding), given | {"table": tensor(draw, count, 5, dtype=dtype)}


def address(draw):
    return {"seed": draw.getrandbits(64), "offset": draw.getrandbits(32)}


def uniforms(draw, dtype):
    shape = [draw.choice([0, 1, 3, 17]) for _ in range(draw.randint(0, 3))]
    return draw.choice([dk.philox_uniform, dk.philox_normal]), {"shape": tuple(shape), **address(draw)}


def masks(draw, dtype):
    alpha = draw.choice([draw.random(), tensor(draw, 3).abs().clamp(max=1)])
    return dk.mask_tokens, {
        "tokens": words(draw, 9, 3, draw.choice([0, 5])),
        "alpha": alpha,
        "mask_id": 9,
        **address(draw),
    }


def optimizer(draw, dtype):
    shape, wide = (draw.choice([0, 1, 5]), 7), torch.float64 if dtype == torch.float64 else torch.float32
    given = {n: tensor(draw, *shape, dtype=dtype) for n in ("p", "g")}
    given |= {n: tensor(draw, *shape, dtype=wide).abs() for n in ("m", "v", "e")}
    joint = draw.random() < 0.5

    def step(p, g, m, v, e):
        lists = [[p.clone(), torch.ones_like(p[:1])]] + [[t.clone(), torch.ones_like(t[:1])] for t in (g, m, v, e)]
        options = {"weight_decay": 0.1, "max_norm": 0.5, "ema_decay": 0.9}
        if joint:
            options["norm"] = dk.total_norm([p, m, *lists[1]]).to(m.dtype)
        norm = dk.adamw_ema_step(*lists, step=3, lr=0.1, **options)
        return norm, lists[0][0], lists[2][0], lists[3][0], lists[4][0]

    return torch.no_grad()(step), given


DRAWING = (uniforms, masks)
OPS = (
    norm,
    norm,
    gated,
    edm_loss,
    inject_noise,
    inject_rows,
    two_streams,
    decode,
    attention,
    cross_entropy,
    embedding,
    *DRAWING,
    optimizer,
)
FIXED = ("sigma", "row_weight")  # not differentiable
# Normals are float32 numbers that kernels draw to two units in the last place, whatever the dtype
FLOOR = {**dict.fromkeys(DRAWING, 4e-6), inject_noise: 4e-6, inject_rows: 4e-6, edm_loss: 4e-5}
IN_INTERPRETER = (norm, gated, edm_loss, inject_noise, inject_rows)  # ops whose launchers take a CPU's tensors there


@contextlib.contextmanager
def patched(name, function):
    """Replace `name` by `function` in every module of dbkernels that imported it."""
    modules = [m for n, m in list(sys.modules.items()) if n.startswith("dbkernels.") and hasattr(m, name)]
    before = [getattr(m, name) for m in modules]
    try:
        for m in modules:
            setattr(m, name, function)
        yield
    finally:
        for m, function_ in zip(modules, before, strict=True):
            setattr(m, name, function_)


def results(op, given, upstream):
    """Return the outputs, and the gradients of all floating inputs of the case's dtype."""
    leaves = {n: t for n, t in given.items() if torch.is_tensor(t) and t.is_floating_point() and n not in FIXED}
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    outs = op(**given | leaves)
    outs = [t for t in (outs if isinstance(outs, tuple) else (outs,)) if t is not None]
    trained = [t for t in outs if t.requires_grad]
    if not trained:
        return outs
    ups = [upstream(t.shape).to(t.dtype) for t in trained]
    return [t.detach() for t in outs] + [
        g for g in torch.autograd.grad(trained, list(leaves.values()), ups, allow_unused=True) if g is not None
    ]


def case(seed, number):
    """Run one case. Raises: AssertionError naming the op and how to repeat it."""
    draw = random.Random(f"{seed}/{number}")
    make, dtype = draw.choice(IN_INTERPRETER if INTERPRETED else OPS), draw.choice(list(TOLERANCE))
    op, given = make(draw, dtype)
    tensors = {n: t for n, t in given.items() if torch.is_tensor(t)}
    before = {n: t.clone() for n, t in tensors.items()}
    noise = draw.getrandbits(62)

    def upstream(shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(noise), dtype=torch.float64)

    wide = {n: t.double().contiguous() if t.is_floating_point() else t for n, t in tensors.items()}
    with patched("as_defined", lambda: True):
        exact, defined = results(op, given | wide, upstream), results(op, given, upstream)
    with patched("direct", lambda *t: True) if INTERPRETED else contextlib.nullcontext():
        ours = results(op, given, upstream)
    shapes = {n: (tuple(t.shape), t.stride()) if torch.is_tensor(t) else t for n, t in given.items()}
    where = f"{make.__name__} {dtype} {shapes}\n  python tests/kernels/fuzz.py --seed {seed} --case {number}\n"
    for kind, actual in (("kernel", ours), ("definition", defined)):
        assert len(actual) == len(exact), f"{kind} of {where}"
        for i, (a, b) in enumerate(zip(actual, exact, strict=True)):
            size = b.double().abs().max().nan_to_num() if b.numel() else 0
            band = max(TOLERANCE[dtype], FLOOR.get(make, 0.0)) * (1 + float(size))
            words_ = f"{kind}, result {i} of {where}"
            torch.testing.assert_close(
                a.double(), b.double(), rtol=0, atol=band, equal_nan=True, msg=lambda m, w=words_: w + m
            )
    for n, t in tensors.items():
        assert torch.equal(t, before[n]), f"{where} changed {n}"


def run(seconds, seed, first=0, most=None):
    """Run cases until the time is over; returns how many. Raises at the first that is wrong."""
    end, number = time.perf_counter() + seconds, first
    while number == first or (time.perf_counter() < end and (most is None or number - first < most)):
        case(seed, number)
        number += 1
    return number - first


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    one = chosen.case is not None
    count = run(chosen.seconds, chosen.seed, chosen.case or 0, 1 if one else None)
    print(f"{count} cases of seed {chosen.seed} are right")
