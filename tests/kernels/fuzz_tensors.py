"""Random tensors for the fuzzer: any strides, each within a larger buffer of NaN, so that a read outside it shows."""

import torch


def strided(values, draw):
    """Return `values` as a view of random order, steps and offsets into a buffer of NaN (of zeros for integers)."""
    order = draw.sample(range(values.ndim), values.ndim)
    step = [draw.choice([1, 1, 2, 3]) for _ in order]
    pad = [draw.randint(0, 2) for _ in order]
    sizes = [step[i] * values.shape[axis] + pad[i] for i, axis in enumerate(order)]
    buffer = values.new_full(sizes, float("nan")) if values.is_floating_point() else values.new_zeros(sizes)
    for i, axis in enumerate(order):
        buffer = buffer.narrow(i, pad[i], sizes[i] - pad[i])
        buffer = buffer[(slice(None),) * i + (slice(0, step[i] * values.shape[axis], step[i]),)]
    return buffer.permute([order.index(axis) for axis in range(values.ndim)]).copy_(values)


def tensor(draw, *shape, dtype=torch.float32):
    """Return normal numbers of `shape`: one in five expanded along an axis, one in five contiguous."""
    random = torch.Generator().manual_seed(draw.getrandbits(62))
    axis = draw.randrange(len(shape)) if shape and draw.random() < 0.2 else None
    base = [1 if i == axis and n > 0 else n for i, n in enumerate(shape)]
    values = torch.randn(base, generator=random, dtype=torch.float64).to(dtype)
    return (values if draw.random() < 0.2 or not shape else strided(values, draw)).expand(shape)


def words(draw, count, *shape):
    """Return int64 numbers below `count`."""
    random = torch.Generator().manual_seed(draw.getrandbits(62))
    return strided(torch.randint(count, shape, generator=random), draw) if shape else torch.zeros((), dtype=torch.int64)
