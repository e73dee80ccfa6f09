"""Tensors in one flat buffer: aligned, none over another, and a safetensors file as they lie."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from diffusionblocks.checkpoint.layout import ALIGN, DTYPES, PAD, PAGE, Layout, parse

TENSORS = {
    "w": torch.randn(3, 5), "b": torch.randn(7, dtype=torch.float64), "half": torch.randn(2, 3).bfloat16(),
    "flag": torch.tensor(True), "empty": torch.empty(0, 4), "count": torch.tensor(3),
    "across": torch.randn(4, 6).T,
}  # fmt: skip


def filled(tensors):
    layout = Layout.of(tensors)
    buffer = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    layout.fill(buffer, tensors)
    return layout, buffer


def test_views_are_the_tensors_aligned_and_apart():
    layout, buffer = filled(TENSORS)
    views = layout.views(buffer)
    for name, t in TENSORS.items():
        assert torch.equal(views[name], t) and views[name].is_contiguous() and views[name].dtype == t.dtype
        assert views[name].data_ptr() % ALIGN == 0 or t.numel() == 0
        assert views[name].untyped_storage().data_ptr() == buffer.data_ptr()
    for name, view in views.items():
        before = {other: v.clone() for other, v in views.items() if other != name}
        view.fill_(0)
        assert all(torch.equal(views[other], v) for other, v in before.items()), name
    assert layout.nbytes % PAGE == 0


def test_blocks_of_the_same_shapes_share_a_layout():
    twins = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
    assert Layout.of(twins) == Layout.of(TENSORS) and hash(Layout.of(twins)) == hash(Layout.of(TENSORS))
    for changed in ({"w": torch.randn(5, 3)}, {"w": torch.randn(3, 5).double()}, {"more": torch.ones(1)}):
        assert Layout.of(TENSORS | changed) != Layout.of(TENSORS)


def test_what_is_one_tensor_gets_one_place():
    w = torch.randn(100)
    layout, buffer = filled({"one": w, "two": w, "parameter": torch.nn.Parameter(w), "part": w[:50], "copy": w.clone()})
    assert [span.name for span in layout.spans] == ["one", "part", "copy"]
    assert layout.tied == (("two", "one"), ("parameter", "one"))
    views = layout.views(buffer)
    assert views["two"] is views["one"] and views["part"].data_ptr() != views["one"].data_ptr()


def test_a_buffer_behind_its_header_is_a_safetensors_file():
    layout, buffer = filled(TENSORS)
    content = layout.header + bytes(buffer.numpy())
    assert len(layout.header) % PAGE == 0
    read = load(content)
    assert {n for n in read if not n.startswith(PAD)} == TENSORS.keys()
    assert all(torch.equal(read[name], t) for name, t in TENSORS.items())
    again = parse(layout.header, layout.nbytes)
    assert again.spans == layout.spans and b"".join(layout.content(TENSORS))[: len(buffer)] != b""


shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES, key=str)), shapes), min_size=1, max_size=8), st.data())
def test_any_tensors_come_back_bit_for_bit(kinds, data):
    """Of any dtype and shape, by any alignment; and the header stands for what content() writes."""
    align, page = data.draw(st.sampled_from([(ALIGN, PAGE), (1, 1), (8, 64)]))
    order = sorted(kinds, key=lambda kind: -kind[0].itemsize) if align == 1 else kinds
    tensors = {}
    for i, (dtype, shape) in enumerate(order):
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
        tensors[str(i)] = raw.view(dtype).view(shape)
    layout = Layout.of(tensors, align=align, page=page)
    content = b"".join(layout.content(tensors))
    assert len(content) == layout.nbytes
    found = parse(layout.header, layout.nbytes).views(torch.frombuffer(bytearray(content or b"0"), dtype=torch.uint8))
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].view(torch.uint8).tolist() == t.view(torch.uint8).tolist() if t.dim() else True
        assert found[name].shape == t.shape and found[name].dtype == t.dtype


@pytest.mark.parametrize("change", [
    {"dtype": "F16"}, {"shape": [3, 6]}, {"data_offsets": [-4, 56]}, {"data_offsets": [0, 10**9]}, {"dtype": "F7"},
    {"data_offsets": [60, 0]}, {"shape": None},
])  # fmt: skip
def test_a_header_that_lies_is_refused(change):
    layout = Layout.of({"w": torch.randn(3, 5)})
    record = json.loads(layout.header[8:])
    record["w"] |= change
    text = json.dumps(record).encode()
    with pytest.raises((ValueError, KeyError, TypeError)):
        parse(len(text).to_bytes(8, "little") + text, layout.nbytes)
