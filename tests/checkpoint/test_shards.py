"""A model folder loads whole here and in other readers of the sharded layout; damaged or foreign ones are refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionblocks.checkpoint import atomic, shards
from diffusionblocks.checkpoint.manifest import CheckpointError
from diffusionblocks.checkpoint.shards import load_shards, read_index, save_shards

INDEX = "model.safetensors.index.json"
CONFIG = {"blocks": 2, "sigma_data": 0.5, "name": "ü", "schedule": [0.002, None, True]}


def model(value: float = 0.0) -> dict[str, dict[str, Tensor]]:
    w = torch.arange(6.0).reshape(2, 3) + value
    return {
        "shared": {"embed.weight": w, "head.weight": torch.nn.Parameter(w), "scale": torch.tensor(value)},
        "block_0": {"b0.w": w.t().bfloat16(), "b0.ids": torch.arange(3)},
        "block_1": {"b1.w": w.half(), "b1.empty": torch.empty(0, 2)},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_shards(tmp_path / "out", model(), CONFIG)
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(folder: Path, value: float) -> None:
    loaded = dict(load_shards(folder))
    assert list(loaded) == list(model())
    for shard, tensors in model(value).items():
        assert loaded[shard].keys() == tensors.keys()
        for name, x in tensors.items():
            assert loaded[shard][name].dtype == x.dtype and torch.equal(loaded[shard][name], x), name


def test_shards_and_config_come_back(folder: Path) -> None:
    assert names(folder) == [
        "config.json", "model.block_0.safetensors", "model.block_1.safetensors", INDEX, "model.shared.safetensors",
    ]  # fmt: skip
    assert_holds(folder, 0.0)
    config, weight_map = read_index(folder)
    assert config == CONFIG == json.loads((folder / "config.json").read_text())
    assert weight_map["b1.empty"] == "model.block_1.safetensors"
    assert "head.weight" not in weight_map and len(weight_map) == 6
    assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == 24 + 4 + 12 + 24 + 12


def test_tied_tensors_are_written_once_and_load_as_one(folder: Path) -> None:
    assert "head.weight" not in load_file(folder / "model.shared.safetensors")
    shared = dict(load_shards(folder))["shared"]
    assert shared["head.weight"] is shared["embed.weight"]


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make(b: int) -> Callable[[], dict[str, Tensor]]:
        def shard() -> dict[str, Tensor]:
            assert all(ref() is None for ref in alive)
            x = torch.full((10,), float(b))
            alive.append(weakref.ref(x))
            return {f"b{b}.x": x}

        return shard

    save_shards(tmp_path, {f"block_{b}": make(b) for b in range(3)}, {})
    assert len(alive) == 3
    alive.clear()
    read_part = shards.read_part

    def reading(*args: Any) -> dict[str, Tensor]:
        assert all(ref() is None for ref in alive)
        tensors = read_part(*args)
        alive.extend(weakref.ref(x) for x in tensors.values())
        return tensors

    monkeypatch.setattr(shards, "read_part", reading)
    loading = load_shards(tmp_path)
    assert [next(loading)[0] for _ in range(3)] == ["block_0", "block_1", "block_2"]


def test_files_of_others_stay_though_their_names_are_like_ours(tmp_path: Path) -> None:
    others = ("model.best.safetensors", "model.fp16.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / others[0], metadata={"format": "pt"})  # by safetensors' own writer
    (tmp_path / others[1]).write_bytes(b"precious")
    for value in (1.0, 2.0):
        save_shards(tmp_path, model(value), CONFIG)
        assert_holds(tmp_path, value)
        assert {*others} < {*names(tmp_path)}


def test_a_save_over_an_older_one_replaces_it_and_leaves_other_files(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    for value, config in ((1.0, {"n": 1}), (2.0, {"n": 2})):
        save_shards(folder, model(value), config)
        assert_holds(folder, value)
        assert read_index(folder)[0] == json.loads((folder / "config.json").read_text()) == config
    assert names(folder) == [
        "README.md", "config.json", "model.block_0.save3.safetensors", "model.block_1.save3.safetensors",
        INDEX, "model.shared.save3.safetensors",
    ]  # fmt: skip


# Other readers


def test_safetensors_and_the_hub_read_every_file(folder: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    save_shards(folder, model(1.0), CONFIG)
    expected = {name: x for shard in model(1.0).values() for name, x in shard.items() if name != "head.weight"}
    weight_map = read_index(folder)[1]
    with safe_open(folder / weight_map["scale"], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, x in expected.items():
        assert torch.equal(load_file(folder / weight_map[name])[name], x)
    network = torch.nn.Module()
    for name, x in expected.items():
        *parents, leaf = name.split(".")
        parent = network
        for key in parents:
            parent.add_module(key, getattr(parent, key, torch.nn.Module()))
            parent = getattr(parent, key)
        parent.register_buffer(leaf, torch.full_like(x, 9))
    hub.load_torch_model(network, folder, strict=True, filename_pattern="model{suffix}.safetensors")
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in expected.items())


def test_transformers_loads_a_network_from_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=11, max_position_embeddings=7)
    config = transformers.BertConfig(num_hidden_layers=2, **sizes)
    network = transformers.BertModel(config)
    split: dict[str, dict[str, Tensor]] = {"shared": {}, "block_0": {}, "block_1": {}}
    for name, x in network.state_dict().items():
        shard = f"block_{name.split('.')[2]}" if name.startswith("encoder.layer.") else "shared"
        split[shard][name] = x
    save_shards(tmp_path, split, json.loads(config.to_json_string(use_diff=False)))
    files, metadata = transformers.utils.hub.get_checkpoint_shard_files(str(tmp_path), str(tmp_path / INDEX))
    assert {os.path.basename(file) for file in files} == {f"model.{name}.safetensors" for name in split}
    assert metadata["weight_map"] == read_index(tmp_path)[1]
    loaded, info = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in network.state_dict().items())


# Refusals


def refused(path: Path, match: str, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        call(*args)
    assert str(path) in str(caught.value)


def load(folder: Path) -> list[Any]:
    return list(load_shards(folder))


def test_missing_and_truncated_files(folder: Path) -> None:
    path = folder / "model.block_1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(path, "is truncated: .*restore it from a copy", load, folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(path, "is corrupt", load, folder)
    path.unlink()
    refused(path, "is missing; restore it", load, folder)
    (folder / INDEX).unlink()
    refused(folder / INDEX, "is missing: no save was completed", read_index, folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", pickle.dumps({}), b'{"metadata": {"total_size": 1}, "weight_map": {}}']
)
def test_a_foreign_index_is_refused_and_never_overwritten(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    refused(folder / INDEX, "is foreign|no JSON at all", load, folder)
    refused(folder / INDEX, "is foreign|no JSON at all", save_shards, folder, model(), CONFIG)
    assert (folder / INDEX).read_bytes() == content and len(names(folder)) == 5


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_file_is_no_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="nothing was saved: a file stands in its place"):
        save_shards(tmp_path / path, model(), CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "model_index.json",
    "adapter_config.json", "diffusion_pytorch_model.safetensors", "model.block_0.safetensors",
])  # fmt: skip
def test_another_programs_model_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    refused(tmp_path / name, "belongs to .*give another folder", save_shards, tmp_path, model(), CONFIG)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i: i["weight_map"].update({"b0.w": "../x.safetensors"}), "names files that were not saved"),
        (lambda i: i["weight_map"].update({"b0.w": []}), "names files that were not saved"),
        (lambda i: i["weight_map"].pop("b0.w"), "weight_map isn't that of model.block_0.safetensors"),
        (lambda i: i["metadata"]["diffusionblocks"]["state"].update(sigma_data=0.6), "doesn't match its SHA-256"),
        (lambda i: i["metadata"]["diffusionblocks"].update(version=2), "newer format 2"),
    ],
)
def test_an_edited_index_is_refused(folder: Path, change: Callable[[Any], object], match: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder / INDEX, match, load, folder)


def test_an_edited_config_is_reported(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"blocks": 3}))
    with pytest.warns(UserWarning, match=r"config\.json differs from the config in .*, which counts"):
        assert read_index(folder)[0] == CONFIG


@pytest.mark.parametrize(
    ("shards", "config", "match"),
    [
        ({"a": {"x": torch.ones(1)}}, {"lr": float("nan")}, "config.json can't hold config.lr = nan; make it"),
        ({"a": {"x": torch.ones(1)}}, {"size": (1, 2)}, "config.size: a tuple isn't JSON"),
        ({"a": {"x": torch.ones(1)}}, [], "a config that is a list; make it a dict"),
        ({"../a": {"x": torch.ones(1)}}, {}, "can't name a part '../a'"),
        ({"a": {"__metadata__": torch.ones(1)}}, {}, "can't hold a tensor named '__metadata__'"),
        ({"a": {"x": [1.0]}}, {}, "a list isn't a tensor"),
        ({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, {}, "b.*can't hold 'x': another shard has"),
    ],
)
def test_what_a_folder_cannot_hold_leaves_the_old_model(folder: Path, shards: Any, config: Any, match: str) -> None:
    before = names(folder)
    refused(folder, match, save_shards, folder, shards, config)
    assert names(folder) == before
    assert_holds(folder, 0.0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_refusing_disk_is_one_error_that_names_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refusing(path: Path, mode: str) -> Any:
        if "block_1" in path.name and "w" in mode:
            raise OSError(code, os.strerror(code), str(path))
        return open(path, mode)

    monkeypatch.setattr(atomic, "open", refusing, raising=False)
    before = names(folder)
    for target, kept in ((folder, "the save before it is whole"), (folder / "new", "the folder holds no earlier save")):
        with pytest.raises(OSError, match=f"nothing was saved, {kept}; free space or make .*model.block_1") as caught:
            save_shards(target, model(1.0), CONFIG)
        assert caught.value.errno == code and os.strerror(code) in str(caught.value)
    assert names(folder / "new") == []
    os.rmdir(folder / "new")
    assert names(folder) == before
    assert_holds(folder, 0.0)


def test_a_save_that_stops_right_after_its_commit_is_the_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match=r"but the save itself is complete: .*config\.json"):
            save_shards(tmp_path, model(), CONFIG)
    assert_holds(tmp_path, 0.0)
    assert read_index(tmp_path)[0] == CONFIG
    save_shards(tmp_path, model(1.0), CONFIG)  # and nothing there looks foreign
    assert_holds(tmp_path, 1.0)
