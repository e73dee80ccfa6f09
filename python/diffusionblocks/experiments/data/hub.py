"""Load datasets from the Hugging Face hub or from local copies of them: images as tensors, texts as strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HubSource:
    """Location and schema of an image dataset on the hub.

    Attributes:
        id: name on the hub.
        image, label: column names.
        test: accepted names of the test split; `datasets` names a local valid.parquet "validation".
        size: height and width of the images in pixels.
    """

    id: str
    image: str
    label: str
    test: tuple[str, ...]
    size: int


CIFAR100 = HubSource("uoft-cs/cifar100", "img", "fine_label", test=("test",), size=32)
# Tiny ImageNet's own test labels were never published: as usual, its validation images are the test split.
TINY_IMAGENET = HubSource("zh-plus/tiny-imagenet", "image", "label", test=("valid", "validation"), size=64)


def load_images(source: HubSource, folder: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Load the "train" and "test" splits as (images, labels); images of any mode become RGB.

    Args:
        source: the dataset.
        folder: local copy written by `save_to_disk`, or parquet files named by split. None downloads from the hub,
            or takes an earlier download from the cache of `datasets`.

    Returns:
        {"train": (images, labels), "test": (images, labels)}: images (N, 3, S, S) uint8, labels (N,) int64.

    Raises:
        ImportError: `datasets` isn't installed.
        FileNotFoundError: the folder is missing or empty, or the hub is unreachable.
        ValueError: unreadable files or images, a missing split or column, images of several sizes, or labels that
            aren't integers.
    """
    where = str(folder or source.id)
    splits = _open(source.id, folder)
    return {
        "train": _to_tensors(_split(splits, ("train",), where), source, f"{where} (train)"),
        "test": _to_tensors(_split(splits, source.test, where), source, f"{where} (test)"),
    }


def infer_source(name: str, folder: Path | None) -> HubSource:
    """Infer columns and image size of a dataset from its training split.

    Raises:
        ImportError, FileNotFoundError, ValueError: as for `load_images`.
    """
    where = str(folder or name)
    rows = _split(_open(name, folder), ("train",), where)
    image = _column(rows, _import().Image, ("image", "img"), where)
    label = _column(rows, _import().ClassLabel, ("label", "labels"), where)
    size = _decode(rows.cast_column(image, _import().Image()), 0, image, where).width
    return HubSource(name, image, label, test=("test", "validation", "valid"), size=size)


def _column(rows: Any, kind: type, names: tuple[str, ...], where: str) -> str:
    """Return the first column of feature type `kind` or, for files without feature types, of one of `names`."""
    for column, feature in rows.features.items():
        if isinstance(feature, kind) or column in names:
            return str(column)
    raise ValueError(f"{where} has no column {names[0]!r}, only {', '.join(rows.column_names)}; rename one")


def load_texts(name: str) -> list[str]:
    """Load the non-empty entries of the training split's column "text".

    Args:
        name: a dataset on the hub, or the folder of a local copy.

    Raises:
        ImportError, FileNotFoundError, ValueError: as for `load_images`.
    """
    folder = Path(name).expanduser()
    rows = _split(_open(name, folder if folder.is_dir() else None), ("train",), name)
    if "text" not in rows.column_names:
        raise ValueError(f"{name} (train) lacks a column 'text', it has {rows.column_names}; rename one")
    return [text for text in rows["text"][:] if text]


def _open(name: str, folder: Path | None) -> Mapping[str, Any]:
    """Return the splits by name; errors of `datasets` become FileNotFoundError or ValueError."""
    datasets = _import()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; put a copy of {name} there (parquet or save_to_disk)")
    splits: Mapping[str, Any]
    try:
        if folder is not None and (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
        else:
            splits = datasets.load_dataset(str(folder or name))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise _explained(error, name, folder) from error
    return splits


def _import() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("needs the library `datasets`: pip install 'diffusionblocks[hub]'") from error
    return datasets


def _explained(error: Exception, name: str, folder: Path | None) -> Exception:
    if folder is None:
        hint = f"check the network, or pass folder= (--data-folder) with a copy of {name} (parquet or save_to_disk)"
        return FileNotFoundError(f"cannot get {name} from the hub: {error}; {hint}")
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"cannot read {folder} as a copy of {name} (parquet or save_to_disk): {error}")


def _split(splits: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if name in splits:
            return splits[name]
    raise ValueError(f"{where} has no split {names[0]!r}, only {', '.join(splits)}; name its files by split")


def _to_tensors(rows: Any, source: HubSource, where: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, S, S) uint8 and labels (N,) int64 of one split."""
    missing = {source.image, source.label} - set(rows.column_names)
    if missing:
        raise ValueError(f"{where} lacks columns {sorted(missing)}, it has {rows.column_names}; rename them")
    images = torch.empty(len(rows), 3, source.size, source.size, dtype=torch.uint8)
    # parquet without the metadata of `datasets` holds structs of bytes; the cast makes them images
    column = rows.cast_column(source.image, _import().Image()).select_columns(source.image)
    for index in range(len(rows)):
        images[index] = _to_tensor(column, index, source, where)
    return images, _labels(rows[source.label][:], where)


def _labels(values: list[object], where: str) -> Tensor:
    if not all(isinstance(value, int) for value in values):  # torch would cut 1.5 to 1
        raise ValueError(f"{where}: labels must be integers without gaps; convert the column")
    return torch.tensor(values, dtype=torch.int64)


def _to_tensor(column: Any, index: int, source: HubSource, where: str) -> Tensor:
    """Return image `index` as (3, S, S) uint8."""
    size, image = source.size, _decode(column, index, source.image, where)
    if image.size != (size, size):
        actual = "x".join(map(str, image.size))
        raise ValueError(f"{where}: image {index} is {actual}, expected {size}x{size}; all must have the same size")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, 3).permute(2, 0, 1)


def _decode(column: Any, index: int, name: str, where: str) -> Any:
    """Return image `index` as an RGB PIL image."""
    try:
        image = column[index][name]
        image = image and image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises either on files that aren't images or are broken
        raise ValueError(f"{where}: image {index} cannot be read ({error}); fetch the data again") from error
    if image is None:
        raise ValueError(f"{where}: image {index} is missing; fetch the data again")
    return image
