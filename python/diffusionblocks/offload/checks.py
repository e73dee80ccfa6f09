"""What can't move, and what was changed where no change has an effect: refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checkpoint.layout import DTYPES, identity
from .part import Part


def check_movable(part: str, module: nn.Module) -> None:
    """Raise ValueError if a part holds a tensor that can't lie in flat memory, or a view that would stay behind."""
    own = dict([*module.named_parameters(), *module.named_buffers()])
    for name, t in own.items():
        if is_lazy(t):
            raise ValueError(f"{part}'s {name} has no shape yet: run its lazy module on an example first")
        if t.layout != torch.strided or t.is_quantized or t.dtype not in DTYPES:
            raise ValueError(
                f"{part}'s {name} is {t.layout}, {t.dtype}, and blocks move as dense tensors of plain dtypes: make it "
                "one, or keep it as an attribute that is no buffer"
            )
    ids = {id(t): name for name, t in own.items()}
    for path, owner in module.named_modules():
        for name, value in vars(owner).items():
            if isinstance(value, Tensor) and (base := ids.get(id(value._base))):
                raise ValueError(
                    f"{part}'s {path}.{name} is a view of {base}, and would keep its old values when blocks move: "
                    "make the view in forward"
                )


class Span(NamedTuple):
    """Where a tensor lies in its storage, in bytes."""

    part: str
    name: str
    start: int
    end: int
    tensor: Tensor


def check_apart(parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a trained weight overlaps another tensor without being one with it in its part: files and
    moves give each memory of its own."""
    found: dict[Any, list[Span]] = {}
    for part, module in parts.items():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if is_lazy(t) or t.layout != torch.strided or t.numel() == 0 or t.is_meta:
                continue
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            if extent < t.numel() and t.requires_grad:
                raise ValueError(
                    f"{part}'s {name} is expanded, its elements share memory: make it a clone() or a number"
                )
            start = t.storage_offset() * t.itemsize
            span = Span(part, name, start, start + extent * t.itemsize, t)
            found.setdefault(t.untyped_storage()._cdata, []).append(span)
    for spans in found.values():
        for a, b in _meeting(spans):
            one = a.part == b.part and identity(a.name, a.tensor) == identity(b.name, b.tensor)
            trained = a.tensor.requires_grad or b.tensor.requires_grad
            if trained and not one and _overlap(a.tensor, b.tensor):
                second = b.name if a.part == b.part else f"{b.part}'s {b.name}"
                raise ValueError(
                    f"{a.part}'s {a.name} and {second} share memory, which would part when blocks move or are loaded: "
                    "keep one of them and make views in forward, or give each a clone()"
                )


def _meeting(spans: list[Span]) -> Iterator[tuple[Span, Span]]:
    """Yield the pairs whose ranges meet: none of the many tensors side by side in one flat buffer."""
    ordered = sorted(spans, key=lambda span: span.start)
    for i, a in enumerate(ordered):
        for b in itertools.islice(ordered, i + 1, None):
            if b.start >= a.end:
                break
            yield a, b


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors of one storage have a byte in common; their ranges may only interleave."""
    used = torch.zeros(a.untyped_storage().nbytes(), dtype=torch.uint8)
    for t in (a, b):
        strides = [stride * t.itemsize for stride in t.stride()]
        used.as_strided([*t.shape, t.itemsize], [*strides, 1], t.storage_offset() * t.itemsize).add_(1)
    return bool((used > 1).any())


def check_unwritten(name: str, part: Part, stored: Callable[[], Mapping[str, Tensor]]) -> None:
    """Raise RuntimeError if something was put into a waiting part, which the next move would lose in silence.

    It then waits as before, so that training can go on. stored: Returns the tensors that wait elsewhere.
    """
    if not (written := part.written()):
        return
    tensors, instead = stored(), "activate the block first, or model.offloader.release(), which keeps such changes"
    if added := [key for key in written if key not in tensors]:
        raise RuntimeError(f"{name}'s {added[0]} was added to a block that waits elsewhere: undo that and {instead}")
    part.put_back(tensors)
    raise RuntimeError(
        f"{name}'s {written[0].removeprefix('weight/')} was changed while the block waited elsewhere, and that is "
        f"lost: {instead}"
    )


def check_trained(name: str, part: Part) -> None:
    """Raise RuntimeError if parameters aren't those that a part's optimizer was made for, or in another dtype."""
    first = {id(p): (dtype, trained) for p, dtype, trained in part.given.values()}
    for key, p in part.module.named_parameters():
        dtype, trained = first.get(id(p), (p.dtype, False))
        if p.requires_grad and not trained:
            what = "was replaced, added or unfrozen after its optimizer was made, which doesn't train it"
        elif p.dtype != dtype:
            what = f"was {dtype} when its optimizer was made, and is {p.dtype}"
        else:
            continue
        raise RuntimeError(f"{name}'s {key} {what}: undo that, and call model.offloader.release() before such changes")
