"""Datasets of the hub, from local copies in their format; what can be wrong in such a copy."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusionblocks.experiments.data.images import load
from diffusionblocks.experiments.tasks.vit import ViTRun, ViTTask

FORMATS = {
    "cifar100": ("img", "fine_label", "test", 32, 100),
    "tiny-imagenet": ("image", "label", "valid", 64, 200),
}


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """The library, with its cache in the test's folder and the network off."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def hub_rows(hf, name: str, n: int, seed: int, mode: str = "RGB"):
    """The rows as a Dataset and their images (n, 3, S, S); PNGs, so decoding gives these very pixels."""
    from PIL import Image

    image, label, _, size, classes = FORMATS[name]
    features = hf.Features({image: hf.Image(), label: hf.ClassLabel(num_classes=classes)})
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (n, size, size, len(mode)), generator=generator, dtype=torch.uint8)
    encoded = []
    for one in pixels:
        buffer = io.BytesIO()
        Image.frombytes(mode, (size, size), bytes(one.flatten().tolist())).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    table = {image: encoded, label: [(classes - 1 - i) % classes for i in range(n)]}
    return hf.Dataset.from_dict(table, features=features), pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def write_hub(hf, folder: Path, name: str, layout: str, mode: str = "RGB") -> tuple[Tensor, Tensor]:
    """A copy with 20 training and 5 test images; returns the pixels of both."""
    test = FORMATS[name][2]
    (train_rows, train_pixels), (test_rows, test_pixels) = (
        hub_rows(hf, name, n, seed, mode) for n, seed in ((20, 0), (5, 1))
    )
    if layout == "save_to_disk":
        hf.DatasetDict({"train": train_rows, test: test_rows}).save_to_disk(str(folder))
        return train_pixels, test_pixels
    # The hub's own layout, data/valid-00000-of-00001-hash.parquet, and the short one, valid.parquet.
    pattern = "data/{}-00000-of-00001-0f3.parquet" if layout == "hub" else "{}.parquet"
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", train_rows), (test, test_rows)):
        write_parquet(rows, folder / pattern.format(split), bare=layout == "bare")
    return train_pixels, test_pixels


def write_parquet(rows, path: Path, bare: bool) -> None:
    """bare: without the library's metadata, as other tools write it; the images are then structs of bytes."""
    if not bare:
        rows.to_parquet(str(path))
        return
    import pyarrow.parquet

    pyarrow.parquet.write_table(rows.data.table.replace_schema_metadata(None), path)


@pytest.mark.parametrize("layout", ["save_to_disk", "hub", "short", "bare"])
@pytest.mark.parametrize("name", FORMATS)
def test_hub_datasets_from_a_local_copy(hf, tmp_path, name, layout):
    train, test = write_hub(hf, tmp_path / "copy", name, layout)
    data = load(name, folder=tmp_path / "copy", val_fraction=0.2)
    _, _, _, size, classes = FORMATS[name]
    assert (data.channels, data.image_size, data.num_classes) == (3, size, classes)
    assert torch.equal(data.test.images, test) and data.test.labels.tolist() == [classes - 1 - i for i in range(5)]
    assert (len(data.train), len(data.val)) == (16, 4)
    for split in (data.train, data.val):
        assert torch.equal(split.images, train[classes - 1 - split.labels])  # each image with its own label
    everything = torch.cat([data.train.labels, data.val.labels]).sort().values
    assert everything.tolist() == list(range(classes - 20, classes))


def test_grayscale_images_become_rgb(hf, tmp_path):
    _, test = write_hub(hf, tmp_path / "copy", "tiny-imagenet", "hub", mode="L")
    data = load("tiny-imagenet", folder=tmp_path / "copy")
    assert data.test.images.shape == (5, 3, 64, 64) and torch.equal(data.test.images, test)


