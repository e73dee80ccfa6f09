"""Which block is on the device: everything of the others (weights, optimizer state, averages) waits on the host or on
disk."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..blocks import DiffusionBlocks
from .memory import Usage
from .part import Part, apart, common_tensors, usage_of

PLACES = (None, "cpu", "disk")


class Offloader:
    """Keeps one block and the shared part on `device`; all other blocks wait.

    While it is in charge, `model.offloader` is set: the model brings blocks by itself, and its state_dict gathers them.

    Args:
        model: The model.
        optimizers: One torch optimizer per part (`DiffusionBlocks.parts`), whose state tensors move with it; or none.
        device: Where the active block is.
        offload: Where the others wait. None: on the device, too. "cpu": in host memory. "disk": in safetensors files
            under `folder`, none of their tensors in memory; where the device is the host itself, only this frees any.
        folder: For offload="disk".

    Raises: ValueError if offload is unknown, "disk" comes without a folder, optimizers name no part, or another
        Offloader is in charge.

    Examples:
        >>> import torch, diffusionblocks as db
        >>> model = db.from_layers([torch.nn.Linear(8, 8) for _ in range(2)], stem=torch.nn.Linear(4, 8),
        ...                        head=torch.nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=2)
        >>> optimizers = {name: torch.optim.SGD([p for p in part.parameters() if p.requires_grad], 0.1)
        ...               for name, part in model.parts().items()}
        >>> offloader = db.Offloader(model, optimizers, device="cpu", offload="cpu")
        >>> model.loss(1, torch.randn(2, 4), torch.tensor([0, 2])).loss.backward()  # brings block 1
        >>> offloader.active
        1
    """

    def __init__(
        self,
        model: DiffusionBlocks,
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
        *,
        device: torch.device | str,
        offload: str | None = "cpu",
        folder: str | Path | None = None,
    ):
        if offload not in PLACES:
            raise ValueError(f"offload must be None, 'cpu' or 'disk', got {offload!r}")
        if offload == "disk" and folder is None:
            raise ValueError("offload='disk' needs a folder to keep waiting blocks in")
        check_free(model)
        self.model, self.device, self.offload = model, torch.device(device), offload
        self.folder = Path(folder).absolute() if folder is not None else None
        modules, optimizers = model.parts(), {} if optimizers is None else optimizers
        if not isinstance(optimizers, Mapping) or not modules.keys() >= optimizers.keys():
            given = ", ".join(optimizers) if isinstance(optimizers, Mapping) else type(optimizers).__name__
            raise ValueError(f"optimizers must be a dict by part, of {', '.join(modules)}; got {given}")
        common = common_tensors(model, modules)
        self.parts = {
            name: Part(module, optimizers.get(name), common, owns_common=name == "shared")
            for name, module in modules.items()
        }
        self.active: int | None = None
        self.averaged = False
        self._name = uuid.uuid4().hex  # in its files, so that no other's are taken for them
        self._reader = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ahead: tuple[str, Future[dict[str, Tensor]]] | None = None
        if offload == "disk" and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, part in self.parts.items():
                part.place(self.device) if name == "shared" or offload is None else self._retire(name)
        except BaseException:  # e.g. a full disk: blocks that are in files already come back
            parts = list(self.parts)
            for before in parts[1 : parts.index(name)] if offload == "disk" else []:
                self.parts[before].take(self._load_file(before))
            raise
        model.offloader = self

    def check_in_charge(self, what: str) -> None:
        """Raise RuntimeError if the model was released, or its weights are averages now: nothing may train them."""
        if self.model.offloader is not self:
            raise RuntimeError(f"{what}: the model was released; make a new Trainer or Offloader for it")
        if self.averaged:
            raise RuntimeError(f"{what}: the weights are their averages now; leave averages() first")

    def activate(self, block: int) -> None:
        """Bring a block to the device; the one that was there leaves first, so that two are never there at once."""
        if block == self.active:
            return
        part = self._check_block(block)
        if self.offload:
            self.retire()
            self._fetch(part)
        self.active = block

    def prefetch(self, block: int) -> None:
        """Begin to bring a waiting block while the active one works; `activate` then takes it.

        Until then the device holds two blocks, each with its optimizer state; `usage` counts one.
        """
        part = self._check_block(block)
        if self.offload and block != self.active and (self._ahead is None or self._ahead[0] != part):
            self._ahead = part, self._reader.submit(self._read, part, self._on_disk(part))

    def retire(self) -> None:
        """Send the active block away."""
        if self.active is not None and self.offload:
            self._retire(f"block_{self.active}")
        self.active = None

    def release(self) -> None:
        """Bring everything to the host's memory and let go of the model, which then is an ordinary module again.

        Raises: RuntimeError within averages(), or if it was released already.
        """
        self.check_in_charge("release")
        for name, part in self.parts.items():
            if self._on_disk(name):
                part.take(self._load_file(name))
            part.place(torch.device("cpu"))
        self.active, self.model.offloader = None, None

    @contextlib.contextmanager
    def averages(self) -> Iterator[None]:
        """Within it, weights are their moving averages; within itself it changes nothing."""
        if self.averaged:
            yield
            return
        self._swap()
        self.averaged = True
        try:
            yield
        finally:
            self._swap()
            self.averaged = False

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return all tensors of a part by name, wherever it is; a part on disk is read, and freed with the result."""
        return self._load_file(part) if self._on_disk(part) else self.parts[part].tensors()

    def weights(self) -> dict[str, Tensor]:
        """Return all weights as they are used now (averages within `averages()`), by their names in the state_dict.

        Those of waiting blocks and of a GPU are copies on the host; blocks stay where they are.
        """
        return {name: t for part in self.parts for name, t in self.part_weights(part).items()}

    def part_weights(self, name: str) -> dict[str, Tensor]:
        """Return one part's weights as `weights` does."""
        prefix = "" if name == "shared" else f"blocks.{name.removeprefix('block_')}."
        averaged = self.averaged and not self._is_resident(name)
        weights = self.parts[name].weights(self.tensors(name), averaged=averaged)
        return {prefix + key: t.detach().to("cpu", copy=True).contiguous() for key, t in weights.items()}

    def load(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace a part's tensors; it stays where it is. Raises: ValueError if names or shapes differ."""
        self._prefetched()
        self.parts[part].check(tensors)
        where = self.device if self._is_resident(part) else torch.device("cpu")
        home = self.parts[part].home
        self.parts[part].replace({name: t.to(home(name, where), copy=True) for name, t in tensors.items()})
        if self._on_disk(part):
            self._save_file(part)
            self.parts[part].empty()

    def usage(self) -> Usage:
        """Return bytes of weights, gradients, moments and averages on the device."""
        here = [part for name, part in self.parts.items() if not self._on_disk(name)]
        return usage_of(here, self.device)

    def _check_block(self, block: int) -> str:
        if f"block_{block}" not in self.parts:
            raise ValueError(f"there is no block {block}; known parts: {', '.join(self.parts)}")
        return f"block_{block}"

    def _is_resident(self, part: str) -> bool:
        return self.offload is None or part in ("shared", f"block_{self.active}")

    def _on_disk(self, part: str) -> bool:
        return self.offload == "disk" and not self._is_resident(part)

    def _fetch(self, name: str) -> None:
        part = self.parts[name]
        ahead, fetched = self._prefetched()
        if ahead != name:
            fetched = self._load_file(name, self.device) if self._on_disk(name) else {}
        part.take(fetched)
        for t in fetched.values():
            if t.is_cuda:
                t.record_stream(torch.cuda.current_stream(t.device))  # it may have come by the stream of `_read`
        part.place(self.device)
        if self.averaged and self.offload:
            part.swap()

    def _prefetched(self) -> tuple[str, dict[str, Tensor]]:
        """Finish a pending prefetch and return (part, tensors). Also waits when the result is dropped, because its file
        may be overwritten next."""
        ahead, self._ahead = self._ahead, None
        return (ahead[0], ahead[1].result()) if ahead else ("", {})

    def _read(self, name: str, on_disk: bool) -> dict[str, Tensor]:
        """Return a waiting part's tensors on the device; on a GPU by a stream of their own, so that none waits for
        others."""
        with torch.cuda.stream(self._stream):
            if on_disk:
                return self._load_file(name, self.device)
            part = self.parts[name]
            return {key: t.data.to(part.home(key, self.device)) for key, t in part.tensors().items()}

    def _retire(self, name: str) -> None:
        part = self.parts[name]
        if self.averaged:
            part.swap()
        try:
            if self.offload == "disk":
                self._save_file(name)
        except BaseException:
            if self.averaged:
                part.swap()  # it stays, and as it was
            raise
        part.empty() if self.offload == "disk" else part.place(torch.device("cpu"))

    @torch._disable_dynamo  # as torch.optim does: the public decorator imports the compiler at once, 1.7 s
    def _swap(self) -> None:
        for name, part in self.parts.items():
            if self._is_resident(name):
                part.swap()

    def _save_file(self, part: str) -> None:
        save_file(apart(self.parts[part].tensors()), self._file(part), metadata={"owner": self._name})

    def _load_file(self, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read a waiting part's file. Raises: RuntimeError if another Offloader has written it since."""
        with safe_open(self._file(part), framework="pt") as file:
            owner = (file.metadata() or {}).get("owner")
        if owner != self._name:
            raise RuntimeError(f"another Offloader has written to {self.folder} since: give each a folder of its own")
        return load_file(self._file(part), device=str(device))

    def _file(self, part: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{part}.safetensors"


def check_free(model: DiffusionBlocks) -> None:
    """Raise ValueError if an Offloader is in charge of a model's blocks."""
    if model.offloader is not None:
        raise ValueError("this model's blocks are managed already: call model.offloader.release() first")
