"""Fréchet distance between generated and real images, in the features of a small classifier."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...noise.rng import stream
from ...training.optimizer import BlockAdamW
from ...training.schedule import learning_rate
from ..data.batches import Loader, prepare
from ..data.folder import Resize
from ..data.images import ImageData, Split, load

STEPS, EPOCHS, BATCH_SIZE, LR = 500, 2, 64, 2e-3  # of the classifier, trained for STEPS or EPOCHS, whichever is more
WIDTH = 32  # of the features: the covariance of a few hundred images has full rank


def frechet(a: Tensor, b: Tensor) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2), A and B the covariances; in float64, never negative.

    For centred a and b the trace of the root is the nuclear norm of a b^T / sqrt((N - 1)(M - 1)), which avoids the
    root of a matrix that is singular for N < F.

    Args:
        a, b: features (N, F) and (M, F).

    Raises:
        ValueError: fewer than two samples, or different widths.

    Source: Heusel et al. 2017, arXiv 1706.08500.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (N >= 2, F) and (M >= 2, F), got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    spread_a, spread_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    # the product of the triangular factors has the same singular values and at most F rows, whatever N
    factor_a, factor_b = (torch.linalg.qr(spread, mode="r").R for spread in (spread_a, spread_b))
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + spread_a.square().sum() + spread_b.square().sum() - 2 * cross
    return float(distance.clamp(min=0))


class FeatureNet(nn.Module):
    """A small convolutional classifier of images (B, C, S, S); `features` are the last layer's inputs (B, WIDTH)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.GELU(), nn.GroupNorm(4, 32),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(), nn.GroupNorm(8, 64),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, WIDTH), nn.GELU(),
        )  # fmt: skip
        self.last = nn.Linear(WIDTH, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


class Judge:
    """A classifier trained on a dataset's training and validation images; the same for every run's seed.

    With a single class there is nothing to learn: its features are those of random weights.
    """

    def __init__(self, data: ImageData, device: torch.device):
        torch.manual_seed(stream(0, "judge") % 2**63)
        self.data, self.device = data, device
        self.network = FeatureNet(data.channels, data.num_classes).to(device)
        both = Split(torch.cat([data.train.images, data.val.images]), torch.cat([data.train.labels, data.val.labels]))
        batches = Loader(both, data, BATCH_SIZE, seed=0, device=device, pad=max(1, data.image_size // 8))
        optimizer = BlockAdamW(self.network.parameters())
        steps = max(STEPS, EPOCHS * len(both) // BATCH_SIZE)
        for step in range(steps):
            x, labels = batches.batch(step)
            functional.cross_entropy(self.network(x), labels).backward()
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps=steps, peak=LR, warmup=steps // 20)
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, WIDTH) float64 and predicted labels (N,) of images (N, C, S, S) uint8."""
        pieces = []
        for part in images.split(512):
            h = self.network.features(prepare(part, self.data.mean, self.data.std, device=self.device))
            pieces.append((h.double(), self.network.last(h).argmax(-1)))
        return torch.cat([h for h, _ in pieces]), torch.cat([labels for _, labels in pieces])

    def compare(self, real: Split, generated: Split) -> dict[str, float]:
        """Return the Fréchet distance between two sets of images and the accuracy on each, in percent."""
        (a, a_labels), (b, b_labels) = self.classify(real.images), self.classify(generated.images)
        return {
            "frechet": frechet(a, b),
            "class_accuracy": _percent(b_labels, generated.labels),
            "real_accuracy": _percent(a_labels, real.labels),
        }


def _percent(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels.to(predicted.device)).double().mean() * 100)


@lru_cache(maxsize=1)
def judge(
    name: str, folder: Path | None, device: torch.device, size: int | None = None, resize: Resize | None = None
) -> Judge:
    """Return the judge of a dataset, trained once per process. Arguments as of `load`."""
    return Judge(load(name, folder=folder, size=size, resize=resize), device)
