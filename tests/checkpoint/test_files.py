"""A checkpoint folder holds what was saved to it, and only that."""

from __future__ import annotations

import json
import os
import resource
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from damaged import part_path, refused
from diffusionblocks.checkpoint import parts as part_files
from diffusionblocks.checkpoint.files import load_part, read_state, save

DTYPES = sorted(part_files.DTYPES, key=str)
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "transposed": lambda x: x.mT if x.dim() > 1 else x,
    "every second": lambda x: x[::2] if x.dim() else x,
    "expanded": lambda x: x.expand(3, *x.shape),
    "one, far apart": lambda x: x.reshape(-1)[:: max(x.numel(), 1)],
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


def bits(x: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    """All there is to a tensor, NaN payloads and signs of zero included."""
    dense = x.detach().clone(memory_format=torch.contiguous_format)
    return x.dtype, x.shape, dense.reshape(-1).view(torch.uint8).tolist()


def random_bits(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


tensors = st.builds(
    lambda dtype, shape, seed, view: VIEWS[view](random_bits(dtype, shape, seed)),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 2**32),
    st.sampled_from(sorted(VIEWS)),
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=40)
@given(
    parts=st.dictionaries(
        st.from_regex(r"[a-z0-9_]{1,20}", fullmatch=True),
        st.dictionaries(names, tensors, max_size=5),
        max_size=3,
    ),
    state=st.dictionaries(st.text(), json_values, max_size=5),
)
def test_tensors_and_state_come_back_bit_for_bit(parts: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = save(folder, parts, state)
        manifest = read_state(folder)
        assert manifest == saved
        assert json.dumps(manifest.state) == json.dumps(state)  # 1, 1.0 and True are equal, and not the same
        assert manifest.parts.keys() == parts.keys()
        for name, part in parts.items():
            loaded = load_part(folder, name)
            assert {key: bits(x) for key, x in loaded.items()} == {key: bits(x) for key, x in part.items()}


def test_functions_are_called_one_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make() -> dict[str, Tensor]:
        assert all(ref() is None for ref in alive), "the part before is still in memory"
        x = torch.ones(10)
        alive.append(weakref.ref(x))
        return {"x": x}

    save(tmp_path, {f"block_{b}": make for b in range(4)}, {})
    assert len(alive) == 4 and torch.equal(load_part(tmp_path, "block_3")["x"], torch.ones(10))


def test_keep_carries_a_part_over_without_touching_its_file(tmp_path: Path) -> None:
    first = save(tmp_path, {"a": {"x": torch.zeros(2)}, "b": {"x": torch.zeros(2)}, "c": {}}, {"step": 1})
    path = tmp_path / first.parts["a"].file
    os.utime(path, ns=(1, 1))
    second = save(tmp_path, {"b": {"x": torch.ones(2)}}, {"step": 2}, keep=(name for name in ("a",)))
    assert second.parts["a"] == first.parts["a"] and path.stat().st_mtime_ns == 1
    assert set(second.parts) == {"a", "b"} and (first.saves, second.saves) == (1, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.save1.safetensors",
        "b.save2.safetensors",
        "manifest.json",
    ]
    assert torch.equal(load_part(tmp_path, "b")["x"], torch.ones(2))


def test_an_error_while_a_part_is_made_frees_what_was_written(folder: Path) -> None:
    before = sorted(folder.iterdir())

    def broken() -> dict[str, Tensor]:
        raise RuntimeError("out of memory, in the test")

    with pytest.raises(RuntimeError, match="out of memory"):
        save(folder, {"shared": {"w": torch.ones(3)}, "block_0": broken}, {})
    assert sorted(folder.iterdir()) == before
    assert torch.equal(load_part(folder, "shared")["x"], torch.arange(100.0))


def test_a_full_disk_is_one_error_and_frees_what_was_half_written(folder: Path) -> None:
    """The system itself refuses to write more than 100 kB of a file."""
    before = sorted(folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large; nothing was saved, the save before it is whole") as caught:
            save(folder, {"shared": {"x": torch.ones(50_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(folder / "shared.save2.safetensors.tmp")
    assert sorted(folder.iterdir()) == before
    assert torch.equal(load_part(folder, "shared")["x"], torch.arange(100.0))


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"nothing was saved: a file stands in its place: .*/file/run"):
        save(tmp_path / "file" / "run", {}, {})


def test_the_next_save_removes_what_a_dead_one_left_and_nothing_else(folder: Path) -> None:
    left = ("block_0.save2.safetensors", "shared.save2.safetensors.tmp", "manifest.json.tmp")
    others = ("model.safetensors", "model-00001-of-00002.safetensors", "notes.tmp", "config.json")
    for name in (*left, *others):
        (folder / name).write_bytes(b"half")
    save(folder, {}, {}, keep=["shared"])
    assert {path.name for path in folder.iterdir()} == {*others, "manifest.json", "shared.save1.safetensors"}


def test_files_have_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    save(tmp_path, {"a": {"x": torch.zeros(2)}}, {})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_missing(folder: Path) -> None:
    manifest = folder / "manifest.json"
    refused(manifest, "has no part 'block_9'; it has \\['shared'\\]", load_part, folder, "block_9")
    part_path(folder).unlink()
    refused(part_path(folder), "is missing; restore", load_part, folder, "shared")
    refused(part_path(folder), "is missing; restore", save, folder, {}, {}, keep=["shared"])
    manifest.unlink()
    refused(manifest, "is missing: no save", read_state, folder)
    refused(folder / "no" / "manifest.json", "is missing", load_part, folder / "no", "shared")


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
