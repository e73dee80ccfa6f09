"""Which block is on the device: everything of the others (weights, moments, average) is on the host or on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from .memory import Usage, count_bytes
from .optimizer import PartOptimizer

STORES = ("host", "disk")


class Residency:
    """Holds one block and the shared part on `device`; all other blocks wait in `store`.

    optimizers: one a part (`DiffusionBlocks.parts`), or none for inference. store: "host" keeps waiting blocks in host
    memory, "disk" in safetensors files under `folder`, no tensor of them in memory. Where the device is the host
    itself, only "disk" frees memory.
    Raises: ValueError if store is unknown or "disk" comes without a folder.
    """

    def __init__(
        self,
        model: DiffusionBlocks,
        optimizers: dict[str, PartOptimizer] | None = None,
        *,
        device: torch.device | str,
        store: str = "host",
        folder: Path | None = None,
    ):
        if store not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, got {store!r}")
        if store == "disk" and folder is None:
            raise ValueError("store='disk' needs a folder to keep waiting blocks in")
        self.parts, self.optimizers = model.parts(), optimizers or {}
        self._common = _common(model, self.parts)
        self.device, self.store, self.folder = torch.device(device), store, folder
        self.active: int | None = None
        self.averaged = False
        self._reader = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ahead: tuple[str, Future[dict[str, Tensor]]] | None = None
        if folder is not None and store == "disk":
            folder.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            self._place(part, self.device) if part == "shared" else self._retire(part)

    def activate(self, block: int) -> None:
        """Bring `block` to the device; the one that was there leaves first, so that two are never there at once."""
        if block == self.active:
            return
        if f"block_{block}" not in self.parts:
            raise ValueError(f"there is no block {block}; known parts: {', '.join(self.parts)}")
        self.retire()
        self._fetch(f"block_{block}")
        self.active = block

    def prefetch(self, block: int) -> None:
        """Begin to bring a waiting block while the active one works; `activate` then takes it as it would be without.

        Until then the device holds two blocks, each with its weights, moments and average; `usage` counts one.
        """
        part = f"block_{block}"
        if part not in self.parts:
            raise ValueError(f"there is no block {block}; known parts: {', '.join(self.parts)}")
        if block != self.active and (self._ahead is None or self._ahead[0] != part):
            self._ahead = part, self._reader.submit(self._read, part, self._on_disk(part))

    def retire(self) -> None:
        """Send the active block to the store."""
        if self.active is not None:
            self._retire(f"block_{self.active}")
        self.active = None

    @contextlib.contextmanager
    def averages(self) -> Iterator[None]:
        """Within it, weights are their moving averages; within itself it changes nothing."""
        if self.averaged:
            yield
            return
        resident = ["shared"] + ([f"block_{self.active}"] if self.active is not None else [])
        self._swap(resident)
        self.averaged = True
        try:
            yield
        finally:
            self._swap(["shared"] + ([f"block_{self.active}"] if self.active is not None else []))
            self.averaged = False

    def tensors(self, part: str) -> dict[str, Tensor]:
        """All tensors of a part by name, wherever it is; a part on disk is read, and freed with the result."""
        if self._on_disk(part):
            return load_file(self._file(part))
        return self._live(part)

    def weights(self) -> dict[str, Tensor]:
        """All weights as they are used now (averages within `averages()`), by the names of the model's state_dict.

        Copies on the host; waiting blocks stay where they are.
        """
        gathered: dict[str, Tensor] = {}
        for part in self.parts:
            prefix = "" if part == "shared" else f"blocks.{part.removeprefix('block_')}."
            for name, t in self._used(part).items():
                gathered[prefix + name] = t.detach().to("cpu", copy=True).contiguous()
        return gathered

    @contextlib.contextmanager
    def borrowed(self, block: int) -> Iterator[None]:
        """Within it the weights of `block` are on the device too, without its optimizer state, for a forward pass."""
        part = f"block_{block}"
        if block == self.active:
            yield
            return
        held = self.parts[part].state_dict(keep_vars=True)
        own = {name: t.data for name, t in held.items()}
        try:
            for name, t in self._used(part).items():
                held[name].data = t.detach().to(self.device)
            yield
        finally:
            for name, t in own.items():
                held[name].data = t

    def load(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Replace a part's tensors; it stays where it is. Raises: ValueError if names or shapes differ."""
        live = self._live(part)
        shapes = {name: t.shape for name, t in self.tensors(part).items()}
        if shapes != {name: t.shape for name, t in tensors.items()}:
            wrong = sorted(set(shapes) ^ set(tensors)) or sorted(n for n in shapes if shapes[n] != tensors[n].shape)
            raise ValueError(f"part {part!r} does not fit this model: {', '.join(wrong[:4])}")
        self._prefetched()
        if self._on_disk(part):
            save_file(_apart(tensors), self._file(part))
            return
        for name, t in live.items():
            t.data = tensors[name].to(t.device, t.dtype)

    def usage(self) -> Usage:
        """Bytes of weights, gradients, moments and averages, on the device and on the host."""
        groups: dict[str, list[Tensor]] = {"weights": [], "gradients": [], "moments": [], "averages": []}
        for part, module in self.parts.items():
            for name, t in self._live(part).items():
                groups[_category(name)].append(t)
            groups["gradients"] += [p.grad for p in module.parameters() if p.grad is not None]
        return Usage({name: count_bytes(ts, self.device) for name, ts in groups.items()})

    def _live(self, part: str) -> dict[str, Tensor]:
        """The tensors that move with a part, each once; what several parts hold is the shared part's."""
        module = self.parts[part]
        own = [*module.named_parameters(), *module.named_buffers()]
        tensors = {f"weight/{name}": t for name, t in own if id(t) not in self._common}
        if part == "shared":
            tensors |= {f"weight/{name}": t for name, t in self._common.values()}
        return tensors | (self.optimizers[part].tensors() if part in self.optimizers else {})

    def _used(self, part: str) -> dict[str, Tensor]:
        """A part's weights by their names in its state_dict: averages of a part that waits within `averages()`."""
        waits = part not in ("shared", f"block_{self.active}")
        kind, live = "ema" if self.averaged and waits else "weight", self._live(part)
        held = self.parts[part].state_dict(keep_vars=True)
        first = {id(t): key.removeprefix("weight/") for key, t in live.items() if key.startswith("weight/")}
        keys = {}  # a tied weight is stored under its first name
        for name, t in held.items():
            if id(t) in first:
                key = f"{kind}/{first[id(t)]}"
                keys[name] = key if key in live else f"weight/{first[id(t)]}"
        common = {name: t for name, t in held.items() if name not in keys}
        if not self._on_disk(part):
            return {name: live[key] for name, key in keys.items()} | common
        with safe_open(self._file(part), "pt") as file:
            return {name: file.get_tensor(key) for name, key in keys.items()} | common

    def _fetch(self, part: str) -> None:
        name, fetched = self._prefetched()
        if name != part:
            fetched = load_file(self._file(part), device=str(self.device)) if self._on_disk(part) else {}
        live = self._live(part)
        for name, t in fetched.items():
            live[name].data = t
            if t.is_cuda:
                t.record_stream(torch.cuda.current_stream(t.device))  # it may have come by the stream of `_read`
        self._place(part, self.device)
        if self.averaged:
            self._swap([part])

    def _prefetched(self) -> tuple[str, dict[str, Tensor]]:
        """What was read ahead, and whose it is; waited for also where nobody wants it: its file may be written next."""
        ahead, self._ahead = self._ahead, None
        return (ahead[0], ahead[1].result()) if ahead else ("", {})

    def _read(self, part: str, on_disk: bool) -> dict[str, Tensor]:
        """A waiting part's tensors on the device; on a GPU by a stream of their own, so that none waits for others."""
        with torch.cuda.stream(self._stream):
            if on_disk:
                return load_file(self._file(part), device=str(self.device))
            return {name: t.data.to(self.device) for name, t in self._live(part).items()}

    def _retire(self, part: str) -> None:
        if self.averaged:
            self._swap([part])
        if self.store == "disk":
            live = self._live(part)
            save_file(_apart(live), self._file(part))
            for t in live.values():
                t.data = torch.empty(0, dtype=t.dtype)
        else:
            self._place(part, torch.device("cpu"))

    def _place(self, part: str, device: torch.device) -> None:
        for t in self._live(part).values():
            t.data = t.data.to(device)

    def _swap(self, parts: list[str]) -> None:
        for part in parts:
            if part in self.optimizers:
                self.optimizers[part].swap_ema()

    def _on_disk(self, part: str) -> bool:
        return self.store == "disk" and part != "shared" and part != f"block_{self.active}"

    def _file(self, part: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{part}.safetensors"


def _common(model: DiffusionBlocks, parts: dict[str, nn.Module]) -> dict[int, tuple[str, Tensor]]:
    """Frozen tensors and buffers that several parts hold, by identity, each with its first name in the model: a table
    of rotary angles, made once. They stay on the device, since no part may take them along."""
    seen: dict[int, str] = {}
    several = set()
    for part, module in parts.items():
        for t in {id(t): t for t in (*module.parameters(), *module.buffers())}:
            if seen.setdefault(t, part) != part:
                several.add(t)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(t): (name, t) for name, t in named if id(t) in several}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as a file holds them."""
    found, seen = {}, set()
    for name, t in tensors.items():
        dense = t.detach().contiguous()
        memory = dense.untyped_storage().data_ptr()
        found[name] = dense.clone() if memory in seen else dense
        seen.add(memory)
    return found


def _category(name: str) -> str:
    return {"weight": "weights", "ema": "averages"}.get(name.split("/")[0], "moments")


@torch.no_grad()
def handed(model: DiffusionBlocks, residency: Residency, block: int, x: Tensor) -> Tensor | None:
    """What its helpers hand `block`: each is borrowed in its turn."""
    made = None
    for b in model.helpers(block):
        with residency.borrowed(b):
            made = model.hand_on(b, x, made)
    return made
