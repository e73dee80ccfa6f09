"""A trainer on disk and back: which tensors and numbers make it bit-exact."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from ..checkpoint import files
from ..checkpoint.files import CheckpointError
from ..checkpoint.layout import Layout
from ..checkpoint.manifest import digest
from ..checkpoint.shards import INDEX
from ..noise.density import Tabulated
from ..noise.information import InformationMeter
from ..noise.partition import Partition
from ..offload.offloader import Offloader
from ..offload.part import Part
from ..offload.uninterrupted import uninterrupted
from ..offloadable import plain_name
from .merge import join
from .mesh import GROUP

if TYPE_CHECKING:
    from .trainer import Trainer

RECIPE = ("lr", "total_steps", "warmup", "weight_decay", "clip", "ema")  # and FIXED: for blocks of one model
FIXED = (
    "seed",
    "visit",
    "branch",
    "accumulate",
    "precision",
    "moments",
    "adapt",
)  # settings that a checkpoint can't go on without
IMPLEMENTATION = ("capturable", "differentiable")  # an optimizer's switches that leave its state as it is


def save(trainer: Trainer, folder: Path, extra: dict[str, Any]) -> None:
    """Write the parts that changed since the last save, and commit."""
    offloader, loader, whole = trainer.offloader, trainer.loader, folder
    folder = trainer.mesh.group_folder(folder)
    offloader.check_in_charge("save")
    if done := trainer.batches_done % trainer.config.accumulate:
        raise RuntimeError(
            f"save: {done} of a step's {trainer.config.accumulate} batches are done, and their gradients are in no "
            "checkpoint: save after a step whose output has a grad_norm"
        )
    if not trainer.mesh.is_first:
        return
    if folder != whole and (whole / files.MANIFEST).exists():
        raise CheckpointError(f"{whole} holds a checkpoint of one group: save to another folder")
    if folder == whole and any(whole.glob(f"{GROUP}*")):
        raise CheckpointError(f"{whole} holds checkpoints of groups: save to another folder")
    before = _files(folder)
    if others := {part for part in before or () if part.startswith("block_")} - trainer.own_parts:
        raise CheckpointError(
            f"{folder} holds {', '.join(sorted(others))}, which this trainer doesn't train and its checkpoint would "
            "lose: save to another folder"
        )
    written = trainer.changed if trainer.saved == (folder, before) else trainer.own_parts
    parts: dict[str, Any] = {part: lambda part=part: offloader.source(part) for part in written}
    if trainer.meter:
        prior = {name: torch.tensor(v, dtype=torch.float64) for name, v in vars(trainer.meter.prior).items()}
        parts["noise"] = {"sums": trainer.meter.sums} | prior
    state = {
        "step": trainer.steps_done,
        "batches": trainer.batches_done,
        "settings": _settings(trainer),
        "recipe": _recipe(trainer),
        "scalars": {name: offloader.parts[name].scalars() for name in sorted(trainer.own_parts)},
        "partition": trainer.model.partition.to_dict(),
        "shape": None if trainer.model.target.shape is None else list(trainer.model.target.shape),
        "positions": {"loader": loader.state_dict()} if hasattr(loader, "state_dict") else trainer.positions,
        "extra": extra,
    }
    manifest = files.save(folder, parts, state, keep=trainer.own_parts - parts.keys())
    trainer.changed.clear()
    trainer.saved = folder, manifest.parts


@uninterrupted()  # else some parts would be of the checkpoint, and some not
def load(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Bring a trainer to where `folder` was saved; returns the extra values."""
    trainer.offloader.check_in_charge("load")
    folder, manifest = _find(trainer, folder)
    state = manifest.state
    _check_settings(state.get("settings", {}), _settings(trainer), folder)
    _check_blocks(trainer, manifest, folder)
    here = [name for name in trainer.offloader.parts if name in manifest.parts]
    found = files.inspect_parts(folder, manifest, here)
    for name in here:  # all before the first is replaced: nothing is half loaded
        trainer.offloader.check_unwritten(name)
        _check_part(trainer.offloader.parts[name], found[name].layout, f"{folder}: {name}")
    for name in here:
        if not trainer.offloader.adopt(name, found[name]):
            _load(trainer.offloader, name, files.load_part(folder, name, manifest=manifest), folder)
        trainer.offloader.parts[name].take_scalars(state["scalars"].get(name, {}))
    trainer.model.begun |= {b for b in range(len(trainer.model.blocks)) if f"block_{b}" in here}
    trainer.meter = _meter(folder, manifest, trainer.device) if "noise" in manifest.parts else None
    _take_over(trainer.model, state)
    trainer.steps_done, trainer.batches_done = state["step"], state["batches"]
    trainer.loader, trainer.positions = None, dict(state["positions"])
    trainer.watch.forget()
    trainer.changed.clear()
    trainer.saved = folder, manifest.parts
    extra: dict[str, Any] = state["extra"]
    return extra


