"""The named runs of `dblocks train`: each a config to start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .config import TrainConfig
from .models.dit import DiTConfig
from .models.recurrent import RecurrentConfig
from .models.vit import ViTConfig
from .tasks.causal_lm import CausalLMRun
from .tasks.dit import DiTRun
from .tasks.masked_lm import MaskedLMRun
from .tasks.recurrent import RecurrentRun
from .tasks.vit import ViTRun

_FASHION = ViTConfig(image_size=28, patch=4, dim=128, layers=12, mlp=512, cond=32)
_CIFAR = ViTConfig(image_size=32, channels=3, num_classes=100, patch=4, dim=128, layers=12, mlp=3072, cond=21)
_SMALL_CORE = RecurrentConfig(layers=2, prelude=1, coda=1)

RUNS: dict[str, tuple[str, TrainConfig]] = {
    "vit-digits": ("8x8 digits, which come with scikit-learn; minutes on two CPU cores", ViTRun()),
    "vit-fashion-mnist": (
        "28x28 clothes, Fashion-MNIST's IDX files; hours on two CPU cores",
        ViTRun(
            data="fashion-mnist", out=Path("runs/vit-fashion-mnist"), model=_FASHION, steps=9000, batch_size=128,
            lr=1e-3, ema=0.999, checkpoint_every=1000, augment=True,
        ),
    ),
    "vit-fashion-small": (
        "28x28 clothes, Fashion-MNIST's IDX files; the digits' network; minutes on two CPU cores",
        ViTRun(
            data="fashion-mnist", out=Path("runs/vit-fashion-small"), steps=2000,
            tune_lr=(5e-4, 1e-3, 2e-3, 4e-3), tune_warmup=(0.2,), model=ViTConfig(image_size=28, patch=7),
        ),
    ),
    "vit-cifar100": (
        "32x32, 100 classes, the paper's ViT; for a GPU",
        ViTRun(
            data="cifar100", out=Path("runs/vit-cifar100"), model=_CIFAR, steps=195_000, batch_size=128,
            lr=5e-4, ema=0.999, checkpoint_every=5000, augment=True,
        ),
    ),
    "vit-tiny-imagenet": (
        "64x64, 200 classes, in two blocks; for a GPU",
        ViTRun(
            data="tiny-imagenet", out=Path("runs/vit-tiny-imagenet"), blocks=2, steps=390_000, batch_size=128,
            lr=5e-4, ema=0.999, checkpoint_every=5000, augment=True,
            model=replace(_CIFAR, image_size=64, patch=8, num_classes=200, dim=192, cond=32),
        ),
    ),
    "lm-text": ("text by characters, autoregressive: Python's own help texts", CausalLMRun()),
    "mdlm-text": (
        "masked diffusion of text, by characters: Python's own help texts; minutes on two CPU cores", MaskedLMRun(),
    ),
    "mdlm-king-james": (
        "masked diffusion of the King James Bible, 4 MB, by characters",
        MaskedLMRun(text="king-james", out=Path("runs/mdlm-king-james"), steps=12_000),
    ),
    "recurrent-sums": ("running sums of 16 digits; minutes on two CPU cores", RecurrentRun()),
    "recurrent-mazes": (
        "where water flows, 6x6 cells",
        RecurrentRun(
            task="mazes", size=6, out=Path("runs/recurrent-mazes"), lr=2e-3, tune_lr=(2.5e-4, 5e-4, 1e-3, 2e-3),
        ),
    ),
    "recurrent-mazes-large": (
        "where water flows, 20x20 cells",
        RecurrentRun(
            task="mazes", size=20, out=Path("runs/recurrent-mazes-large"), batch_size=8, steps=200, share=1.0, lr=2e-3,
            tune_lr=(5e-4, 2e-3), evaluated=64, model=_SMALL_CORE,
        ),
    ),
    "recurrent-sudoku": (
        "Sudoku, 6x6 cells; minutes on two CPU cores",
        RecurrentRun(
            task="sudoku", size=6, out=Path("runs/recurrent-sudoku"), steps=300, share=1.0, lr=2e-3,
            tune_lr=(2e-3, 4e-3, 8e-3), evaluated=256, model=_SMALL_CORE,
        ),
    ),
    "recurrent-sudoku-hard": (
        "Sudoku, 6x6 cells, of which every puzzle needs a guess; minutes on two CPU cores",
        RecurrentRun(
            task="sudoku", size=6, guesses=1, out=Path("runs/recurrent-sudoku-hard"), steps=300, share=1.0, lr=2e-3,
            tune_lr=(2e-3, 4e-3, 8e-3), evaluated=256, model=_SMALL_CORE,
        ),
    ),
    "recurrent-sudoku-large": (
        "Sudoku, 9x9 cells, three of five need guesses; three quarters of an hour on two CPU cores",
        RecurrentRun(
            task="sudoku", size=9, out=Path("runs/recurrent-sudoku-large"), steps=3000, share=1.0, lr=4e-3,
            tune_lr=(4e-3,), evaluated=256, model=_SMALL_CORE,
        ),
    ),
    "dit-digits": ("8x8 digits made from noise: those that come with scikit-learn; minutes on two CPU cores", DiTRun()),
    "dit-fashion": (
        "28x28 clothes made from noise, Fashion-MNIST's IDX files; hours on two CPU cores",
        DiTRun(
            data="fashion-mnist", out=Path("runs/dit-fashion"), steps=9000, batch_size=128, lr=2e-3, ema=0.999,
            checkpoint_every=1000, tune_lr=(1e-3, 2e-3), draws=1,
            model=DiTConfig(image_size=28, patch=4, dim=128, layers=12, mlp=512),
        ),
    ),
    "dit-fashion-small": (
        "28x28 clothes made from noise, Fashion-MNIST's IDX files; the digits' network; minutes on two CPU cores",
        DiTRun(
            data="fashion-mnist", out=Path("runs/dit-fashion-small"), steps=2000, draws=0.1,
            tune_lr=(2e-3, 4e-3, 8e-3, 1.6e-2), model=DiTConfig(image_size=28, patch=7),
        ),
    ),
}  # fmt: skip
