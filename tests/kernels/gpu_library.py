"""The products of a GPU's library on a CPU: halves into float32, by NumPy, whose memory PyTorch doesn't count."""

import numpy
import torch

from dbkernels import _logit_chunks as chunks
from dbkernels import _products as products
from dbkernels.cross_entropy_rows import cross_entropy_columns_definition


def _wide(tensor):
    """Convert halves to float32, as a NumPy array."""
    if tensor.dtype.itemsize == 4:
        return tensor.numpy()
    if tensor.dtype == torch.float16:
        return tensor.numpy().astype(numpy.float32)
    return (tensor.view(torch.int16).numpy().astype(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)


def _product(a, b, out):
    assert a.dtype == b.dtype and out.dtype.itemsize == 4
    out.numpy()[...] = _wide(a) @ _wide(b)
    return out


def _add_product(total, a, b):
    assert a.dtype == b.dtype and total.dtype.itemsize == 4
    total.numpy()[...] += _wide(a) @ _wide(b)
    return total


def _columns(logits, target, at, loss, factor, first, out):
    """Run the definition for a few rows at a time, so that its temporaries are small."""
    for r in range(0, len(logits), 16):
        row = slice(r, r + 16)
        cross_entropy_columns_definition(logits[row], target[row], at[row], loss[row], factor[row], first, out[row])


def stand_in(monkeypatch, logits, least_rows=16, tile=8):
    """Run CPU tensors through the GPU path for halves, with chunks of the given number of logits."""
    monkeypatch.setattr(products, "mixed", lambda weight: weight.dtype.itemsize == 2)
    monkeypatch.setattr(products, "wide", lambda a, b: products.product(a, b, torch.empty(len(a), b.shape[1])))
    product, add = products.product, products.add_product
    monkeypatch.setattr(
        products, "product", lambda a, b, out: (_product if a.dtype.itemsize == 2 else product)(a, b, out)
    )
    monkeypatch.setattr(
        products, "add_product", lambda t, a, b: (_add_product if a.dtype.itemsize == 2 else add)(t, a, b)
    )
    monkeypatch.setattr(chunks, "cross_entropy_columns", _columns)
    monkeypatch.setattr(chunks, "CPU_LOGITS", logits)
    monkeypatch.setattr(chunks, "LEAST_ROWS", least_rows)
    monkeypatch.setattr(chunks, "TILE", tile)