def _find(trainer: Trainer, folder: Path) -> tuple[Path, files.Manifest]:
    """Return where a trainer's checkpoint is, and its manifest: its own group's, or that of groups joined."""
    groups = [path.parent for path in sorted(folder.glob(f"{GROUP}*/{files.MANIFEST}"))]
    if not groups or (folder / files.MANIFEST).exists():
        if (folder / INDEX).exists() and not (folder / files.MANIFEST).exists():
            raise CheckpointError(f"{folder} holds a model without the state of its training: diffusionblocks.load")
        return folder, files.read_state(folder)
    found = {group: files.read_state(group) for group in groups}
    for group, manifest in found.items():
        if manifest.parts.keys() == trainer.own_parts:
            return group, manifest
    return folder, join(groups, extra=found[groups[0]].state["extra"])


def _check_blocks(trainer: Trainer, manifest: files.Manifest, folder: Path) -> None:
    """Raise CheckpointError unless a checkpoint has all that a trainer trains."""
    if "noise" in manifest.parts and len(trainer.own) < len(trainer.model.blocks):
        raise CheckpointError(
            f"{folder} adapts its partition to what all blocks measure: train all of them here, or begin anew with its "
            "density and adapt=False"
        )
    if not (missing := trainer.own_parts - manifest.parts.keys()):
        return
    saved = len(manifest.state["partition"]["layers"])
    why = f"it is of a model of {saved} blocks, this one has {len(trainer.model.blocks)}"
    if saved == len(trainer.model.blocks):
        why = "other machines train that; merge their folders with this one, or set train_blocks to what it holds"
    raise CheckpointError(f"{folder} has no {', '.join(sorted(missing))}: {why}")


def _meter(folder: Path, manifest: files.Manifest, device: torch.device) -> InformationMeter:
    """Return the saved meter, whose prior isn't this model's density if that was adapted before."""
    stored = files.load_part(folder, "noise", manifest=manifest)
    prior = Tabulated(tuple(stored["log_edges"].tolist()), tuple(stored["mass"].tolist()))
    meter = InformationMeter(prior, device=device)
    meter.sums.copy_(stored["sums"])
    return meter


def _files(folder: Path) -> Any:
    """Return the files of the checkpoint in a folder, if there is any: another trainer may have saved there since."""
    return files.read_state(folder).parts if (folder / files.MANIFEST).exists() else None


def _take_over(model: DiffusionBlocks, state: dict[str, Any]) -> None:
    model.partition = Partition.from_dict(state["partition"])
    model.target.shape = None if state["shape"] is None else tuple(state["shape"])


def _check_part(part: Part, layout: Layout, where: str) -> None:
    """Raise CheckpointError unless a part's stored tensors have the model's names, shapes and dtypes."""
    tensors = {span.name: span for span in layout.spans}
    tensors |= {name: tensors[twin] for name, twin in layout.tied}
    try:
        part.check(tensors)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    own = part.tensors()
    for name in (n for n in own.keys() & tensors.keys() if n.startswith("weight/")):
        if own[name].dtype != tensors[name].dtype:
            raise CheckpointError(
                f"{where}: {name} is {tensors[name].dtype}, the model's {own[name].dtype}: convert it"
            )


