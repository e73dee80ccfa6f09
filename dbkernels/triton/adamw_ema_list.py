"""Lay a list of tensors out for the kernels of dbkernels/triton/adamw_ema.py: a table of addresses on the device, made
once for a list, and the launches that read it.

Nothing is copied from the host: the table's words travel as kernel arguments, so that a step, its table included, can
be captured in a CUDA graph. Tensors that lie behind each other in every list (views of one flat buffer) become one.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dbkernels.triton import adamw_ema as kernels
from dbkernels.triton.launch import Kinds, Launch

MOST_PLANS = 256  # lists whose tables are kept: some kilobytes each
_TYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip
_layout = attrgetter("dtype", "shape", "device")
_launches = Kinds()
_plans = Kinds()


def rows_of(lists: Sequence[Sequence[Tensor]], decays: Sequence[float], stochastic: bool) -> list[list[Any]]:
    """Return numel, decay, an address in each of the six lists, and the first random group of each run of tensors.

    A tensor that begins where its predecessor ends, in every list, with the same decay, lengthens its predecessor's
    run; not where that would move its random words, which begin anew with each tensor.
    """
    sizes = [tensors[0].element_size() if tensors else 0 for tensors in lists]
    addresses = zip(*(map(Tensor.data_ptr, tensors) if tensors else itertools.repeat(0) for tensors in lists))  # noqa: B905
    rows: list[list[Any]] = []
    following, group = (), 0
    for param, decay, places in zip(lists[0], decays, addresses, strict=True):
        numel = param.numel()
        if not numel:
            continue
        if places == following and decay == rows[-1][1] and not (stochastic and rows[-1][0] % 8):
            rows[-1][0] += numel
        else:
            rows.append([numel, decay, *places, group])
        following = tuple(place + numel * size for place, size in zip(places, sizes, strict=True))
        group += (numel + 7) // 8
    return rows


def words_of(rows: list[list[Any]], masters: bool) -> tuple[list[int], int]:
    """Return the table's words, in the order of the kernels' constants, and the number of chunks."""
    chunks = [-(-row[0] // kernels.CHUNK) for row in rows]
    starts = [0, *itertools.accumulate(chunks)]
    numels, decays, *addresses, groups = zip(*rows, strict=True)
    bits = struct.unpack(f"{len(rows)}q", struct.pack(f"{len(rows)}d", *decays))
    fields = [starts[:-1], numels, bits, *addresses[:5], addresses[5] if masters else groups]
    return list(itertools.chain(*fields)), starts[-1]


class Plan:
    """A list as the kernels take it.

    Args:
        lists: params, grads, exp_avgs, exp_avg_sqs, emas, masters; contiguous, the last two may be empty.
        decays: weight decay of each tensor.
        stochastic: whether bfloat16 params are rounded by chance.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]], decays: Sequence[float], stochastic: bool):
        first, state = lists[0][0], lists[2][0]
        self.device, self.state = first.get_device(), state.dtype
        store = kernels.WITH_MASTER if lists[5] else kernels.STOCHASTIC if stochastic else kernels.NEAREST
        rows = rows_of(lists, decays, stochastic)
        words, self.chunks = words_of(rows, bool(lists[5])) if rows else ([], 0)
        self.tensors = len(rows)
        self.table = torch.zeros(max(1, len(words)), dtype=torch.int64, device=first.device)
        if words:
            torch._foreach_add_(self.table[: len(words)].unbind(), words)
        size = kernels.FACTORS.value + self.tensors + self.chunks
        self.scratch = torch.empty(size, dtype=torch.float64, device=first.device)
        types = dict(TYPE=_TYPES[first.dtype], WIDE=_TYPES[state.dtype])
        self.squares = self._launch(kernels.squares_kernel, **types)
        self.update = self._launch(kernels.update_kernel, **types, AVERAGED=bool(lists[4]), STORE=store.value)

    def _launch(self, kernel: Any, **constants: Any) -> Launch:
        kind = kernel, self.device, self.chunks, self.tensors, *constants.values()
        return _launches.get(kind) or _launches.keep(
            kind,
            Launch(
                kernel, (self.chunks,), self.device, (self.tensors,), **constants, CHUNK=kernels.CHUNK,
                BLOCK=kernels.BLOCK, num_warps=4, num_stages=1,
            ),
        )  # fmt: skip

    def _decide(
        self, varying: tuple[Any, ...], betas: tuple[float, float], eps: float, max_norm: float | None
    ) -> Launch:
        given = tuple(isinstance(number, Tensor) for number in varying)
        kind = "decide", self.device, self.chunks, self.tensors, self.state, given, betas, eps, max_norm
        if (launch := _launches.get(kind)) is None:
            names = ("STEP", "LR", "EMA_DECAY", "SEEDED", "MOVED")
            launch = Launch(
                kernels.decide_kernel, (1,), self.device,
                (self.chunks, self.tensors, *betas, eps, 0.0 if max_norm is None else max_norm),
                **dict(zip(names, given, strict=True)), CLIPPED=max_norm is not None, BLOCK=1024,
                num_warps=4, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip
            _launches.keep(kind, launch)
        return launch

    def step(
        self, step: int | Tensor, lr: float | Tensor, beta1: float, beta2: float, eps: float, max_norm: float | None,
        ema_decay: float | Tensor | None, seed: int | Tensor, offset: int | Tensor,
    ) -> Tensor:  # fmt: skip
        """Launch the three kernels on the current stream. Returns the norm."""
        norm = torch.empty((), dtype=self.state, device=self.table.device)
        varying = step, lr, 1.0 if ema_decay is None else ema_decay, seed, offset
        decide = self._decide(varying, (beta1, beta2), eps, max_norm)
        if self.chunks:
            self.squares(self.table, self.scratch)
        decide(
            self.table, self.scratch, norm, *(number if isinstance(number, Tensor) else norm for number in varying),
            varying=tuple(0 if isinstance(number, Tensor) else number for number in varying),
        )  # fmt: skip
        if self.chunks:
            self.update(self.table, self.scratch)
        return norm


def _capturing(device: int) -> bool:
    return device >= 0 and torch.cuda.is_current_stream_capturing()


def plan_for(
    lists: Sequence[Sequence[Tensor]],
    weight_decay: float | tuple[float, ...],
    stochastic: bool,
    decays: Callable[[], Sequence[float]],
) -> Plan | None:
    """Return the lists' plan, made once for their addresses, shapes, dtypes and devices; None if a tensor is strided.

    Args:
        lists: as Plan's.
        weight_decay: what `decays` depends on.
        stochastic: as Plan's.
        decays: checks the lists and returns a weight decay for each tensor; called for lists that are new.

    In a CUDA graph's capture a plan serves that graph alone: its memory is the graph's, and filled by each replay. A
    plan serves one stream: another may run ahead of the table's making.
    """
    everything = list(itertools.chain(*lists))
    if not all(map(Tensor.is_contiguous, everything)):
        return None
    device = lists[0][0].get_device()
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    key = (
        stream, device, stochastic, weight_decay, tuple(map(len, lists)), tuple(map(Tensor.data_ptr, everything)),
    )  # fmt: skip
    layout = list(map(_layout, everything))
    capturing = _capturing(device)
    known = None if capturing else _plans.get(key)
    if known is not None and known[0] == layout:
        return known[1]
    plan = Plan(lists, decays(), stochastic)
    if not capturing:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = layout, plan
    return plan


def step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], emas: list[Tensor],
    step: int | Tensor, lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: Sequence[float],
    max_norm: float | None, ema_decay: float | Tensor | None, masters: list[Tensor], stochastic_rounding: bool,
    seed: int | Tensor, offset: int | Tensor,
) -> Tensor:  # fmt: skip
    """Run the op's schema, for the dispatcher: contiguous lists that the caller has checked."""
    lists = params, grads, exp_avgs, exp_avg_sqs, emas if ema_decay is not None else [], masters
    plan = plan_for(lists, tuple(weight_decay), stochastic_rounding, lambda: weight_decay)
    if plan is None:
        raise ValueError("adamw_ema_step takes contiguous tensors: call dbkernels.adamw_ema_step, which copies")
    return plan.step(step, lr, beta1, beta2, eps, max_norm, ema_decay, seed, offset)
