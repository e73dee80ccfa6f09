"""total_norm: the 2-norm of a list of tensors together, of any floating dtypes, with no host sync.

The definition, the op and the public function. The kernels are csrc/cpu/total_norm.cpp and
dbkernels/triton/total_norm.py; the latter serves every GPU, beside the CUDA library too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dbkernels._direct import direct
from dbkernels._dtypes import FLOATS, compute_dtype
from dbkernels._library import backend, define, register_triton
from dbkernels._pieces import pieces


def total_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of at least one tensor, summed in float64 and rounded once. See `total_norm`."""
    parts = [piece for tensor in tensors for piece in pieces(tensor.contiguous())]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.linalg.vector_norm(torch.stack(norms)).to(compute_dtype(*(tensor.dtype for tensor in tensors)))


def _fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=compute_dtype(*(tensor.dtype for tensor in tensors)))


def _triton_kernel(tensors: list[Tensor]) -> Tensor:
    from dbkernels.triton.total_norm import total_norm

    return total_norm(tensors)


define("total_norm(Tensor[] tensors) -> Tensor", total_norm_reference, _fake)
register_triton("total_norm", _triton_kernel)


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all elements of all tensors, for example of the gradients of several optimizers' parts.

    Squares are summed in float64 in an order that depends on the tensors alone, so a norm's bits repeat, and what fits
    float32 doesn't overflow on its way. A NaN or an infinity in any tensor makes the norm NaN or infinite. Not
    differentiable.

    Args:
        tensors: float16, bfloat16, float32 or float64, of any shapes and strides, all on one device; may be empty.

    Returns:
        The norm, 0-dim on the tensors' device; float32, or float64 if any tensor is float64. 0 on the CPU without
        tensors.

    Raises:
        TypeError: an item isn't a dense tensor of one of these dtypes.
        ValueError: tensors are on different devices.

    >>> float(total_norm([torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]))
    5.0
    """
    tensors = list(tensors)
    if not tensors:
        return torch.zeros(())
    _check(tensors)
    if direct(*tensors):
        return _triton_kernel(tensors)
    if backend() == "reference":
        return total_norm_reference(tensors)
    return torch.ops.dbkernels.total_norm.default(tensors)


def _check(tensors: Sequence[Tensor]) -> None:
    """Raise unless all are dense tensors of floating dtypes on one device."""
    device = getattr(tensors[0], "device", None)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{i}] must be a tensor, got {type(tensor).__name__}: leave it out")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"tensors[{i}] must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"tensors[{i}] must be dense, got {tensor.layout}: pass tensors[{i}].to_dense()")
        if tensor.device != device:
            raise ValueError(f"tensors[{i}] is on {tensor.device}, tensors[0] on {device}: pass tensors of one device")
