"""Lay a list of tensors out for the kernels of dbkernels/triton/adamw_ema.py: a table of addresses on the device, made
once for a list, and the launches that read it.

Tensors that lie behind each other in every list (views of one flat buffer) become one.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from dbkernels._dtypes import compute_dtype
from dbkernels.triton import adamw_ema as kernels
from dbkernels.triton.launch import Kinds, Launch
from dbkernels.triton.total_norm import (
    BLOCK,
    CHUNK,
    MOST_PLANS,
    TYPES,
    capturing,
    launch_of,
    squares_kernel,
    starts_of,
    table_of,
)

_layout = attrgetter("dtype", "shape", "device")
_launches = Kinds()
_plans = Kinds()


def rows_of(lists: Sequence[Sequence[Tensor]], decays: Sequence[float], drawn: bool) -> list[list[Any]]:
    """Return numel, decay, an address in each of the six lists, and the first random group of each run of tensors.

    A tensor that begins where its predecessor ends, in every list, with the same decay, lengthens its predecessor's
    run; not where that would move its random words, which begin anew with each tensor. drawn: whether any are used.
    """
    sizes = [tensors[0].element_size() if tensors else 0 for tensors in lists]
    addresses = zip(*(map(Tensor.data_ptr, tensors) if tensors else itertools.repeat(0) for tensors in lists))  # noqa: B905
    rows: list[list[Any]] = []
    following, group = (), 0
    for param, decay, places in zip(lists[0], decays, addresses, strict=True):
        numel = param.numel()
        if not numel:
            continue
        if places == following and decay == rows[-1][1] and not (drawn and rows[-1][0] % 8):
            rows[-1][0] += numel
        else:
            rows.append([numel, decay, *places, group])
        following = tuple(place + numel * size for place, size in zip(places, sizes, strict=True))
        group += (numel + 7) // 8
    return rows


def words_of(rows: list[list[Any]]) -> tuple[list[int], int]:
    """Return the table's words, in the order of the kernels' constants, and the number of chunks."""
    if not rows:
        return [], 0
    numels, decays, params, grads, *others = zip(*rows, strict=True)
    *starts, chunks = starts_of(numels)
    bits = struct.unpack(f"{len(rows)}q", struct.pack(f"{len(rows)}d", *decays))
    fields = [starts, numels, grads, bits, params, *others]
    return list(itertools.chain(*fields)), chunks


class Plan:
    """The table of a list and the launches that read it.

    Args:
        lists: params, grads, exp_avgs, exp_avg_sqs, emas, masters; contiguous, the last two may be empty.
        decays: weight decay of each tensor.
        stochastic: whether bfloat16 params are rounded at random.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]], decays: Sequence[float], stochastic: bool):
        first, moments = lists[0][0], lists[2][0].dtype
        self.device, self.state = first.get_device(), compute_dtype(first.dtype)
        store = kernels.WITH_MASTER if lists[5] else kernels.STOCHASTIC if stochastic else kernels.NEAREST
        rows = rows_of(lists, decays, stochastic or moments != self.state)
        words, self.chunks = words_of(rows)
        self.tensors = len(rows)
        self.table = table_of(words, first.device)
        size = kernels.FACTORS.value + self.tensors
        self.scratch = torch.empty(size, dtype=torch.float64, device=first.device)
        self.sums = torch.empty(max(1, self.chunks), dtype=torch.float64, device=first.device)
        blocks = dict(CHUNK=CHUNK, BLOCK=BLOCK)
        types = dict(TYPE=TYPES[first.dtype], WIDE=TYPES[self.state])
        self.squares = launch_of(squares_kernel, self.device, self.chunks, (self.tensors, 0), **types, **blocks)
        types |= dict(MOMENT=TYPES[moments], AVERAGED=bool(lists[4]), STORE=store.value)
        self.update = launch_of(kernels.update_kernel, self.device, self.chunks, (self.tensors,), **types, **blocks)

    def _decide(
        self, varying: tuple[Any, ...], betas: tuple[float, float], eps: float, max_norm: float | None,
        norm: Tensor | None,
    ) -> Launch:  # fmt: skip
        given = (*(isinstance(number, Tensor) for number in varying), norm is not None)
        kind = "decide", self.device, self.chunks, self.tensors, self.state, given, betas, eps, max_norm
        if (launch := _launches.get(kind)) is None:
            names = ("STEP", "LR", "EMA_DECAY", "SEEDED", "MOVED", "GIVEN")
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
        ema_decay: float | Tensor | None, seed: int | Tensor, offset: int | Tensor, norm: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Launch the kernels on the current stream and return the norm."""
        result = torch.empty((), dtype=self.state, device=self.table.device)
        varying = step, lr, 1.0 if ema_decay is None else ema_decay, seed, offset
        decide = self._decide(varying, (beta1, beta2), eps, max_norm, norm)
        if self.chunks and norm is None:
            self.squares(self.table, self.sums)
        decide(
            self.table, self.scratch, self.sums, result,
            *(given if isinstance(given, Tensor) else result for given in (norm, *varying)),
            varying=tuple(0 if isinstance(number, Tensor) else number for number in varying),
        )  # fmt: skip
        if self.chunks:
            self.update(self.table, self.scratch)
        return result


def plan_for(
    lists: Sequence[Sequence[Tensor]],
    weight_decay: float | tuple[float, ...],
    stochastic: bool,
    decays: Callable[[], Sequence[float]],
) -> Plan | None:
    """Return the lists' plan, made once for their addresses, shapes, dtypes and devices; None if a tensor is strided.

    Args:
        lists: as in `Plan`.
        weight_decay: the number or numbers that `decays` depends on.
        stochastic: as in `Plan`.
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
    captured = capturing(device)
    known = None if captured else _plans.get(key)
    if known is not None and known[0] == layout:
        return known[1]
    plan = Plan(lists, decays(), stochastic)
    if not captured:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = layout, plan
    return plan


def step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], emas: list[Tensor],
    step: int | Tensor, lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: Sequence[float],
    max_norm: float | None, ema_decay: float | Tensor | None, masters: list[Tensor], stochastic_rounding: bool,
    seed: int | Tensor, offset: int | Tensor, norm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run the op by its schema, for the dispatcher: contiguous lists that the caller has checked."""
    lists = params, grads, exp_avgs, exp_avg_sqs, emas if ema_decay is not None else [], masters
    plan = plan_for(lists, tuple(weight_decay), stochastic_rounding, lambda: weight_decay)
    if plan is None:
        raise ValueError("adamw_ema_step takes contiguous tensors: call dbkernels.adamw_ema_step, which copies")
    return plan.step(step, lr, beta1, beta2, eps, max_norm, ema_decay, seed, offset, norm)
