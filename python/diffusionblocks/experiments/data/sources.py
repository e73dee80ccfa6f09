"""Image sources: load the training and test images of each dataset as tensors; draw stratified splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...noise.rng import stream
from . import hub, idx

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DIGITS_TEST_SIZE = 360  # a fifth of the 1,797

Pair = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8, labels (N,) int64
Loader = Callable[[Path | None], dict[str, Pair]]


@dataclass(frozen=True)
class Source:
    """An image dataset.

    Attributes:
        shape: (C, H, W).
        num_classes: labels are in [0, num_classes).
        load: (folder) -> {"train": (images, labels), "test": (images, labels)}, and "val" where the source has one.
        class_names: of the labels, where they have any.
    """

    shape: tuple[int, int, int]
    num_classes: int
    load: Loader
    class_names: tuple[str, ...] = ()


def _digits(folder: Path | None) -> dict[str, Pair]:
    if folder is not None:
        raise ValueError(f"digits comes with scikit-learn and takes no folder, got {folder}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None]  # (1797, 1, 8, 8), values 0..16
    images, labels = (images * (255 / 16)).round().to(torch.uint8), torch.from_numpy(digits.target).long()
    test, train = stratified(labels, DIGITS_TEST_SIZE, stream(0, "digits", "test"))
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def _fashion_mnist(folder: Path | None) -> dict[str, Pair]:
    folder = DEBIAN_FASHION_MNIST if folder is None else folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder} with Fashion-MNIST; apt-get install dataset-fashion-mnist, or "
            "pass folder= (--data-folder) with its four IDX files"
        )
    return {part: _idx_pair(folder, prefix) for part, prefix in (("train", "train"), ("test", "t10k"))}


def _idx_pair(folder: Path, prefix: str) -> Pair:
    images = idx.load(_plain_or_gz(folder / f"{prefix}-images-idx3-ubyte"))
    labels = idx.load(_plain_or_gz(folder / f"{prefix}-labels-idx1-ubyte"))
    return images.unsqueeze(1), labels.long()


def _plain_or_gz(path: Path) -> Path:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"neither {path} nor {path.name}.gz exists; put the four files of Fashion-MNIST there")


SOURCES = {
    "digits": Source((1, 8, 8), 10, _digits),
    "fashion-mnist": Source((1, 28, 28), 10, _fashion_mnist, FASHION),
    "cifar100": Source((3, 32, 32), 100, partial(hub.load_images, hub.CIFAR100)),
    "tiny-imagenet": Source((3, 64, 64), 200, partial(hub.load_images, hub.TINY_IMAGENET)),
}


def visible(folder: Path) -> list[Path]:
    """Return the sorted entries of a folder without hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def own_folder(name: str, folder: Path | None, content: str) -> Path:
    """Return the folder that the data set `name` is read from. Raises: FileNotFoundError if there is none."""
    if folder is None or not folder.is_dir():
        state = "is a file" if folder and folder.exists() else "does not exist"
        fault = f"{folder} {state}" if folder else "none is given"
        raise FileNotFoundError(f"data={name!r} needs folder= (--data-folder) with {content}: {fault}")
    return folder


def idx_folder(folder: Path | None) -> Source:
    """Return the source of a folder of four IDX files, gzipped or not, with MNIST's names after any prefix
    (emnist-letters-train-images-idx3-ubyte.gz). The sorted labels of the training split become classes 0, 1, ...

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: files that aren't IDX, several candidates for one file, or test labels absent from training.
    """
    folder, pairs = own_folder("idx", folder, "four IDX files"), {}
    for part, names in (("train", ("train",)), ("test", ("t10k", "test"))):
        images, labels = (idx.load(_only(folder, [f"{n}-{kind}" for n in names])) for kind in ("images", "labels"))
        pairs[part] = (images.unsqueeze(1), labels.long())
    classes = pairs["train"][1].unique()
    if not bool(torch.isin(pairs["test"][1], classes).all()):
        raise ValueError(f"{folder} has labels in its test split that its training split lacks")
    numbered = {part: (images, torch.searchsorted(classes, labels)) for part, (images, labels) in pairs.items()}
    size = pairs["train"][0].shape[-1]
    return Source((1, size, size), len(classes), lambda _: numbered)


def _only(folder: Path, names: list[str]) -> Path:
    paths = [path for path in visible(folder) if any(name in path.name for name in names)]
    if not paths:
        raise FileNotFoundError(f"{folder} has no file with {' or '.join(names)} in its name")
    if len(paths) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in paths)}: keep one of them there")
    return paths[0]


def hub_images(name: str, folder: Path | None) -> Source:
    """Return the source of any hub dataset with images and labels, or of a local copy whose folder is `name`."""
    local = Path(name).expanduser()
    where = folder or (local if local.is_dir() else None)
    source = hub.infer_source(name, where)
    pairs = hub.load_images(source, where)
    num_classes = int(pairs["train"][1].max()) + 1
    return Source((3, source.size, source.size), num_classes, lambda _: pairs)


def stratified(labels: Tensor, count: int, key: int) -> tuple[Tensor, Tensor]:
    """Draw `count` samples, each class in proportion, and return their indices and those of the others.

    Args:
        labels: (N,) int64 >= 0, N >= count.
        key: seed of the draw; the number of samples per class doesn't depend on it.

    Returns:
        Indices (count,) and (N - count,), int64, ascending.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(key))
    quota = _quota(torch.bincount(labels), count)
    members = [shuffled[labels[shuffled] == c][:q] for c, q in enumerate(quota)]
    taken = torch.zeros(len(labels), dtype=torch.bool)
    taken[torch.cat(members)] = True
    return taken.nonzero().flatten(), (~taken).nonzero().flatten()


def _quota(sizes: Tensor, count: int) -> list[int]:
    """Return samples per class: proportional shares rounded down, plus one for the largest remainders."""
    total = int(sizes.sum())
    shares = [divmod(size * count, total) for size in sizes.tolist()]
    by_remainder = sorted(range(len(shares)), key=lambda c: -shares[c][1])
    extra = set(by_remainder[: count - sum(whole for whole, _ in shares)])
    return [whole + (c in extra) for c, (whole, _) in enumerate(shares)]
