"""The 2-norm of a list of tensors together, in Triton. Definition: dbkernels/total_norm.py.

The squares of each chunk of the tensors are one launch per dtype; one program then adds them up in a fixed order, so
that the norm's bits repeat. Tensors are found in a table of addresses on the device, so that a list of any length is
one launch. Nothing is copied from the host: the table's words travel as kernel arguments, so that its making can be
captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels._dtypes import compute_dtype
from dbkernels.triton.launch import Kinds, Launch

CHUNK = 8192  # elements a program takes
BLOCK = 1024  # elements it works on at once: 8 a thread, two loads of 16 bytes in float32 and one in a half type
LOOK = tl.constexpr(256)  # rows of the table looked at together
# Rows of a table, one number per tensor: its first chunk, its elements, its address.
START, NUMEL, ADDRESS = (tl.constexpr(row) for row in range(3))

TYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip
MOST_PLANS = 256  # lists whose tables are kept: some kilobytes each
_launches = Kinds()
_plans: dict[Any, NormPlan] = {}


@triton.jit
def locate(table_ptr, tensors, chunk, CHUNK: tl.constexpr):
    """Return the tensor a chunk lies in, the chunk's first element there, and how many elements it has."""
    found = tl.full((), -1, tl.int32)
    for at in range(0, tensors, LOOK):
        look = at + tl.arange(0, LOOK)
        starts = tl.load(table_ptr + START * tensors + look, mask=look < tensors, other=2**62)
        found += tl.sum((starts <= chunk).to(tl.int32))
    first = (chunk - tl.load(table_ptr + START * tensors + found)) * CHUNK
    return found, first, tl.minimum(tl.load(table_ptr + NUMEL * tensors + found) - first, CHUNK).to(tl.int32)


@triton.jit
def square_sum(x_ptr, total, left, WHOLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Add the squares of a block, of its first `left` elements unless WHOLE."""
    at = tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(x_ptr + at)
    else:
        x = tl.load(x_ptr + at, mask=at < left, other=0.0)
    x = x.to(WIDE).to(tl.float64)
    return total + x * x


@triton.jit(do_not_specialize=["tensors", "place"])
def squares_kernel(
    table_ptr, sums_ptr, tensors, place,
    TYPE: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the sum of a chunk's squares in float64, one chunk per program. place: where this launch's sums begin."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor, first, count = locate(table_ptr, tensors, chunk, CHUNK)
    address = tl.load(table_ptr + ADDRESS * tensors + tensor)
    x_ptr = tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16) + first
    # Blocks in the middle of an aligned tensor move 16 bytes at a time; the hint above is for them alone.
    whole = tl.where(address % 16 == 0, count // BLOCK * BLOCK, 0)
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, whole, BLOCK):
        total = square_sum(x_ptr + at, total, count - at, True, WIDE, BLOCK)
    x_ptr = address.to(tl.pointer_type(TYPE)) + first
    for at in range(whole, count, BLOCK):
        total = square_sum(x_ptr + at, total, count - at, False, WIDE, BLOCK)
    tl.store(sums_ptr + place + chunk, tl.sum(total))


@triton.jit
def root_of_sum(sums_ptr, chunks, BLOCK: tl.constexpr):
    """Return the square root of all chunks' sums, added in a fixed order, in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, chunks, BLOCK):
        look = at + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + look, mask=look < chunks, other=0.0)
    return tl.sqrt(tl.sum(total))


@triton.jit(do_not_specialize=["chunks"])
def norm_kernel(sums_ptr, norm_ptr, chunks, BLOCK: tl.constexpr):
    """Store the norm, rounded once. One program."""
    tl.store(norm_ptr, root_of_sum(sums_ptr, chunks, BLOCK).to(norm_ptr.dtype.element_ty))


def table_of(words: Sequence[int], device: torch.device) -> Tensor:
    """Return the words as an int64 tensor on the device, without a copy from the host."""
    table = torch.zeros(max(1, len(words)), dtype=torch.int64, device=device)
    if words:
        torch._foreach_add_(table[: len(words)].unbind(), list(words))
    return table


def starts_of(numels: Sequence[int]) -> list[int]:
    """Return each tensor's first chunk, then the number of all chunks."""
    return [0, *itertools.accumulate(-(-numel // CHUNK) for numel in numels)]


def launch_of(kernel: Any, device: int, programs: int, numbers: tuple[Any, ...], **constants: Any) -> Launch:
    """Return the launch of a kernel with 4 warps, prepared once for its numbers and constants."""
    kind = kernel, device, programs, numbers, *constants.values()
    return _launches.get(kind) or _launches.keep(
        kind, Launch(kernel, (programs,), device, numbers, **constants, num_warps=4, num_stages=1)
    )


def capturing(device: int) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device >= 0 and torch.cuda.is_current_stream_capturing()


class NormPlan:
    """The tables of a list and the launches that read them.

    Args:
        tensors: contiguous, on one device; at least one.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        device, self.dtype, self.chunks = tensors[0].get_device(), compute_dtype(*(t.dtype for t in tensors)), 0
        self.squares: list[tuple[Launch, Tensor]] = []
        for dtype in TYPES:
            rows = [(x.numel(), x.data_ptr()) for x in tensors if x.dtype == dtype and x.numel()]
            if not rows:
                continue
            numels, addresses = zip(*rows, strict=True)
            *starts, chunks = starts_of(numels)
            launch = launch_of(
                squares_kernel, device, chunks, (len(rows), self.chunks), TYPE=TYPES[dtype],
                WIDE=tl.float64 if dtype == torch.float64 else tl.float32, CHUNK=CHUNK, BLOCK=BLOCK,
            )  # fmt: skip
            self.squares.append((launch, table_of([*starts, *numels, *addresses], tensors[0].device)))
            self.chunks += chunks
        self.sums = torch.empty(max(1, self.chunks), dtype=torch.float64, device=tensors[0].device)
        self.finish = launch_of(norm_kernel, device, 1, (self.chunks,), BLOCK=1024)

    def norm(self) -> Tensor:
        """Launch the kernels on the current stream and return the norm."""
        norm = torch.empty((), dtype=self.dtype, device=self.sums.device)
        for launch, table in self.squares:
            launch(table, self.sums)
        self.finish(self.sums, norm)
        return norm


def plan_for(tensors: Sequence[Tensor]) -> NormPlan:
    """Return the plan of contiguous tensors, made once for their addresses, sizes and dtypes.

    In a CUDA graph's capture a plan serves that graph alone: its memory is the graph's, and filled by each replay. A
    plan serves one stream: another may run ahead of the table's making.
    """
    device = tensors[0].get_device()
    if capturing(device):
        return NormPlan(tensors)
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    key = stream, device, *((x.data_ptr(), x.numel(), x.dtype) for x in tensors)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = NormPlan(tensors)
    return plan


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of at least one tensor, of any strides."""
    dense = [tensor.contiguous() for tensor in tensors]  # copies must live until the launch
    return plan_for(dense).norm()
