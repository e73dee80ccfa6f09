"""Models as folders: a shard per block, an index and config.json; written by save_pretrained, read by `load`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..blocks import DiffusionBlocks
from ..checkpoint.manifest import CheckpointError
from ..checkpoint.shards import load_shards, read_index
from ..offloadable import plain_name
from .registry import rebuild

FOREIGN = {  # files of other folders, and how those are loaded
    "manifest.json": "holds a Trainer's checkpoint: Trainer(model).load(folder) loads it",
    "checkpoint/manifest.json": "is a run of `dblocks`: `dblocks export RUN --out FOLDER` writes its model",
    "adapter_config.json": "holds an adapter: peft.PeftModel.from_pretrained(network, folder) loads it",
    "model_index.json": "holds a pipeline: diffusers loads it, and convert(pipe.transformer, blocks=...) makes blocks",
}


def load(folder: str | Path, model: DiffusionBlocks | None = None) -> DiffusionBlocks:
    """Return the model that save_pretrained wrote, on the CPU, in evaluation mode.

    Args:
        folder: The model's folder.
        model: A model to load into, built by the code that built the saved one: for networks from `from_layers`, whose
            modules a file can't describe. Networks from `convert` are built anew.

    Raises:
        CheckpointError: The folder holds no model, a damaged one, or one that doesn't fit.
        ValueError: The model can't be built from its config alone: pass `model`.

    Examples:
        >>> import tempfile, torch, diffusionblocks as db
        >>> def build():
        ...     return db.from_layers([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)], stem=torch.nn.Linear(4, 8),
        ...                           head=torch.nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=2)
        >>> model, folder = build().eval(), tempfile.mkdtemp()
        >>> model.save_pretrained(folder)
        >>> again = db.load(folder, build())
        >>> x = torch.randn(2, 4)
        >>> torch.equal(model(x), again(x))
        True
    """
    try:
        config, _ = read_index(folder)
    except CheckpointError as error:
        if held := _foreign(Path(folder)):
            raise CheckpointError(f"{folder} {held}") from error
        raise
    if config.get("model_type") != "diffusionblocks":
        raise CheckpointError(f"{folder} holds another library's model; give a folder that save_pretrained wrote")
    rebuilt = model is None
    if model is None:
        if config.get("origin") is None:
            raise ValueError(
                f"{folder} holds a network from from_layers, which a file can't describe: build it by the same "
                "code and pass it, load(folder, model)"
            )
        model = rebuild(config["origin"])
    state: dict[str, Tensor] = {}
    for _, tensors in load_shards(folder):
        state |= tensors
    own = {plain_name(name): name for name in model.state_dict()}
    state = {own.get(name, name): t for name, t in state.items()}
    if rebuilt:
        _take_after(model, state, set(config.get("frozen", [])))
    _check(model, state, folder)
    model.load_state_dict(state, strict=False)
    model.begun = set()
    try:
        model.take_facts(config["facts"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}'s config isn't one that save_pretrained wrote ({error!r})") from error
    return model.eval()


def _take_after(model: DiffusionBlocks, state: dict[str, Tensor], frozen: set[str]) -> None:
    """Give a rebuilt model's parameters the dtypes that were saved, and leave the frozen ones out of training."""
    for name, p in model.named_parameters():
        if name in state and state[name].is_floating_point() and state[name].shape == p.shape:
            p.data = p.data.to(state[name].dtype)
        if name in frozen:
            p.requires_grad_(False)


def _foreign(folder: Path) -> str | None:
    """Return what a folder is or holds in place of a model of blocks, and how to load that; None if it isn't known."""
    if not folder.is_dir():
        return "is no folder: give one that save_pretrained wrote, or of the Hub huggingface_hub.snapshot_download(id)"
    for file, held in FOREIGN.items():
        if (folder / file).exists():
            return held
    try:
        config = json.loads((folder / "config.json").read_bytes())
        name = config["_class_name"] if "_class_name" in config else config["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return f"holds a {name}: {name}.from_pretrained(folder) loads it, and convert makes blocks of that"


def _check(model: DiffusionBlocks, state: dict[str, Tensor], folder: str | Path) -> None:
    own = {name: t for name, t in model.state_dict().items() if not name.endswith("_extra_state")}
    others = [
        f"{name} is {tuple(t.shape)} in the folder and {tuple(own[name].shape)} in the model"
        for name, t in state.items()
        if name in own and own[name].shape != t.shape
    ]
    narrowed = [
        f"{name} is {t.dtype} in the folder and {own[name].dtype} in the model"
        for name, t in state.items()
        if name in own and not _holds(own[name].dtype, t.dtype)
    ]
    faults = [
        _some("the model also has", [name for name in own if name not in state]),
        _some("the folder also has", [name for name in state if name not in own]),
        _some("of other shapes:", others),
        _some("of dtypes that the model's can't hold:", narrowed),
    ]
    if any(faults):
        raise CheckpointError(
            f"{folder} does not fit the model: {'; '.join(filter(None, faults))}. Build the model by the code that "
            "built the saved one, with the same blocks, sizes and dtypes"
        )


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Return whether every value of another dtype is one of this."""
    same_kind = dtype.is_floating_point == other.is_floating_point
    return same_kind and torch.promote_types(dtype, other) == dtype


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}" if names else ""