def _load(offloader: Offloader, part: str, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        offloader.load(part, tensors)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {part}: {error}") from error


def _recipe(trainer: Trainer) -> dict[str, Any]:
    """Return all that two trainers must have in common to train blocks of one model."""
    config = dataclasses.asdict(trainer.config) | {"total_steps": trainer.config.total_steps}
    shapes = {
        f"{name}/{key}": [list(t.shape), str(t.dtype)]
        for name, part in trainer.offloader.parts.items()
        for key, t in part.tensors().items()
        if key.startswith("weight/")
    }
    values = {name: config[name] for name in RECIPE}
    values |= {"shared": trainer.model.shared, "context": trainer.model.context, "network": digest(shapes)}
    modules = (module for module in trainer.model.modules() if not hasattr(module, "_orig_mod"))
    kinds = Counter(type(module).__name__ for module in modules)
    trained = {name: _trained(module) for name, module in trainer.model.parts().items()}
    return values | {"modules": dict(sorted(kinds.items())), "trained": trained} | _optimizers(trainer)


def _trained(module: nn.Module) -> str:
    named = dict(module.named_parameters())
    names = [plain_name(name) for name, p in named.items() if p.requires_grad]
    return f"{len(names)} of {len(named)} parameters ({digest({'names': names})[:8]})"


def _optimizers(trainer: Trainer) -> dict[str, Any]:
    """Return the optimizers' settings: defaults by class, and groups' by the shapes that the optimizer was made for,
    which are all that its maker sees of a block."""
    values: dict[str, Any] = {}
    for optimizer in trainer.optimizers.values():
        groups = [
            group | {"lr": peak} for group, peak in zip(optimizer.param_groups, trainer.peaks[optimizer], strict=True)
        ]
        shapes = {"shapes": [list(p.shape) for group in groups for p in group["params"]]}
        values[type(optimizer).__name__] = _plain(optimizer.defaults)
        values[f"groups of {len(shapes['shapes'])} parameters ({digest(shapes)[:8]})"] = [_plain(g) for g in groups]
    return values


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that an update depends on as JSON values; of other objects their type."""
    left_out = ("params", "seed", "foreach", "fused", *IMPLEMENTATION)
    known = {name: value for name, value in settings.items() if name not in left_out}
    text = json.dumps(known, default=lambda value: float(value) if isinstance(value, Tensor) else type(value).__name__)
    plain: dict[str, Any] = json.loads(text, parse_constant=str)  # infinity is no JSON
    return plain


def _settings(trainer: Trainer) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(trainer.config), default=str))
    kinds = sorted(set(map(_kind, trainer.optimizers.values())))
    return {name: values[name] for name in FIXED} | {"optimizer": " ".join(kinds), "averages": trainer.config.ema > 0}


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Return an optimizer's class and the switches that aren't at its defaults: its state depends on them."""
    offered = inspect.signature(type(optimizer)).parameters.values()
    switches = {p.name: p.default for p in offered if isinstance(p.default, bool) and p.name not in IMPLEMENTATION}
    own = {name: optimizer.defaults.get(name, default) for name, default in switches.items()}
    turned = [f"{name}={value}" for name, value in own.items() if value != switches[name]]
    return f"{type(optimizer).__name__}({', '.join(turned)})" if turned else type(optimizer).__name__


def _check_settings(saved: dict[str, Any], own: dict[str, Any], folder: Path) -> None:
    for name, value in own.items():
        if saved.get(name, value) != value:
            raise CheckpointError(
                f"{folder} was saved with {name}={saved.get(name)!r}, the trainer has {name}={value!r}: they must be "
                "equal to go on from it"
            )


def load_averages(offloader: Offloader, folder: Path) -> dict[str, Any]:
    """Give a model that waits without optimizers the averaged weights of a checkpoint; return its extra values.

    A process that trains may save meanwhile: then the newer checkpoint is read.
    Raises: CheckpointError as `load`.
    """
    while True:
        manifest = files.read_state(folder)
        try:
            for part in offloader.parts:
                stored = files.load_part(folder, part, manifest=manifest)
                names = [name for name in stored if name.startswith("weight/")]
                averages = {
                    n: stored.get(n.replace("weight/", "ema/", 1), stored[n]).to(stored[n].dtype) for n in names
                }
                _load(offloader, part, averages, folder)
        except CheckpointError:
            if files.read_state(folder).saves == manifest.saves:
                raise
            continue
        _take_over(offloader.model, manifest.state)
        extra: dict[str, Any] = manifest.state["extra"]
        return extra
