"""Data: splits, normalisation, augmentation and the loader. The order of the batches: test_data_order.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusionblocks.experiments.data import sources
from diffusionblocks.experiments.data.batches import Loader, augment, batch_indices, prepare
from diffusionblocks.experiments.data.images import ImageData, Split, load

# ---- splits ----


def rows(split: Split) -> list[bytes]:
    return [bytes(image.flatten().tolist()) for image in split.images]


def test_digits_splits_share_no_image_and_lose_none():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1293, 144, 360)
    together = sorted(rows(data.train) + rows(data.val) + rows(data.test))
    original = (torch.from_numpy(load_digits().images) * 255 / 16).round().to(torch.uint8)
    assert together == sorted(bytes(image.flatten().tolist()) for image in original)
    assert len(set(together)) == 1797  # no image occurs twice, so equal multisets mean disjoint splits
    assert data.train.images.max() == 255 and data.train.images.min() == 0


def test_digits_keep_images_with_their_labels():
    from sklearn.datasets import load_digits

    digits = load_digits()
    scaled = (torch.from_numpy(digits.images) * 255 / 16).round().to(torch.uint8)
    label_of = {bytes(i.flatten().tolist()): int(t) for i, t in zip(scaled, digits.target, strict=True)}
    data = load("digits", seed=3)
    for split in (data.train, data.val, data.test):
        assert [label_of[row] for row in rows(split)] == split.labels.tolist()


def test_test_split_does_not_depend_on_seed_or_fraction_and_val_does():
    a, b = load("digits", seed=0), load("digits", seed=1, val_fraction=0.3)
    assert torch.equal(a.test.images, b.test.images) and torch.equal(a.test.labels, b.test.labels)
    same, other = load("digits", seed=0), load("digits", seed=1)
    assert torch.equal(a.val.images, same.val.images) and torch.equal(a.train.images, same.train.images)
    assert not torch.equal(a.val.images, other.val.images)


@settings(deadline=None)  # the first example pays for imports and caches
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0),
    fraction=st.floats(0, 1),
    key=st.integers(0, 2**64 - 1),
)
def test_stratified_takes_each_class_in_proportion(sizes, fraction, key):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    count = round(fraction * len(labels))
    taken, rest = sources.stratified(labels, count, key)
    assert len(taken) == count
    assert torch.cat([taken, rest]).sort().values.tolist() == list(range(len(labels)))
    for c, size in enumerate(sizes):
        # less than one sample from the exact share, which is the best whole numbers that add up can do
        assert abs((labels[taken] == c).sum().item() - size * count / len(labels)) < 1


def test_stratified_draws_the_members_of_a_class():
    labels = torch.zeros(100, dtype=torch.int64)
    a, b = (sources.stratified(labels, 10, key)[0].tolist() for key in (0, 1))
    assert a != b and a != list(range(10)) and b != list(range(10))


def test_mean_and_std_are_those_of_the_training_images():
    data = load("digits")
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx((pixels.mean().item(),), rel=1e-12)
    assert data.std == pytest.approx((pixels.std(correction=0).item(),), rel=1e-12)
    assert (data.channels, data.image_size, data.num_classes) == (1, 8, 10)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1e-6, 0.99999, float("nan")])
def test_a_fraction_that_empties_a_split_is_refused(fraction):
    with pytest.raises(ValueError, match=r"val_fraction.*empty"):
        load("digits", val_fraction=fraction)


def test_unknown_name_lists_the_names_and_digits_takes_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"'mnist'.*digits, fashion-mnist, cifar100, tiny-imagenet"):
        load("mnist")
    with pytest.raises(ValueError, match="takes no folder"):
        load("digits", folder=tmp_path)
    with pytest.raises(ValueError, match="seed"):
        load("digits", seed=-1)


def tiny(n: int = 6, channels: int = 3, size: int = 4, classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(n) % classes)


def tiny_data(**changes: object) -> ImageData:
    fields = {"name": "tiny", "train": tiny(), "val": tiny(), "test": tiny(), "num_classes": 3}
    fields |= {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    return ImageData(**(fields | changes))


@pytest.mark.parametrize(
    ("split", "match"),
    [
        (Split(torch.empty(0, 3, 4, 4, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)), "empty"),
        (tiny(size=5), "images must be"),
        (tiny(channels=1), "images must be"),
        (Split(tiny().images[:5], tiny().labels), "6 labels"),
        (Split(tiny().images.float(), tiny().labels), "uint8"),
        (Split(tiny().images, tiny().labels.int()), "int64"),
        (Split(tiny().images, tiny().labels[:, None]), r"\(N,\)"),
        (Split(tiny().images, tiny().labels - 1), r"0\.\.2, got -1\.\.1"),
        (Split(tiny().images, tiny().labels + 1), r"0\.\.2, got 1\.\.3"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_by_name(split, match):
    with pytest.raises(ValueError, match=rf"tiny \(val\).*{match}"):
        tiny_data(val=split)
    with pytest.raises(ValueError, match=f"tiny.*{match}"):
        Loader(split, tiny_data(), 2, seed=0, device="cpu")


def test_mean_and_std_need_one_number_a_channel():
    with pytest.raises(ValueError, match="3 numbers"):
        tiny_data(mean=(0.5,))


# ---- normalisation and augmentation ----


def test_prepare_is_its_formula():
    images, mean, std = tiny(classes=2).images, (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    x = prepare(images, mean, std, device="cpu")
    shift, scale = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    assert x.dtype == torch.float32
    # x reaches 4.5, where one float32 rounding is 2.4e-7; two roundings and that of the constants
    torch.testing.assert_close(x.double(), (images.double() / 255 - shift) / scale, atol=1e-6, rtol=0)
    strided = images.transpose(2, 3)
    assert torch.equal(prepare(strided, mean, std, device="cpu"), x.transpose(2, 3))


def test_prepared_training_images_have_mean_0_and_std_1():
    data = load("digits")
    x = prepare(data.train.images, data.mean, data.std, device="cpu")
    assert abs(x.mean().item()) < 1e-5 and abs(x.std(correction=0).item() - 1) < 1e-5


@pytest.mark.parametrize(
    ("images", "std", "match"),
    [
        (tiny().images.float(), (0.2,) * 3, "uint8"),
        (tiny().images[0], (0.2,) * 3, "B, C, H, W"),
        (tiny().images[:0], (0.2,) * 3, "B, C, H, W"),
        (tiny().images, (0.2,), "3 numbers"),
        (tiny().images, (0.2, 0.0, 0.2), "positive"),
        (tiny().images, (0.2, float("nan"), 0.2), "positive"),
    ],
)
def test_prepare_refuses(images, std, match):
    with pytest.raises(ValueError, match=match):
        prepare(images, (0.5,) * 3, std, device="cpu")


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """`image` (C, H, W) moved by whole pixels, black coming in: by slices, unlike the code under test."""
    out = torch.zeros_like(image)
    height, width = image.shape[1:]
    target = (slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0)))
    origin = (slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0)))
    out[(slice(None), *target)] = image[(slice(None), *origin)]
    return out


@settings(deadline=None)
@given(pad=st.integers(0, 3), flip=st.booleans(), step=st.integers(0, 1000), height=st.integers(4, 7))
def test_augmented_images_are_shifts_and_mirror_images(pad, flip, step, height):
    images = torch.randint(1, 256, (5, 2, height, 5), dtype=torch.uint8)
    out = augment(images, pad=pad, flip=flip, seed=0, step=step)
    moves = range(-pad, pad + 1)
    for before, after in zip(images, out, strict=True):
        views = [before, before.flip(2)] if flip else [before]
        assert any(torch.equal(after, shifted(view, d, r)) for view in views for d in moves for r in moves)


def test_every_shift_and_both_mirrorings_occur_and_images_differ():
    image = torch.randint(1, 256, (1, 3, 6, 6), dtype=torch.uint8)
    out = augment(image.expand(2000, -1, -1, -1), pad=1, flip=True, seed=0, step=0)
    outcomes = {bytes(one.flatten().tolist()) for one in out}
    wanted = {
        bytes(shifted(view, d, r).flatten().tolist())
        for view in (image[0], image[0].flip(2))
        for d in (-1, 0, 1)
        for r in (-1, 0, 1)
    }
    assert outcomes == wanted  # 18 outcomes; one missing from 2,000 draws has probability 18 * (17/18)^2000 < 1e-48
    mirrored = augment(image.expand(2000, -1, -1, -1), pad=0, flip=True, seed=0, step=0)
    share = (mirrored == image.flip(3)).flatten(1).all(1).double().mean().item()
    assert abs(share - 0.5) < 0.05  # 4.5 standard deviations


def test_augmentation_is_a_function_of_seed_and_step():
    images = tiny(n=64, size=8).images
    kept = images.clone()
    first = augment(images, pad=2, flip=True, seed=0, step=3)
    torch.manual_seed(99)
    assert torch.equal(first, augment(images, pad=2, flip=True, seed=0, step=3))
    assert not torch.equal(first, augment(images, pad=2, flip=True, seed=0, step=4))
    assert not torch.equal(first, augment(images, pad=2, flip=True, seed=1, step=3))
    assert torch.equal(images, kept) and first.shape == images.shape and first.dtype == torch.uint8


def test_no_augmentation_returns_its_input():
    images = tiny().images
    assert augment(images, pad=0, flip=False, seed=0, step=0) is images


@pytest.mark.parametrize(("pad", "step", "seed"), [(-1, 0, 0), (1, -1, 0), (1, 0, -1)])
def test_augment_refuses_negative_numbers(pad, step, seed):
    with pytest.raises(ValueError, match=r"negative|seed"):
        augment(tiny().images, pad=pad, flip=True, seed=seed, step=step)


# ---- the loader ----


def test_two_loaders_of_one_seed_agree_bit_for_bit_in_any_order_of_steps():
    data = load("digits")
    one, two = (Loader(data.train, data, 32, seed=5, device="cpu", pad=1, flip=True) for _ in range(2))
    forward = [one.batch(step) for step in range(90)]  # more than two epochs
    for step in reversed(range(90)):
        x, labels = two.batch(step)
        assert torch.equal(x, forward[step][0]) and torch.equal(labels, forward[step][1])
    other = Loader(data.train, data, 32, seed=6, device="cpu", pad=1, flip=True)
    assert not torch.equal(other.batch(0)[1], forward[0][1])


def test_batch_is_the_samples_of_its_order_prepared():
    data = load("digits")
    loader = Loader(data.val, data, 50, seed=1, device="cpu")
    x, labels = loader.batch(2)  # samples 100..149 of 144: crosses an epoch
    indices = batch_indices(144, 50, seed=1, step=2)
    assert torch.equal(labels, data.val.labels[indices]) and labels.dtype == torch.int64
    assert torch.equal(x, prepare(data.val.images[indices], data.mean, data.std, device="cpu"))
    moved, _ = Loader(data.val, data, 50, seed=1, device="cpu", pad=2).batch(2)
    expected = augment(data.val.images[indices], pad=2, flip=False, seed=1, step=2)
    assert torch.equal(moved, prepare(expected, data.mean, data.std, device="cpu"))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"seed": -1}, {"pad": -1}])
def test_loader_refuses(wrong):
    with pytest.raises(ValueError, match="need batch_size"):
        Loader(tiny(), tiny_data(), **({"batch_size": 2, "seed": 0, "device": "cpu"} | wrong))
