"""A damaged, foreign or newer manifest, and a state that JSON would change, are refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from damaged import part_path, refused
from diffusionblocks.checkpoint import manifest as manifests
from diffusionblocks.checkpoint.files import CheckpointError, read_state, save


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
    refused(path, "is foreign|is truncated, corrupt, or no JSON", read_state, folder)
    refused(path, "is foreign|is truncated, corrupt, or no JSON", save, folder, {}, {})
    assert path.read_bytes() == content and part_path(folder).exists()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as another program would that knows its SHA-256."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    change(record)
    path.write_text(json.dumps(record | {"sha256": manifests.digest(record)}))


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
