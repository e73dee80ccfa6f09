"""A damaged, foreign or newer checkpoint, and what a checkpoint can't hold, are refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusionblocks.checkpoint import files as checkpoint
from diffusionblocks.checkpoint import manifest as manifests
from diffusionblocks.checkpoint.files import CheckpointError, load_part, read_state, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "run", {"shared": {"x": torch.arange(100.0)}}, {"lr": 0.125, "names": ["a", "b"]})
    return tmp_path / "run"


def part_path(folder: Path) -> Path:
    return folder / "shared.save1.safetensors"


def refused(path: Path, match: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        call(*args, **kwargs)
    assert str(path) in str(caught.value)


def test_missing(folder: Path) -> None:
    manifest = folder / "manifest.json"
    refused(manifest, "has no part 'block_9'; it has \\['shared'\\]", load_part, folder, "block_9")
    part_path(folder).unlink()
    refused(part_path(folder), "is missing; restore", load_part, folder, "shared")
    refused(part_path(folder), "is missing; restore", save, folder, {}, {}, keep=["shared"])
    manifest.unlink()
    refused(manifest, "is missing: no save", read_state, folder)
    refused(folder / "no" / "manifest.json", "is missing", load_part, folder / "no", "shared")


def test_every_truncation_and_every_flipped_byte_of_a_part(folder: Path) -> None:
    path = part_path(folder)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path, "is truncated", load_part, folder, "shared")
    refused(path, "is truncated", save, folder, {}, {}, keep=["shared"])
    path.write_bytes(whole + b"x")
    refused(path, "is corrupt: 481 bytes, and the manifest says 480", load_part, folder, "shared")
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        refused(path, "is corrupt: its content", load_part, folder, "shared")


def test_every_truncation_and_every_flipped_byte_of_the_manifest(folder: Path) -> None:
    """Nothing but an equivalent spelling (a letter of an escape, another white space) may pass."""
    path, before = folder / "manifest.json", read_state(folder)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path, "is truncated, corrupt", read_state, folder)
    for at in range(len(whole)):
        for bit in {at % 8, 5}:  # 5 turns a letter's case
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                assert read_state(folder) == before
            except CheckpointError as error:
                assert str(path) in str(error)
            else:
                assert whole[at : at + 1].isspace()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"format": "pt"}',
        b"\x80\x04",
        b"[" * 100_000,
        pickle.dumps({}),
        b"9" * 5000,
    ],
    ids=range(9),
)
def test_a_foreign_manifest_is_refused_and_never_overwritten(folder: Path, content: bytes) -> None:
    path = folder / "manifest.json"
    path.write_bytes(content)
    refused(path, "is foreign|is truncated, corrupt, or no manifest", read_state, folder)
    refused(path, "is foreign|is truncated, corrupt, or no manifest", save, folder, {}, {})
    assert path.read_bytes() == content and part_path(folder).exists()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as another program would that knows its SHA-256."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    change(record)
    path.write_text(json.dumps(record | {"sha256": manifests._digest(record)}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(version=2, package_version="9.0"), "newer format 2 .* 9.0\\).*: upgrade"),
        (lambda m: m.update(version="1"), "'1' is no format version"),
        (lambda m: m.update(version=True), "True is no format version"),
        (lambda m: m.update(format="another"), "is foreign"),
        (lambda m: m.pop("state"), "is foreign \\(KeyError\\('state'\\)"),
        (lambda m: m.update(parts=[]), "is foreign"),
        (lambda m: m["parts"]["shared"].update(file="../a.save1.safetensors"), "no name for a part's file"),
        (lambda m: m["parts"]["shared"].update(size="big"), "is foreign"),
        (lambda m: m["state"].update(lr=float("nan")), "can't hold manifest.state.lr = nan"),
        (lambda m: m["state"].update(lr=float("inf")), "can't hold manifest.state.lr = inf"),
    ],
)  # fmt: skip
def test_newer_and_odd_manifests(folder: Path, change: Callable[[dict[str, Any]], object], match: str) -> None:
    rewrite(folder, change)
    refused(folder / "manifest.json", match, read_state, folder)


def test_a_part_that_is_no_safetensors_file_but_has_the_right_sum(folder: Path) -> None:
    path, content = part_path(folder), pickle.dumps({"x": 1})
    path.write_bytes(content)
    digest = checkpoint._digest(path)
    rewrite(folder, lambda m: m["parts"]["shared"].update(size=len(content), sha256=digest))
    refused(path, "is foreign: not the safetensors file of 'shared'", load_part, folder, "shared")
    save_file({"y": torch.ones(1)}, path)
    entry = {"size": path.stat().st_size, "sha256": checkpoint._digest(path), "tied": {"x": "gone"}}
    rewrite(folder, lambda m: m["parts"]["shared"].update(entry))
    refused(path, "is foreign: .*gone", load_part, folder, "shared")


def deep(levels: int) -> dict[str, Any]:
    return {"x": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"lr": float("nan")}, "state.lr = nan; make it a finite number or None"),
        ({"a": [0, {"b": float("-inf")}]}, "state.a\\[1\\].b = -inf"),
        ({"betas": (0.9, 0.999)}, "state.betas: a tuple isn't JSON"),
        ({"w": torch.ones(1)}, "state.w: a Tensor isn't JSON"),
        ({"blocks": {0: "a"}}, "state.blocks: the key 0 isn't a string"),
        ([], "a state that is a list; make it a dict"),
    ],
)
def test_a_state_that_json_would_change(folder: Path, state: Any, match: str) -> None:
    refused(folder / "manifest.json", match, save, folder, {}, state)
    assert read_state(folder).state["lr"] == 0.125


def test_a_state_without_end(folder: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    refused(folder / "manifest.json", "nested too deeply", save, folder, {}, state)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "on meta"),
        ([1.0, 2.0], "a list isn't a tensor; put it in the state"),
    ],
)
def test_a_tensor_that_the_file_cannot_hold(folder: Path, tensor: Any, match: str) -> None:
    parts = {"shared": {"fine": torch.ones(2)}, "block_0": {"odd": tensor}}
    refused(folder / "block_0.save2.safetensors", match, save, folder, parts, {})
    assert torch.equal(load_part(folder, "shared")["x"], torch.arange(100.0))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("name", ["__metadata__", 3, "\ud800"])
def test_a_tensor_name_that_the_file_cannot_hold(folder: Path, name: Any) -> None:
    part = {name: torch.ones(1)}
    refused(folder / "p.save2.safetensors", "can't hold a tensor named", save, folder, {"p": part}, {})


@pytest.mark.parametrize("name", ["", "Block", "a-b", "../a", "a/b", "block.0", "x" * 101, 3])
def test_a_part_name_that_no_file_can_have(folder: Path, name: Any) -> None:
    refused(folder / "manifest.json", "can't name a part", save, folder, {name: {}}, {})


def test_keep_of_what_is_written_or_not_there(folder: Path) -> None:
    manifest = folder / "manifest.json"
    refused(manifest, "both write and keep the part 'shared'", save, folder, {"shared": {}}, {}, keep=["shared"])
    refused(manifest, "has no part 'b' to keep; it has \\['shared'\\]", save, folder, {}, {}, keep=["b"])
    fresh = folder / "fresh"
    refused(fresh / "manifest.json", "has no part 'a' to keep; it has \\[\\]", save, fresh, {}, {}, keep=["a"])
    assert not fresh.exists()
