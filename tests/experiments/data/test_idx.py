"""IDX files and Fashion-MNIST, which is made of them; what can be wrong in them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusionblocks.experiments.data import idx, sources
from diffusionblocks.experiments.data.images import load


def encode(array: Tensor, kind: int = 0x08) -> bytes:
    return struct.pack(f">HBB{array.dim()}I", 0, kind, array.dim(), *array.shape) + bytes(array.flatten().tolist())


@settings(deadline=None)  # the first example pays for imports and caches
@given(shape=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 1000), zipped=st.booleans())
def test_idx_round_trip(tmp_path_factory, shape, seed, zipped):
    generator = torch.Generator().manual_seed(seed)
    array = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    path = tmp_path_factory.getbasetemp() / "round.idx"
    path.write_bytes(gzip.compress(encode(array)) if zipped else encode(array))
    assert torch.equal(idx.load(path), array)


@settings(deadline=None)
@given(content=st.binary(max_size=40) | st.binary(max_size=40).map(lambda rest: b"\0\0\x08\x02" + rest))
def test_foreign_bytes_give_an_array_of_their_header_or_a_named_error(content):
    try:
        array = idx.parse(content, "thing.idx")
    except ValueError as error:
        assert "thing.idx" in str(error)
    else:
        assert encode(array) == content


SAMPLE = encode(torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4))
ZIPPED = gzip.compress(SAMPLE, mtime=0)  # the same bytes, so the same test names, in every worker


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not an IDX file.*nothing"),
        (b"\0\0", "not an IDX file"),
        (b"\x89PNG" + SAMPLE, "not an IDX file.*89 50 4e 47"),
        (b"\0\1" + SAMPLE[2:], "not an IDX file"),
        (b"\0\0\x07" + SAMPLE[3:], "not an IDX file"),
        (b"\0\0\x08\0" + SAMPLE[4:], "not an IDX file"),
        (b"\0\0\x0d" + SAMPLE[3:], "float32.*only.*uint8"),
        (SAMPLE[:10], "truncated in its 16 bytes of header"),
        (SAMPLE[:-1], r"truncated.*\(2, 3, 4\), 40 bytes.*39"),
        (SAMPLE + b"\0", "too long.*41"),
        (ZIPPED[:-12], "gzip"),
        (ZIPPED[:10] + b"\xff" * 9, r"gzip.*invalid"),
        (ZIPPED[:-8] + bytes(8), r"gzip.*CRC"),
    ],
)
def test_broken_idx_files_are_refused_by_name(tmp_path, content, match):
    path = tmp_path / "broken-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken-idx3-ubyte.*{match}"):
        idx.load(path)


# ---- Fashion-MNIST's four files ----


def pixels(n: int) -> Tensor:
    return torch.randint(256, (n, 28, 28), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


def write_fashion(folder: Path, zipped: bool = False, **changes: Tensor) -> None:
    """The four files with 40 training and 10 test images; `changes`: other arrays, e.g. train_labels=..."""
    for prefix, n in (("train", 40), ("t10k", 10)):
        images = changes.get(f"{prefix}_images", pixels(n))
        labels = changes.get(f"{prefix}_labels", (torch.arange(n) % 10).to(torch.uint8))
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = encode(array)
            (folder / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_from_a_folder(tmp_path, zipped):
    write_fashion(tmp_path, zipped)
    data = load("fashion-mnist", folder=str(tmp_path), val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 10)
    assert data.val.labels.bincount().tolist() == [1] * 10
    assert torch.equal(data.test.images, pixels(10)[:, None])
    assert torch.equal(data.test.labels, torch.arange(10))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train_labels": torch.full((40,), 10, dtype=torch.uint8)}, r"\(train\).*0\.\.9"),
        ({"t10k_labels": torch.zeros(9, dtype=torch.uint8)}, r"\(test\).*9 labels"),
        ({"t10k_images": torch.zeros(10, 8, 8, dtype=torch.uint8)}, r"\(test\).*28, 28"),
        ({"train_images": torch.zeros(40, dtype=torch.uint8)}, r"\(train\).*28, 28"),
        ({"train_labels": torch.zeros(40, 28, 28, dtype=torch.uint8)}, r"\(train\).*\(N,\)"),
        (
            {"t10k_images": torch.zeros(0, 28, 28, dtype=torch.uint8)} | {"t10k_labels": torch.zeros(0)},
            "empty",
        ),
    ],
)
def test_fashion_mnist_of_another_make_is_refused(tmp_path, changes, match):
    write_fashion(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"fashion-mnist.*{match}"):
        load("fashion-mnist", folder=tmp_path)


def test_missing_fashion_mnist_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.*apt-get install dataset-fashion-mnist.*folder= \(--data-folder\)"
    ):
        load("fashion-mnist")
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        load("fashion-mnist", folder=tmp_path)


@pytest.mark.skipif(not sources.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_debians_fashion_mnist_loads():
    data = load("fashion-mnist")
    assert (len(data.train), len(data.val), len(data.test)) == (54_000, 6_000, 10_000)
    for split, each in ((data.train, 5_400), (data.val, 600), (data.test, 1_000)):
        assert split.labels.bincount().tolist() == [each] * 10
    # The dataset's well-known mean and std, of all 60,000; a tenth of them less moves these by under 1e-3.
    assert data.mean == pytest.approx((0.2860,), abs=1e-3) and data.std == pytest.approx((0.3530,), abs=1e-3)


def test_idx_files_of_ones_own(tmp_path):
    """Any size, any labels, names that end as MNIST's do."""
    labels = torch.arange(40) % 4 * 2 + 1  # 1, 3, 5, 7
    arrays = {"train-images": torch.zeros(40, 16, 16), "train-labels": labels}
    arrays |= {"test-images": torch.ones(8, 16, 16), "test-labels": labels[:8]}
    for name, array in arrays.items():
        kind = "idx3" if name.endswith("images") else "idx1"
        (tmp_path / f"letters-{name}-{kind}-ubyte").write_bytes(encode(array.to(torch.uint8)))
    data = load("idx", folder=tmp_path)
    assert (data.channels, data.image_size, data.num_classes) == (1, 16, 4)
    assert torch.equal(data.test.labels, torch.arange(8) % 4) and int(data.test.images.min()) == 1
    labels_file = tmp_path / "letters-test-labels-idx1-ubyte"
    labels_file.write_bytes(encode(torch.full((8,), 2, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="labels in its test split that"):
        load("idx", folder=tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels_file.read_bytes())
    with pytest.raises(ValueError, match="letters-test-labels-idx1-ubyte and t10k-labels-idx1-ubyte: keep one"):
        load("idx", folder=tmp_path)
    for path in tmp_path.glob("*labels*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no file with train-labels in its name"):
        load("idx", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="needs folder="):
        load("idx")
