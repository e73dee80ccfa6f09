"""Blocks that begin as copies of one that was trained for all noise."""

from __future__ import annotations

from torch import Tensor

from ..offload.offloader import Offloader
from ..offloadable import plain_name


def branch(offloader: Offloader) -> set[str]:
    """Make every block a copy of block 0: weights, optimizer state, average; return the parts that changed.

    A block with fewer layers copies those; what block 0 lacks stays as it is.
    Source: Balaji et al. 2022 (eDiff-I), arXiv 2211.01324, section 4.1.
    """
    trunk, scalars = offloader.tensors("block_0"), offloader.parts["block_0"].scalars()
    parts = offloader.parts.keys() - {"shared", "block_0"}
    for part in parts:
        own = offloader.tensors(part)
        module = offloader.parts[part].module
        frozen = {plain_name(name) for name, p in module.named_parameters() if not p.requires_grad}

        def has(entry: str, own: dict[str, Tensor] = own, frozen: set[str] = frozen) -> bool:
            key, _, name = entry.partition("/")
            return f"weight/{name}" in own and (key == "weight" or name not in frozen)

        copies = {n: t.detach().to("cpu", copy=True) for n, t in trunk.items() if has(n)}
        offloader.load(part, own | copies)
        offloader.parts[part].take_scalars({n: v for n, v in scalars.items() if has(n)})
    return set(parts)
