"""Which block is on the device: the others' weights, optimizer state and averages wait on the host or on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..blocks import DiffusionBlocks
from ..checkpoint.parts import Inspected, Stored
from ..offloadable import check_free
from .buffers import give_back
from .checks import check_apart, check_movable, check_unwritten
from .materialize import materialize
from .memory import Usage
from .part import Part, common_tensors, usage_of
from .slots import Slots
from .uninterrupted import exclusive
from .use import Use

PLACES = (None, "cpu", "disk")


class Offloader:
    """Keeps one block and the shared part on `device`; all other blocks wait.

    While it is in charge, `model.offloader` is set: the model brings blocks by itself, its state_dict gathers them, and
    the weights of waiting blocks read as NaN.

    Args:
        model: The model. Parts of it that are on the meta device get their memory and first values one at a time, by
            their modules' `reset_parameters()`: a network that never fits into memory can be trained.
        optimizers: One torch optimizer per part (`DiffusionBlocks.parts`), whose state tensors move with it; or none.
        device: Where the active block is.
        offload: Where the others wait. None: on the device, too. "cpu": in host memory. "disk": in safetensors files
            under `folder`, none of their tensors in memory; where the device is the host itself, only this frees any.
        folder: For offload="disk".
        slots: Buffers on the device. 1: blocks change places, the least memory. 2: the next block can come, and the one
            before leave, while one works (`prefetch`).
        pin: Page-lock host memory that a GPU copies from and to.

    Raises: ValueError for an unknown argument, "disk" without a folder, or a model that is managed already.

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
        slots: int = 1,
        pin: bool = True,
    ):
        if offload not in PLACES:
            raise ValueError(f"offload must be None, 'cpu' or 'disk', got {offload!r}")
        if offload == "disk" and folder is None:
            raise ValueError("offload='disk' needs a folder to keep waiting blocks in")
        if slots not in ((1, 2) if offload else (1,)) or isinstance(slots, bool):
            raise ValueError(f"slots must be 1, or 2 if blocks wait elsewhere, got {slots!r} and offload={offload!r}")
        check_free(model)
        self.model, self.device = model, torch.device(device)
        self.offload = offload if len(model.blocks) > 1 else None  # a lone block never waits
        self.folder = Path(folder).absolute() if folder is not None and offload == "disk" else None
        modules, optimizers = model.parts(), {} if optimizers is None else optimizers
        if not isinstance(optimizers, Mapping) or not modules.keys() >= optimizers.keys():
            given = ", ".join(optimizers) if isinstance(optimizers, Mapping) else type(optimizers).__name__
            raise ValueError(f"optimizers must be a dict by part, of {', '.join(modules)}; got {given}")
        check_apart(modules)
        common = common_tensors(model, modules)
        self.parts = {n: Part(m, optimizers.get(n), common, owns_common=n == "shared") for n, m in modules.items()}
        self.active: int | None = None
        self.use = Use()
        self._slots = Slots.of(slots, self.device, self.folder, pin) if self.offload else None
        try:
            for name, part in self.parts.items():
                if self.device.type != "meta":  # else nothing is to be computed
                    materialize(part.module)
                if self._slots:
                    check_movable(name, part.module)
                part.prepare()
                part.place(self.device) if self._is_resident(name) else self._send(name)
        except BaseException:  # e.g. a full disk: blocks that wait already come back
            self._release()
            raise
        model.offloader = self

    def check_in_charge(self, what: str) -> None:
        """Raise RuntimeError if the model was released, its weights are averages now, or a step is under way."""
        if self.model.offloader is not self:
            raise RuntimeError(f"{what}: the model was released; make a new Trainer or Offloader for it")
        self.use.check(what)

    @exclusive
    @torch.inference_mode(False)
    def activate(self, block: int) -> None:
        """Bring a block to the device; the one that was there leaves, unless there are slots for both.

        Raises: ValueError for no such block; RuntimeError while another thread evaluates; OSError, which loses none.
        """
        self._name(block)
        if block != self.active and self._slots:
            self.use.check_alone(f"block {block}")
            before = self.active
            self._unbind()
            try:
                self._bind(block)
            except BaseException:
                if before is not None and self._slots.holds(self._name(before)):
                    self._bind(before)
                raise
        self.active = block

    def at_work(self, block: int) -> contextlib.AbstractContextManager[None]:
        """Return a context within which a block is active, and no other thread may send it away."""
        return self.use.evaluating(partial(self.model.activate, block))

    @exclusive
    @torch.inference_mode(False)
    def prefetch(self, block: int) -> None:
        """With two slots, begin to bring a waiting block while the active one works; `activate` then takes it."""
        name = self._name(block)
        if self._slots and block != self.active:
            self._slots.prefetch(name)

    @exclusive
    @torch.inference_mode(False)
    def retire(self) -> None:
        """Send the active block away."""
        if self.active is not None and self._slots:
            name = self._name(self.active)
            self._unbind()
            self._slots.retire(name)
        self.active = None

    @exclusive
    def release(self) -> None:
        """Bring all to the host and let go of the model: an ordinary module, float32 where a Trainer had it in halves.

        Raises: RuntimeError within averages(), or if it was released already.
        """
        self.check_in_charge("release")
        self._release()
        self.active, self.model.offloader = None, None

    def averages(self) -> contextlib.AbstractContextManager[None]:
        """Return a context within which weights are their moving averages; within itself it changes nothing.

        Blocks that come within it leave without being written: what is done to their tensors meanwhile is dropped.
        Raises: RuntimeError while a step is under way, e.g. in another thread.
        """
        return self.use.averaged(self._swap)

    @exclusive
    def check_unwritten(self, part: str) -> None:
        """Raise RuntimeError if something was put into a part that waits elsewhere: it would be lost."""
        if self._slots and not self._is_resident(part):
            check_unwritten(part, self.parts[part], partial(self._slots.get, part))

    @exclusive
    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return all tensors of a part by name, wherever it is; a part on disk is read, and freed with the result."""
        if self._is_resident(part):
            return self.parts[part].tensors()
        assert self._slots is not None
        self.check_unwritten(part)
        return self._slots.get(part) | self.parts[part].staying()

    @exclusive
    def source(self, part: str) -> dict[str, Tensor] | Stored:
        """Return what a checkpoint of a part is written from: its tensors, or the file that holds them all."""
        if self._is_resident(part) or self.parts[part].staying():
            return self.tensors(part)
        assert self._slots is not None
        self.check_unwritten(part)
        return self._slots.source(part)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights as they are used now (averages within `averages()`), by their names in the state_dict.

        Those of waiting blocks and of a GPU are copies on the host; blocks stay where they are.
        """
        return {name: t for part in self.parts for name, t in self.part_weights(part).items()}

    @exclusive
    def part_weights(self, name: str) -> dict[str, Tensor]:
        """Return one part's weights as `weights` does."""
        prefix = "" if name == "shared" else f"blocks.{name.removeprefix('block_')}."
        averaged = bool(self.use.averages) and not self._is_resident(name)
        weights = self.parts[name].weights(self.tensors(name), averaged=averaged)
        dense = {key: t.contiguous() if t.layout == torch.strided else t for key, t in weights.items()}
        return {prefix + key: t.detach().to("cpu", copy=True) for key, t in dense.items()}

    @exclusive
    @torch.inference_mode(False)
    def load(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace a part's tensors; it stays where it is. Raises: ValueError if names or shapes differ."""
        self.check_unwritten(part)
        self.parts[part].check(tensors)
        copies = {id(t): t.detach().to("cpu", copy=True) for t in tensors.values()}  # one under several names stays one
        self.parts[part].replace({name: copies[id(t)] for name, t in tensors.items()})
        self.parts[part].prepare()
        if self._slots is None or part == "shared":
            self.parts[part].place(self.device)
            return
        self._send(part)
        if self.active is not None and part == self._name(self.active):
            self._bind(self.active)

    @exclusive
    def adopt(self, part: str, saved: Inspected) -> bool:
        """Link a waiting part to its file in a checkpoint, if it lies there as here; return whether that was done."""
        return self._slots is not None and not self._is_resident(part) and self._slots.adopt(part, saved)

    def usage(self) -> Usage:
        """Return bytes on the device: weights, gradients, moments, averages, and what else the slots hold."""
        here = [part for name, part in self.parts.items() if self._is_resident(name)]
        return usage_of(here, self.device, self._slots.buffers if self._slots else [])

    def _name(self, block: int) -> str:
        if f"block_{block}" not in self.parts:
            raise ValueError(f"there is no block {block}; known parts: {', '.join(self.parts)}")
        return f"block_{block}"

    def _is_resident(self, part: str) -> bool:
        return self.offload is None or part in ("shared", f"block_{self.active}")

    def _send(self, name: str) -> None:
        """Let a part wait, from wherever its tensors are."""
        assert self._slots is not None
        self._slots.put(name, self.parts[name].moving())
        self.parts[name].empty()
        give_back()

    def _bind(self, block: int) -> None:
        """Make a block's tensors those of a slot, where it comes if it isn't there."""
        assert self._slots is not None
        part = self.parts[self._name(block)]
        self.check_unwritten(self._name(block))
        part.bind(self._slots.bring(self._name(block)))
        if self.use.averages:
            part.swap()
        self.active = block

    def _unbind(self) -> None:
        """Let the active block's tensors go; their bytes stay in the slot until that is needed."""
        if self.active is None or self._slots is None:
            return
        if self.use.stepping:
            raise RuntimeError(f"block {self.active} can't leave within its step: bring another one between two steps")
        name = self._name(self.active)
        part = self.parts[name]
        if self.use.averages:
            part.swap()
        try:
            if not part.is_bound(self._slots.get(name)):  # state made since, or tensors replaced
                self._slots.put(name, part.moving())
            elif not self.use.averages:
                self._slots.touch(name)
        except BaseException:
            if self.use.averages:
                part.swap()  # it stays, and as it was
            raise
        part.empty()
        self.active = None

    def _release(self) -> None:
        for name, part in self.parts.items():
            if self._slots and name in self._slots.layouts:
                part.come_back(part.moving() if self._is_resident(name) else self._slots.get(name))
            else:
                part.place(torch.device("cpu"))
            part.widen()
        if self._slots:
            self._slots.close()

    @torch._disable_dynamo  # as torch.optim does: the public decorator imports the compiler at once, 1.7 s
    @exclusive
    def _swap(self) -> None:
        if self._slots and self.active is not None and not self.use.averages:
            self._slots.touch(self._name(self.active))  # it may have been trained before
        for name, part in self.parts.items():
            if self._is_resident(name):
                part.swap()
