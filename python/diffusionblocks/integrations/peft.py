"""transformers' networks with an adapter of peft (LoRA and its like) as blocks, and the adapter back as peft's folder.

Importing this module lets `convert` and `load` take networks that have an adapter.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from ..checkpoint.manifest import CheckpointError
from ..convert.checks import layers_name
from ..convert.families import FAMILIES, Family
from ..convert.registry import Converter, register
from ..convert.transformers import CONVERTERS, around
from ..offloadable import plain_name

WEIGHTS, WRITER = "adapter_model.safetensors", "diffusionblocks"
FRESH = (True, False, "gaussian", "orthogonal")  # init_lora_weights that leave the network's own weights alone


def save_adapter(model: DiffusionBlocks, folder: str | Path, block: int | None = None) -> None:
    """Write the trained adapter, averaged where there are averages, as a folder that PeftModel.from_pretrained loads.

    No network is built, and of offloaded blocks one at a time is in memory.

    Args:
        model: From `convert` with cond=0, of a network with an adapter.
        folder: For adapter_config.json and adapter_model.safetensors; made if missing. An adapter that this function
            wrote there is replaced.
        block: Write this block's adapter, for the network that `to_original(model, block)` gives of the same blocks
            without adapters. None: that of all layers, for the network that was converted.

    Raises: ValueError if the model or the block has no adapter, or more was trained than such a folder has a place
        for; CheckpointError if the folder holds another program's adapter, which is never overwritten.
    """
    _refuse_foreign(Path(folder))
    name, config = _adapter_of(model)
    chosen = list(range(len(model.blocks))) if block is None else [block]
    if block is not None:
        model.partition.check_block(block)
        config = _cut(config, model.partition.layers, block)
    elif model.shared == "per_block" and len(chosen) > 1:
        raise ValueError("each block has a stem and head of its own: save_adapter(..., block=...) saves one block's")
    paths = _paths(model, chosen)
    tensors: dict[str, Tensor] = {}
    with model.averages():
        for part in ("shared", *(f"block_{b}" for b in chosen)):
            tensors |= _part_of_adapter(model, part, name, config, paths)
    if not tensors:
        raise ValueError(f"block {block} has no adapter: the config's layers_to_transform leaves its layers out")
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt", "writer": WRITER})
    config.inference_mode = True  # as peft's own save_pretrained
    config.save_pretrained(str(folder))


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder")
    weights = folder / WEIGHTS
    if weights.exists():
        with safe_open(weights, "pt") as file:
            foreign = (file.metadata() or {}).get("writer") != WRITER
    else:
        foreign = (folder / "adapter_config.json").exists()
    if foreign:
        raise CheckpointError(f"{folder} holds an adapter that save_adapter didn't write; give another folder")


def _part_of_adapter(
    model: DiffusionBlocks, part: str, name: str, config: Any, paths: dict[str, str]
) -> dict[str, Tensor]:
    """Return what of a part belongs into a peft folder, by the names there."""
    weights = model.part_weights(part)
    saved = peft.get_peft_model_state_dict(model, weights, name, save_embedding_layers=False)
    saved |= {key: t for key, t in weights.items() if _is_inside(_renamed(key, paths), config.modules_to_save or ())}
    kept = {id(t) for t in saved.values()}
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    if lost := [key for key, t in weights.items() if key in trained and id(t) not in kept]:
        raise ValueError(
            f"{', '.join(lost[:3])}: trained, and no part of the adapter. Name the module in the config's "
            "modules_to_save, or freeze it before convert"
        )
    return {f"base_model.model.{_renamed(key, paths)}": t.contiguous() for key, t in saved.items()}


def _adapter_of(model: DiffusionBlocks) -> tuple[str, Any]:
    configs = getattr(model, "peft_config", {})
    if model.origin is None or not configs:
        raise ValueError(
            "save_adapter needs a model that `convert` made, after this module was imported, of a network with an "
            "adapter; one that is trained already can be converted again and its checkpoint loaded"
        )
    if model.origin["options"].get("cond") != 0:
        raise ValueError(
            "the layers have AdaLN conditioning, which a peft folder has no place for: convert with cond=0, or keep "
            "the model as blocks (save_pretrained and load)"
        )
    name, config = next(iter(configs.items()))
    return name, copy.deepcopy(config)


def _cut(config: Any, layers: Sequence[int], block: int) -> Any:
    """Return an adapter's config for a network of one block's layers, which are numbered from 0 there."""
    first, own = sum(layers[:block]), layers[block]
    patterns: list[str] = []
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save"):
        given = getattr(config, name, None) or ()
        patterns += [given] if isinstance(given, str) else [*given]
    if first and (numbered := [pattern for pattern in patterns if re.search(r"(^|\W)\d", pattern)]):
        raise ValueError(
            f"{numbered[0]!r} numbers layers of the whole network, those of block {block} are numbered from 0: choose "
            "layers by layers_to_transform, or save the adapter of all layers (block=None)"
        )
    config.base_model_name_or_path = None  # that network is in no repository
    if (chosen := getattr(config, "layers_to_transform", None)) is not None:
        chosen = [chosen] if isinstance(chosen, int) else chosen
        config.layers_to_transform = [i - first for i in chosen if first <= i < first + own]
    return config


def _paths(model: DiffusionBlocks, chosen: Sequence[int]) -> dict[str, str]:
    """Return which of the model's names begin where in the network: prefixes of both."""
    assert model.origin is not None
    family, layers = FAMILIES[model.origin["kind"]], model.origin["network"]["layers"]
    ends = "stem_head." if model.shared != "per_block" else f"blocks.{chosen[0]}.stem_head."
    paths = {f"{ends}{own}": place for own, place in around(family).items()}
    places = [f"blocks.{b}.layers.{i}.layer." for b in chosen for i in range(model.partition.layers[b])]
    return paths | {prefix: f"{layers}.{i}." for i, prefix in enumerate(places)}


