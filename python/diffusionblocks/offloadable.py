"""A model some of whose blocks may be away: its state is gathered whole or refused, never half."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .card import write_card
from .checkpoint.shards import save_shards
from .noise.partition import Partition
from .targets.base import Target


class OffloaderLike(Protocol):
    """Moves blocks to the device and away (offload.offloader.Offloader)."""

    device: torch.device

    def activate(self, block: int) -> None: ...
    def at_work(self, block: int) -> contextlib.AbstractContextManager[None]: ...
    def averages(self) -> contextlib.AbstractContextManager[None]: ...
    def weights(self) -> dict[str, Tensor]: ...
    def part_weights(self, part: str) -> dict[str, Tensor]: ...


class Offloadable(nn.Module):
    """Base class of models whose blocks an Offloader moves. The Offloader sets `offloader` while it is in charge."""

    partition: Partition
    target: Target
    shared: str

    def __init__(self) -> None:
        super().__init__()
        self.seed, self.step = 0, 0  # of the noise, where `loss` isn't given others
        self.origin: dict[str, Any] | None = None  # how `convert` made it, for `load`
        self.offloader: OffloaderLike | None = None
        self.begun: set[int] = set()  # blocks that a Trainer here trains or has loaded; none while there was no Trainer

    @property
    def device(self) -> torch.device:
        """Where the active block is."""
        return self.offloader.device if self.offloader else next(self.parameters()).device

    @torch._disable_dynamo  # as torch.optim does: the public decorator imports the compiler at once, 1.7 s
    def activate(self, block: int) -> None:
        """Bring a block to the device. Raises: ValueError if there is no such block."""
        self.partition.check_block(block)
        if self.offloader:
            self.offloader.activate(block)

    def at_work(self, block: int) -> contextlib.AbstractContextManager[None]:
        """Return a context within which a block is on the device, and stays there whatever other threads ask for.

        Raises: ValueError if there is no such block; RuntimeError if it isn't here and another thread evaluates."""
        self.partition.check_block(block)
        return self.offloader.at_work(block) if self.offloader else contextlib.nullcontext()

    def averages(self) -> contextlib.AbstractContextManager[None]:
        """Return a context within which weights are their moving averages, where the optimizer keeps any.

        A warning names blocks that are trained elsewhere: here they have the weights they began with."""
        if self.begun and (others := [b for b in range(self.partition.blocks) if b not in self.begun]):
            named = ", ".join(map(str, others))
            warnings.warn(
                f"blocks {named} of this model are trained elsewhere, by train_blocks or on other ranks, and have the "
                "weights they began with here: merge the folders first (`dblocks merge`, or load them all)",
                stacklevel=3,
            )
        return self.offloader.averages() if self.offloader else contextlib.nullcontext()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return all weights by name, as of any module; those of offloaded blocks as copies on the host."""
        state = super().state_dict(*args, **kwargs)
        if self.offloader:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            state.update({prefix + name: t for name, t in self.offloader.weights().items()})
        return state

    def part_weights(self, part: str) -> dict[str, Tensor]:
        """Return one part's weights as they are used now, by their names in state_dict."""
        if self.offloader:
            return self.offloader.part_weights(part)
        prefix = "" if part == "shared" else f"blocks.{part.removeprefix('block_')}."
        return {prefix + name: t for name, t in self.parts()[part].state_dict().items()}

    def parts(self) -> dict[str, nn.Module]:
        """Return what is trained, moved and saved as one."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights as any module does. Raises: RuntimeError while blocks are offloaded."""
        self._refuse("load_state_dict", "load the weights before the Trainer is made, or use trainer.load(folder)")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._refuse("move or convert", "its Trainer or Offloader does that; call its release() first")
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse("copying", "copy it before the Trainer is made, or call trainer.offloader.release() first")
        return self.__dict__.copy()

    def _refuse(self, what: str, instead: str) -> None:
        if self.offloader is not None:
            raise RuntimeError(f"{what}: this model's blocks are managed on {self.offloader.device}; {instead}")

    def facts(self) -> dict[str, Any]:
        """Return what sampling and training need beside weights, as JSON values."""
        return {
            "partition": self.partition.to_dict(),
            "shape": None if self.target.shape is None else list(self.target.shape),
            "seed": self.seed,
            "step": self.step,
        }

    def take_facts(self, facts: dict[str, Any]) -> None:
        """Take over what `facts` returned. Raises: ValueError if it is of a network cut in another way."""
        partition = Partition.from_dict(facts["partition"])
        if partition.layers != self.partition.layers:
            raise ValueError(
                f"the state is of blocks with {partition.layers} layers, this model's have {self.partition.layers}: "
                "build it with the same blocks"
            )
        self.partition, self.seed, self.step = partition, facts["seed"], facts["step"]
        self.target.shape = None if facts["shape"] is None else tuple(facts["shape"])

    def get_extra_state(self) -> Tensor:
        """Return `facts` as a uint8 tensor of JSON: it travels in state_dict."""
        return torch.frombuffer(bytearray(json.dumps(self.facts()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` returned."""
        self.take_facts(json.loads(bytes(state.tolist()).decode()))

    def save_pretrained(self, folder: str | Path, *, extra: dict[str, Any] | None = None) -> None:
        """Write the model's folder: a safetensors shard per block, model.safetensors.index.json and config.json.

        With averaged weights where there are any; offloaded blocks one at a time. `load` reads it. A model card,
        README.md, is added unless there is one that somebody wrote or changed. A warning names what was changed about a
        converted model's modules, which `load` builds anew.
        extra: JSON values of one's own, kept in config.json under "extra".
        Raises: CheckpointError or OSError if the folder can't be used.
        """
        config = {
            "model_type": "diffusionblocks",
            "origin": self.origin,
            "shared": self.shared,
            "facts": self.facts(),
            "frozen": [plain_name(name) for name, p in self.named_parameters() if not p.requires_grad],
            "extra": extra or {},
        }
        with self.averages():
            save_shards(folder, {part: functools.partial(self._plain_weights, part) for part in self.parts()}, config)
        write_card(self, Path(folder))
        if self.origin is not None:
            importlib.import_module(".convert.left_out", __package__).warn_of_left_out(self)

    def _plain_weights(self, part: str) -> dict[str, Tensor]:
        return {plain_name(name): t for name, t in self.part_weights(part).items()}

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model's folder to the Hugging Face Hub, and return the commit's address.

        options: private, token, commit_message and extra, as for integrations.hub.push_to_hub.
        """
        hub = importlib.import_module(".integrations.hub", __package__)  # which imports huggingface_hub
        return str(hub.push_to_hub(self, repo_id, **options))


def plain_name(name: str) -> str:
    """Return a module's or tensor's name as it is without torch.compile(module)."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def check_free(model: Any) -> None:
    """Raise TypeError unless it is a model of blocks, ValueError if an Offloader is in charge of them."""
    if not isinstance(model, Offloadable):
        raise TypeError(f"model must be DiffusionBlocks, from from_layers or convert, got {type(model).__name__}")
    if model.offloader is not None:
        raise ValueError("this model's blocks are managed already: call model.offloader.release() first")
