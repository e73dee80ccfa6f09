"""two_stream_choice: report which kernels two_stream_attention takes for an input, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbkernels._autocast import autocast
from dbkernels._fastest import Choice
from dbkernels._levels import as_defined
from dbkernels._library import HAS_TRITON, kernels
from dbkernels._two_stream import check_arguments


class TwoStreamChoice(NamedTuple):
    """Result of `two_stream_choice`: the choices for the forward and the backward pass."""

    forward: Choice
    backward: Choice


def two_stream_choice(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    q_noisy: Tensor,
    k_noisy: Tensor,
    v_noisy: Tensor,
    *,
    group_size: int = 1,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> TwoStreamChoice:
    """Return which kernels `two_stream_attention` takes for such input, and why.

    On a GPU the first call with a new kind of input compares and times them: Triton's for everything; cuDNN's causal
    attention for the clean stream; for groups of one, cuDNN's for the noisy queries' clean keys as well. A timing holds
    for lengths and batches to within a factor of two. cuDNN's gradients differ from run to run in their last bits:
    `torch.use_deterministic_algorithms(True)` leaves them out, `torch.backends.cuda.enable_cudnn_sdp(False)` cuDNN.

    Args, Raises: as for `two_stream_attention`.

    Returns:
        TwoStreamChoice(forward, backward), each a Choice(name, reason, milliseconds per timed path).
    """
    streams: Any = [autocast(t) for t in (q, k, v, q_noisy, k_noisy, v_noisy)]
    options: Any = group_size, scale, cu_seqlens
    number = check_arguments(*streams, *options)
    device = k.device.type
    if device != "cuda" or as_defined() or not HAS_TRITON or not k.numel():
        label = (
            "reference (PyTorch)" if as_defined() else kernels()["two_stream_attention"].get(device.upper(), "PyTorch")
        )
        only = Choice(label, f"the only kernels for such input on {device}")
        return TwoStreamChoice(only, only)
    from dbkernels.triton.two_stream import chosen

    with torch.no_grad():
        forward, backward = chosen(*(*streams, group_size, number, cu_seqlens))
        return TwoStreamChoice(forward, backward)
