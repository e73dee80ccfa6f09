"""Datasets of the Hugging Face hub, or local copies in the same format: images as tensors, texts as strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HubSource:
    """Where a dataset is on the hub, what its columns are called, and the size of its images in pixels.

    test: what the split for testing may be called; `datasets` calls a local valid.parquet "validation".
    """

    id: str
    image: str
    label: str
    test: tuple[str, ...]
    size: int


CIFAR100 = HubSource("uoft-cs/cifar100", "img", "fine_label", test=("test",), size=32)
# Tiny ImageNet's own test labels were never published: as usual, its validation images are the test split.
TINY_IMAGENET = HubSource("zh-plus/tiny-imagenet", "image", "label", test=("valid", "validation"), size=64)


def read(source: HubSource, folder: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """{"train": (images, labels), "test": (images, labels)}: images (N, 3, S, S) uint8, labels (N,) int64.

    folder: a local copy, as `save_to_disk` writes it or as parquet files named by split; None downloads from
    the hub (or takes what an earlier download left in the library's cache). Images of any mode become RGB.
    Raises: ImportError without `datasets`. FileNotFoundError on a missing or empty folder or an unreachable
    hub. ValueError on unreadable files, a missing split or column, an image that is unreadable or of another
    size, or a label that is no integer.
    """
    where = str(folder or source.id)
    splits = _open(source, folder)
    return {
        "train": _tensors(_pick(splits, ("train",), where), source, f"{where} (train)"),
        "test": _tensors(_pick(splits, source.test, where), source, f"{where} (test)"),
    }


def found(name: str, folder: Path | None) -> HubSource:
    """How to read images of a dataset that isn't listed here: its first column of images, its column of labels.

    Raises: as `read`.
    """
    nothing = HubSource(name, "", "", test=("test", "validation", "valid"), size=0)
    where = str(folder or name)
    rows = _pick(_open(nothing, folder), ("train",), where)
    image = _column(rows, _import().Image, ("image", "img"), where)
    label = _column(rows, _import().ClassLabel, ("label", "labels"), where)
    size = _picture(rows.cast_column(image, _import().Image()), 0, image, where).width
    return HubSource(name, image, label, nothing.test, size)


def _column(rows: Any, kind: type, names: tuple[str, ...], where: str) -> str:
    """The first column of a kind, or of a name where the file doesn't say its kinds."""
    for column, feature in rows.features.items():
        if isinstance(feature, kind) or column in names:
            return str(column)
    raise ValueError(f"{where} has no column {names[0]!r}, only {', '.join(rows.column_names)}; rename one")


def read_text(name: str) -> list[str]:
    """The column "text" of the training split: a dataset of the hub by its name, or a folder with a copy of one.

    Raises: as `read`.
    """
    folder = Path(name).expanduser()
    source = HubSource(name, "", "", test=(), size=0)
    rows = _pick(_open(source, folder if folder.is_dir() else None), ("train",), name)
    if "text" not in rows.column_names:
        raise ValueError(f"{name} (train) lacks a column 'text', it has {rows.column_names}; rename one")
    return [text for text in rows["text"][:] if text]


def _open(source: HubSource, folder: Path | None) -> Mapping[str, Any]:
    """The dataset's splits by name; what goes wrong inside `datasets` comes out as one of our two errors."""
    datasets = _import()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; put a copy of {source.id} there (parquet or save_to_disk)")
    splits: Mapping[str, Any]
    try:
        if folder is not None and (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
        else:
            splits = datasets.load_dataset(str(folder or source.id))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise _explained(error, source, folder) from error
    return splits


def _import() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("needs the library `datasets`: pip install 'diffusionblocks[hub]'") from error
    return datasets


def _explained(error: Exception, source: HubSource, folder: Path | None) -> Exception:
    if folder is None:
        hint = f"check the network, or pass folder= with a copy of {source.id} (parquet or save_to_disk)"
        return FileNotFoundError(f"cannot get {source.id} from the hub: {error}; {hint}")
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"cannot read {folder} as a copy of {source.id} (parquet or save_to_disk): {error}")


def _pick(splits: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if name in splits:
            return splits[name]
    raise ValueError(f"{where} has no split {names[0]!r}, only {', '.join(splits)}; name its files by split")


def _tensors(rows: Any, source: HubSource, where: str) -> tuple[Tensor, Tensor]:
    """All images and labels of one split."""
    missing = {source.image, source.label} - set(rows.column_names)
    if missing:
        raise ValueError(f"{where} lacks columns {sorted(missing)}, it has {rows.column_names}; rename them")
    images = torch.empty(len(rows), 3, source.size, source.size, dtype=torch.uint8)
    # The cast makes parquet written without the library's own metadata (structs of bytes) decode as well.
    column = rows.cast_column(source.image, _import().Image()).select_columns(source.image)
    for index in range(len(rows)):
        images[index] = _rgb(column, index, source, where)
    return images, _labels(rows[source.label][:], where)


def _labels(values: list[object], where: str) -> Tensor:
    if not all(isinstance(value, int) for value in values):  # torch would cut 1.5 to 1
        raise ValueError(f"{where}: labels must be integers without gaps; convert the column")
    return torch.tensor(values, dtype=torch.int64)


def _rgb(column: Any, index: int, source: HubSource, where: str) -> Tensor:
    """Image `index` as (3, size, size) uint8."""
    size, picture = source.size, _picture(column, index, source.image, where)
    if picture.size != (size, size):
        has = "x".join(map(str, picture.size))
        raise ValueError(f"{where}: image {index} is {has}, expected {size}x{size}; all must have the same size")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, 3).permute(2, 0, 1)


def _picture(column: Any, index: int, name: str, where: str) -> Any:
    """Image `index`, as Pillow's, in RGB."""
    try:
        picture = column[index][name]
        picture = picture and picture.convert("RGB")
    except (OSError, SyntaxError) as error:  # what Pillow raises for files that are no picture or broken ones
        raise ValueError(f"{where}: image {index} cannot be read ({error}); fetch the data again") from error
    if picture is None:
        raise ValueError(f"{where}: image {index} is missing; fetch the data again")
    return picture
