"""What goes into a checkpoint comes out bit for bit."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from diffusionblocks.checkpoint import files as checkpoint
from diffusionblocks.checkpoint.files import load_part, read_state, save

DTYPES = sorted(checkpoint._DTYPES, key=str)
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
    assert len({x.untyped_storage().data_ptr() for x in loaded.values() if x.numel()}) == len(part) - 2


def test_loaded_tensors_are_ordinary_ones(tmp_path: Path) -> None:
    """Aligned as torch's own are, and of no more storage than they show: no views into the mapped file."""
    part = {"a": torch.randn(7), "b": torch.randn(1000), "flag": torch.tensor(True)}
    save(tmp_path, {"p": part}, {})
    loaded = load_part(tmp_path, "p", device=torch.device("cpu"))
    for name, x in loaded.items():
        assert torch.equal(x, part[name]) and x.untyped_storage().nbytes() == x.nbytes
        assert x.data_ptr() % 64 == 0 and not x.requires_grad


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


def test_files_have_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    save(tmp_path, {"a": {"x": torch.zeros(2)}}, {})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