def _renamed(key: str, paths: dict[str, str]) -> str:
    found = ((prefix, path) for prefix, path in paths.items() if key.startswith(prefix))
    prefix, path = next(found, ("", ""))
    return plain_name(f"{path}{key.removeprefix(prefix)}")


def _is_inside(key: str, modules: Sequence[str]) -> bool:
    """Return whether a weight is inside one of the modules that peft finds by these ends of names."""
    path = key.split(".")
    return any(".".join(path[:i]).endswith(tuple(modules)) for i in range(1, len(path)))


def _converted(network: Any, blocks: int | Sequence[int], *, plain: Converter, **options: Any) -> DiffusionBlocks:
    """Return `convert`'s model of a network, whose adapter is trained in place of the network's own weights."""
    configs = _configs(network)
    if configs:
        _check(network, configs)
        _unwrap(network)
        dtype = next(p for p in network.parameters() if not p.requires_grad).dtype
        for p in (p for p in network.parameters() if p.requires_grad):
            p.data = p.data.to(dtype)  # peft widens adapters of half networks; here the optimizer's masters are wide
    model = plain.convert(network, blocks, **options)
    if configs:
        model.peft_config = configs
    return model


def _configs(network: Any) -> dict[str, Any]:
    """Return a network's adapters' configs by name, with where its own weights came from."""
    configs = copy.deepcopy(getattr(network, "peft_config", {}))
    for config in configs.values():
        config.base_model_name_or_path = config.base_model_name_or_path or network.name_or_path
    return configs


def _check(network: nn.Module, configs: dict[str, Any]) -> None:
    if len(configs) > 1:
        raise ValueError(f"the network has adapters {', '.join(configs)}: delete all but the one to train")
    config = next(iter(configs.values()))
    if (init := getattr(config, "init_lora_weights", True)) not in FRESH:
        raise ValueError(f"init_lora_weights={init!r} changes the network's own weights: use one of {FRESH}")
    if isinstance(config, peft.AdaLoraConfig):
        raise ValueError("AdaLoRA moves ranks between layers in every step, and blocks are trained apart: use LoRA")
    if isinstance(config, peft.TrainableTokensConfig):
        raise ValueError("adapters of single tokens' embeddings aren't converted: use LoRA on the layers")
    for name in ("trainable_token_indices", "layer_replication"):
        if getattr(config, name, None):
            raise ValueError(f"adapters with {name} aren't converted: leave it out")
    tuners: list[Any] = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    if any(tuner.merged or tuner.disable_adapters for tuner in tuners):
        raise ValueError("the network's adapter is merged or disabled: unmerge_adapter() or enable_adapters() first")
    if not any(p.requires_grad for tuner in tuners for p in tuner.parameters()):
        raise ValueError("the network's adapter is frozen: load it with is_trainable=True")


def _unwrap(network: nn.Module) -> None:
    """Put the trained copies of modules_to_save in their modules' places."""
    for name, module in list(network.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            network.set_submodule(name, module.modules_to_save[module.active_adapter])


def _described(network: Any, *, plain: Converter, family: Family) -> dict[str, Any]:
    assert plain.describe is not None
    described = plain.describe(network)
    for name, config in _configs(network).items():
        adapter = json.loads(json.dumps(config.to_dict(), default=sorted))  # sets of names are no JSON
        described |= {"layers": layers_name(network, family), "adapter_name": name, "adapter": adapter}
    return described


def _built(described: dict[str, Any], *, plain: Converter) -> Any:
    assert plain.build is not None
    network: Any = plain.build(described)
    if "adapter" in described:
        network.add_adapter(peft.get_peft_config(described["adapter"]), described["adapter_name"])
    return network


for _kind, _plain in CONVERTERS.items():
    register(
        _kind,
        describe=functools.partial(_described, plain=_plain, family=FAMILIES[_kind]),
        build=functools.partial(_built, plain=_plain),
    )(functools.update_wrapper(functools.partial(_converted, plain=_plain), _plain.convert))