def broken(hf, name: str, problem: str):
    """A training split of `name` with one thing wrong."""
    image, label, *_ = FORMATS[name]
    good, _ = hub_rows(hf, name, 4, 0)
    if problem == "column":
        return good.rename_column(label, "target")
    if problem == "size":
        return hub_rows(hf, "tiny-imagenet" if name == "cifar100" else "cifar100", 4, 0)[0].rename_columns(
            {"image": image, "label": label}
        )
    stored = good.cast_column(image, hf.Image(decode=False)).cast_column(label, hf.Value("float64")).to_dict()
    if problem == "label":
        stored[label][2] = 1.5
    if problem == "range":
        stored[label] = [100] * 4
    if problem in ("cut", "text", "none"):
        data = stored[image][2]["bytes"]
        stored[image][2] = {"cut": {"bytes": data[:500]}, "text": {"bytes": b"not a picture"}, "none": None}[problem]
    kind = "float64" if problem == "label" else "int64"
    return hf.Dataset.from_dict(stored, features=hf.Features({image: hf.Image(), label: hf.Value(kind)}))


@pytest.mark.parametrize(
    ("problem", "match"),
    [
        ("column", "lacks columns.*fine_label"),
        ("size", "64x64, expected 32x32"),
        ("cut", "image 2 cannot be read"),
        ("text", "image 2 cannot be read"),
        ("none", "image 2 is missing"),
        ("label", "labels must be integers"),
        ("range", r"0\.\.99, got 100"),
    ],
)
def test_a_local_copy_with_something_wrong_is_refused(hf, tmp_path, problem, match):
    parts = {"train": broken(hf, "cifar100", problem), "test": hub_rows(hf, "cifar100", 2, 1)[0]}
    hf.DatasetDict(parts).save_to_disk(str(tmp_path / "copy"))
    with pytest.raises(ValueError, match=rf"train\).*{match}"):
        load("cifar100", folder=tmp_path / "copy")


def test_folders_that_are_no_copy_are_refused(hf, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*uoft-cs/cifar100"):
        load("cifar100", folder=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty.*zh-plus/tiny-imagenet"):
        load("tiny-imagenet", folder=tmp_path / "empty")
    write_hub(hf, tmp_path / "cut", "cifar100", "short")
    parquet = tmp_path / "cut" / "train.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut as a copy of uoft-cs/cifar100"):
        load("cifar100", folder=tmp_path / "cut")
    write_hub(hf, tmp_path / "half", "cifar100", "short")
    (tmp_path / "half" / "test.parquet").unlink()
    with pytest.raises(ValueError, match="half has no split 'test'"):
        load("cifar100", folder=tmp_path / "half")


def test_an_unreachable_hub_says_to_pass_a_folder(hf):
    with pytest.raises(FileNotFoundError, match=r"uoft-cs/cifar100.*folder="):
        load("cifar100")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"diffusionblocks\[hub\]"):
        load("cifar100")


@pytest.mark.parametrize("layout", ["save_to_disk", "bare"])
def test_any_dataset_of_images_is_read_by_its_name(hf, tmp_path, layout):
    """Columns, size and number of classes are inferred; a folder with a copy stands for the name."""
    pixels, _ = write_hub(hf, tmp_path / "copy", "tiny-imagenet", layout)
    data = load(f"hub:{tmp_path / 'copy'}")
    assert (data.channels, data.image_size, data.num_classes) == (3, 64, 200) and len(data.test) == 5
    every = torch.cat([data.train.images, data.val.images])
    assert sorted(every.flatten(1).sum(1).tolist()) == sorted(pixels.flatten(1).sum(1).tolist())
    with pytest.raises(ValueError, match=r"\(3, 64, 200\), the model \(1, 8, 10\)"):
        ViTTask(ViTRun(data=f"hub:{tmp_path / 'copy'}")).data  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"cannot get some/one from the hub.*folder="):
        load("hub:some/one")


def test_a_dataset_without_images_or_labels_is_refused(hf, tmp_path):
    rows, _ = hub_rows(hf, "cifar100", 4, 0)
    for column, missing in (("img", "image"), ("fine_label", "label")):
        folder = tmp_path / missing
        hf.DatasetDict({"train": rows.remove_columns(column), "test": rows}).save_to_disk(str(folder))
        with pytest.raises(ValueError, match=rf"has no column '{missing}'"):
            load(f"hub:{folder}")
