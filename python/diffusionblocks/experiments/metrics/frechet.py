"""How far made images are from real ones: the Fréchet distance in the features of a small classifier."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...noise.rng import stream
from ...training.optimizer import PartOptimizer, learning_rate
from ..data.images import ImageData, Loader, Split, load, prepare

STEPS, EPOCHS, BATCH_SIZE, LR = 500, 2, 64, 2e-3  # of the classifier: so many steps, or epochs if that is more
WIDTH = 32  # of the features: few enough for the covariance of a few hundred images


def frechet(a: Tensor, b: Tensor) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2), A and B the covariances; in float64, never negative.

    With a and b centred, the trace of the root is the nuclear norm of a b^T / sqrt((N - 1)(M - 1)): no root of a matrix
    that fewer samples than features make singular.

    a, b: (N, F) and (M, F) features. Raises: ValueError on fewer than two samples or different widths.
    Source: Heusel et al. 2017, arXiv 1706.08500.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (N >= 2, F) and (M >= 2, F), got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    spread_a, spread_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    # Products of the triangular factors have the same singular values, and at most F rows whatever the samples.
    factor_a, factor_b = (torch.linalg.qr(spread, mode="r").R for spread in (spread_a, spread_b))
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + spread_a.square().sum() + spread_b.square().sum() - 2 * cross
    return float(distance.clamp(min=0))


class FeatureNet(nn.Module):
    """A small convolutional classifier of images (B, C, S, S); `features` is what its last layer reads, (B, WIDTH)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.GELU(), nn.GroupNorm(4, 32),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(), nn.GroupNorm(8, 64),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, WIDTH), nn.GELU(),
        )  # fmt: skip
        self.last = nn.Linear(WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


class Judge:
    """Reads images with a classifier trained on the dataset's own training images (validation ones among them).

    The same for every run's seed. With a single class it has nothing to learn: its features are random ones.
    """

    def __init__(self, data: ImageData, device: torch.device):
        torch.manual_seed(stream(0, "judge") % 2**63)
        self.data, self.device = data, device
        self.network = FeatureNet(data.channels, data.classes).to(device)
        seen = Split(torch.cat([data.train.images, data.val.images]), torch.cat([data.train.labels, data.val.labels]))
        batches = Loader(seen, data, BATCH_SIZE, seed=0, device=device, pad=max(1, data.image_size // 8))
        optimizer = PartOptimizer(self.network.named_parameters())
        steps = max(STEPS, EPOCHS * len(seen) // BATCH_SIZE)
        for step in range(steps):
            x, labels = batches.batch(step)
            functional.cross_entropy(self.network(x), labels).backward()
            optimizer.step(learning_rate(step, steps=steps, peak=LR, warmup=steps // 20))

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, S, S) uint8 -> features (N, WIDTH), float64, and guessed labels (N,)."""
        pieces = []
        for part in images.split(512):
            h = self.network.features(prepare(part, self.data.mean, self.data.std, device=self.device))
            pieces.append((h.double(), self.network.last(h).argmax(-1)))
        return torch.cat([h for h, _ in pieces]), torch.cat([guess for _, guess in pieces])

    def compare(self, real: Split, made: Split) -> dict[str, float]:
        """Fréchet distance between two sets of images, and how often each shows what its label says, in percent."""
        (a, seen), (b, guessed) = self.read(real.images), self.read(made.images)

        def share(guess: Tensor, labels: Tensor) -> float:
            return float((guess == labels.to(guess.device)).double().mean() * 100)

        return {
            "frechet": frechet(a, b),
            "class_accuracy": share(guessed, made.labels),
            "real_accuracy": share(seen, real.labels),
        }


@lru_cache(maxsize=1)
def judge(name: str, folder: Path | None, device: torch.device) -> Judge:
    """The judge of a dataset, trained once a process."""
    return Judge(load(name, folder=folder), device)
