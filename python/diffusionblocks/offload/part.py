"""One part of a model (a block, or what all share) as named tensors: weights, optimizer state and averages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checkpoint.layout import Span
from ..offloadable import plain_name
from .memory import Usage, count_bytes

Common = dict[int, tuple[str, Tensor]]
ORDER = {"weight": 0, "ema": 1, "master": 2}


class Part:
    """A module and its optimizer, whose tensors move together.

    Names are "weight/NAME" for weights and buffers and "KEY/NAME" for the optimizer's state; NAME is the plain one.

    Args:
        module: The weights.
        optimizer: A torch optimizer over its parameters, or None.
        common: Tensors that several parts hold, by identity (`common_tensors`).
        owns_common: Whether they are this part's.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer | None, common: Common, *, owns_common: bool
    ):
        self.module, self.optimizer = module, optimizer
        self._common, self._owns_common = common, owns_common
        self.wide = False  # half weights are evaluated by float32 averages or masters: a Trainer made them half
        self.given = {name: (p, p.dtype, p.requires_grad) for name, p in module.named_parameters()}
        self._halves: dict[str, Tensor] = {}  # half weights while their averages stand in for them

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that move with the part, by name; a tied weight under its first name."""
        return {f"weight/{name}": t for name, t in self._weights().items()} | self._state()

    def scalars(self) -> dict[str, Any]:
        """Return what the optimizer's state holds besides tensors, by name."""
        return {name: v for name, v in self._entries().items() if not isinstance(v, Tensor) and v is not None}

    def weights(self, tensors: Mapping[str, Tensor], *, averaged: bool = False) -> dict[str, Tensor]:
        """Return the weights among the part's `tensors` by their names in the module's state_dict.

        averaged: their averages, where there are any.
        """
        first = {id(t): name for name, t in self._weights().items()}
        found: dict[str, Tensor] = {}
        for name, t in self.module.state_dict(keep_vars=True).items():
            if id(t) in first:
                key = first[id(t)]
                average = self._average(tensors, key) if averaged else None
                found[name] = tensors[f"weight/{key}"] if average is None else average
                if not self.wide:
                    found[name] = found[name].to(t.dtype)
                elif averaged and self._is_half(t):
                    found[name] = found[name].float()
            elif isinstance(t, Tensor):
                found[name] = t
        return found

    def moving(self) -> dict[str, Tensor]:
        """Return the tensors that leave the device with the part: weights first, then what stands in for them."""
        tensors = {name: t for name, t in self.tensors().items() if not self._stays(name)}
        return dict(sorted(tensors.items(), key=lambda item: ORDER.get(item[0].partition("/")[0], len(ORDER))))

    def staying(self) -> dict[str, Tensor]:
        """Return the tensors that are in host memory wherever the part is: counters of torch's own optimizers."""
        return {name: t for name, t in self._state().items() if self._stays(name)}

    def prepare(self) -> None:
        """Make the optimizer's state, if it can be made before the first step."""
        if prepare := getattr(self.optimizer, "prepare", None):
            prepare()

    def place(self, device: torch.device) -> None:
        """Move all tensors to `device` but those that stay on the host."""
        for t in self.moving().values():
            if not t.is_meta:
                t.data = t.data.to(device)

    def bind(self, views: Mapping[str, Tensor]) -> None:
        """Make all tensors that move views of a buffer."""
        own = self.moving()
        for name in own.keys() & views.keys():
            own[name].data = views[name]

    def come_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Take copies of a waiting part's tensors on the host; what was put in their place meanwhile stays."""
        written = self.written()
        for name, t in self.moving().items():
            kept = t if name in written else tensors.get(name, t)
            t.data = kept.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def widen(self) -> None:
        """Make half weights float32 again where a Trainer made them half: their masters, where they have any."""
        state = self._state()
        for name, p in self._weights().items():
            if self.wide and self._is_half(p):
                p.data = state.get(f"master/{name}", p).data.float()

    def is_bound(self, views: Mapping[str, Tensor]) -> bool:
        """Return whether all tensors that move are these views."""
        own = self.moving()
        return own.keys() == views.keys() and all(
            t.data_ptr() == views[n].data_ptr() and t.dtype == views[n].dtype and t.shape == views[n].shape
            for n, t in own.items()
        )

    def empty(self) -> None:
        """Let go of the memory of all tensors; shapes stay, values read as NaN (integers as their largest), writing is
        an error."""
        for t in self.moving().values():
            # One element, expanded: most operators crash the process on a tensor whose storage was resized to nothing.
            t.data = torch.full((), _absent(t.dtype), dtype=t.dtype).expand(t.shape)

    def written(self) -> list[str]:
        """Return the names of tensors that aren't as `empty` left them, in whatever way something was put there."""
        own = dict(self.module.named_parameters())
        replaced = {f"weight/{plain_name(name)}" for name, (p, *_) in self.given.items() if own.get(name) is not p}
        found = (name for name, t in self.moving().items() if not _is_empty(t, values=name.startswith("weight/")))
        return list(dict.fromkeys([*found, *replaced]))

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Wait again as before something was put here, whose tensors had these shapes and dtypes."""
        for name, (p, *_) in self.given.items():
            owner, _, leaf = name.rpartition(".")
            with contextlib.suppress(AttributeError):  # its module is gone
                self.module.get_submodule(owner)._parameters[leaf] = p
        self.bind(tensors)
        self.empty()

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in place of the part's own, and make the state that it hasn't got yet."""
        live = self.tensors()
        for name, t in tensors.items():
            if name in live:
                live[name].data = t
            else:
                self._set(name, t)
        if live.keys() != tensors.keys() and (share := getattr(self.optimizer, "share_counts", None)):
            share()

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in place of all of the part's; optimizer state that isn't among them is forgotten."""
        if self.optimizer is not None:
            self.optimizer.state.clear()
            if any("." in name.partition("/")[0] for name in tensors):
                self.take({name: t.clone() for name, t in tensors.items() if name.startswith("weight/")})
                self._make_state(self.optimizer)
        self.take(tensors)

    def take_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Put numbers into the optimizer's state."""
        for name, value in scalars.items():
            self._set(name, value)

    def check(self, tensors: Mapping[str, Tensor | Span]) -> None:
        """Raise ValueError unless all weights of this part, in their shapes, are given, and state of no others."""
        own = {f"weight/{name}": t.shape for name, t in self._weights().items()}
        given = {name: t.shape for name, t in tensors.items() if name.startswith("weight/")}
        wrong = {n for n in own.keys() | given.keys() if own.get(n) != given.get(n)}
        trained = {plain_name(name) for name, p in self.module.named_parameters() if p.requires_grad}
        wrong |= {n for n in tensors.keys() - given.keys() if self.optimizer and n.partition("/")[2] not in trained}
        if wrong:
            raise ValueError(f"these tensors do not fit the model: {', '.join(sorted(wrong)[:4])}")

    def swap(self) -> None:
        """Exchange weights and their averages (`wide`: or masters); called again it undoes itself, to the last bit.

        Tensors of one dtype change places without a copy. The average of half weights is rounded into their place, and
        stays itself: exchanged, it would be rounded. `wide`: half weights without either are widened, so that a block
        that wasn't trained yet computes like the others.
        """
        state = self._state()
        for name, p in self._weights().items():
            average = self._average(state, name)
            if name in self._halves:
                p.data = self._halves.pop(name)
            elif average is None and self.wide and self._is_half(p):
                self._halves[name], p.data = p.data, p.data.float()
            elif average is None:
                continue
            elif self.wide or p.dtype == average.dtype:
                p.data, average.data = average.data, p.data
            else:
                self._halves[name], p.data = p.data, average.to(p.dtype)

    def _stays(self, name: str) -> bool:
        settings = self.optimizer.param_groups[0] if self.optimizer else {}
        return name.startswith("step/") and not (settings.get("capturable") or settings.get("fused"))

    def _is_half(self, p: Tensor) -> bool:
        return p.requires_grad and p.dtype == torch.bfloat16

    def _average(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        average = tensors.get(f"ema/{name}")
        return tensors.get(f"master/{name}") if average is None and self.wide else average

    def _weights(self) -> dict[str, Tensor]:
        own = [*self.module.named_parameters(), *self.module.named_buffers()]
        weights = {plain_name(name): t for name, t in own if id(t) not in self._common}
        return weights | (dict(self._common.values()) if self._owns_common else {})

    def _state(self) -> dict[str, Tensor]:
        return {name: v for name, v in self._entries().items() if isinstance(v, Tensor)}

    def _entries(self) -> dict[str, Any]:
        if self.optimizer is None:
            return {}
        state = self.optimizer.state
        named = [(plain_name(name), p) for name, p in self.module.named_parameters() if p in state]
        entries: dict[str, Any] = {}
        for name, p in named:
            for key, value in state[p].items():
                if is_traceable_wrapper_subclass(value):  # e.g. 8-bit state: the tensors inside move
                    inner = value.__tensor_flatten__()[0]
                    entries |= {f"{key}.{attribute}/{name}": getattr(value, attribute) for attribute in inner}
                else:
                    entries[f"{key}/{name}"] = value
        return entries

    def _set(self, name: str, value: Any) -> None:
        if self.optimizer is None:
            return
        key, _, parameter = name.partition("/")
        state = self.optimizer.state[self.module.get_parameter(parameter)]
        key, _, attribute = key.partition(".")
        if not attribute:
            state[key] = value
        else:
            getattr(state[key], attribute).data = value

    def _make_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer make state that only it can, by a step whose numbers are replaced."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _absent(dtype: torch.dtype) -> float | int:
    """Return the value that stands for one that waits elsewhere."""
    if dtype == torch.bool:
        return False
    return math.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max


def _is_empty(t: Tensor, *, values: bool) -> bool:
    if t.numel() < 1 or any(t.stride()) or not values:
        return t.numel() < 1 or not any(t.stride())
    value = t.detach().as_strided((), ()).item()
    return value != value or value == _absent(t.dtype)


def common_tensors(model: nn.Module, parts: Mapping[str, nn.Module]) -> Common:
    """Return frozen tensors and buffers that several parts hold, by identity, each with its first name in the model.

    A table of rotary angles, for example. They stay on the device, since no part may take them along.
    """
    seen: dict[int, str] = {}
    several = set()
    for part, module in parts.items():
        for t in {id(t): t for t in (*module.parameters(), *module.buffers())}:
            if seen.setdefault(t, part) != part:
                several.add(t)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(t): (plain_name(name), t) for name, t in named if id(t) in several}


def usage_of(parts: Iterable[Part], device: torch.device, buffers: Sequence[Tensor] = ()) -> Usage:
    """Return the parts' bytes on a device by category, and what is left of flat memory that they lie in (buffers)."""
    inside = {buffer.untyped_storage()._cdata for buffer in buffers}
    groups: dict[str, list[Tensor]] = {"weights": [], "gradients": [], "moments": [], "averages": []}
    for part in parts:
        for name, t in part.tensors().items():
            groups[category(name)].append(t)
        groups["gradients"] += [p.grad for p in part.module.parameters() if p.grad is not None]
    counts, rest = {}, count_bytes(buffers, device)
    for name, tensors in groups.items():
        views = {t.data_ptr(): t.nbytes for t in tensors if inside and t.untyped_storage()._cdata in inside}
        own = [t for t in tensors if t.untyped_storage()._cdata not in inside]
        counts[name] = count_bytes(own, device) + sum(views.values())
        rest -= sum(views.values())
    return Usage(counts | {"buffers": rest})


def category(name: str) -> str:
    """Return the category of bytes that a part's tensor belongs to."""
    return {"weight": "weights", "ema": "averages"}.get(name.split("/")[0], "moments")
