"""A part's tensors come out of its file bit for bit, or not at all."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from damaged import part_path, refused
from diffusionblocks.checkpoint import atomic, layout
from diffusionblocks.checkpoint import manifest as manifests
from diffusionblocks.checkpoint.files import load_part, save

DTYPES = sorted(layout.DTYPES, key=str)


def bits(x: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    """All there is to a tensor, NaN payloads and signs of zero included."""
    dense = x.detach().clone(memory_format=torch.contiguous_format)
    return x.dtype, x.shape, dense.reshape(-1).view(torch.uint8).tolist()


def random_bits(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as another program would that knows its SHA-256."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    change(record)
    path.write_text(json.dumps(record | {"sha256": manifests.digest(record)}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_itself_reads_the_files(dtype: torch.dtype, tmp_path: Path) -> None:
    part = {
        "x": random_bits(dtype, [3, 5], 0),
        "scalar": random_bits(dtype, [], 1),
        "empty": torch.empty(0, 2),
    }
    file = save(tmp_path, {"block_0": part}, {}).parts["block_0"].file
    assert {k: bits(x) for k, x in load_file(tmp_path / file).items()} == {k: bits(x) for k, x in part.items()}


def test_tensors_that_are_one_are_written_once_and_load_as_one(tmp_path: Path) -> None:
    w = torch.randn(100, 100)
    part = {"embed.weight": torch.nn.Parameter(w), "head.weight": w, "other": w.clone()}
    manifest = save(tmp_path, {"shared": part}, {})
    assert manifest.parts["shared"].tied == {"head.weight": "embed.weight"}
    assert 2 * w.nbytes < manifest.parts["shared"].size < 2.1 * w.nbytes
    loaded = load_part(tmp_path, "shared")
    assert loaded["head.weight"] is loaded["embed.weight"]
    assert loaded["other"].data_ptr() != loaded["head.weight"].data_ptr()
    assert all(torch.equal(loaded[name], w) for name in part)


def test_views_that_overlap_otherwise_load_as_tensors_of_their_own(tmp_path: Path) -> None:
    w = torch.randn(6, 6)
    z = torch.randn(3, dtype=torch.complex64)
    part = {
        "w": w, "flat": w.view(-1), "rows": w[:2], "t": w.t(), "diagonal": w.diagonal(),
        "as int": w.view(torch.int32), "z": z,
        "conj": z.conj(), "imag": z.conj().imag, "no_a": torch.empty(0), "no_b": torch.empty(0),
    }  # fmt: skip
    assert save(tmp_path, {"p": part}, {}).parts["p"].tied == {}
    loaded = load_part(tmp_path, "p")
    for name, x in part.items():
        assert bits(loaded[name]) == bits(x.resolve_conj().resolve_neg()), name
    places = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in loaded.values() if x.numel())
    assert len(places) == len(part) - 2 and all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


def test_loaded_tensors_are_ordinary_ones(tmp_path: Path) -> None:
    """Aligned as torch's own are; no views into the mapped file, and none of another's memory."""
    part = {"a": torch.randn(7), "b": torch.randn(1000), "flag": torch.tensor(True)}
    save(tmp_path, {"p": part}, {})
    loaded = load_part(tmp_path, "p", device=torch.device("cpu"))
    for name, x in loaded.items():
        assert torch.equal(x, part[name])
        assert x.data_ptr() % 64 == 0 and not x.requires_grad


def test_every_truncation_and_every_flipped_byte_of_a_part(folder: Path) -> None:
    path = part_path(folder)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path, "is truncated", load_part, folder, "shared")
    refused(path, "is truncated", save, folder, {}, {}, keep=["shared"])
    path.write_bytes(whole + b"x")
    refused(path, f"is corrupt: {len(whole) + 1} bytes, recorded were {len(whole)}", load_part, folder, "shared")
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        refused(path, "is corrupt: its content", load_part, folder, "shared")


def test_a_part_that_is_no_safetensors_file_but_has_the_right_sum(folder: Path) -> None:
    path, content = part_path(folder), pickle.dumps({"x": 1})
    path.write_bytes(content)
    digest = atomic.digest(path)
    rewrite(folder, lambda m: m["parts"]["shared"].update(size=len(content), sha256=digest))
    refused(path, "is foreign: not the safetensors file that was saved", load_part, folder, "shared")
    save_file({"y": torch.ones(1)}, path)
    entry = {"size": path.stat().st_size, "sha256": atomic.digest(path), "tied": {"x": "gone"}}
    rewrite(folder, lambda m: m["parts"]["shared"].update(entry))
    refused(path, "is foreign: .*gone", load_part, folder, "shared")


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
