"""How many threads a run computes with on the CPU."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

SMALL = 1_000_000  # parameters: up to here threads wait for each other longer than they compute
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def spare_threads(model: nn.Module, device: torch.device) -> None:
    """Compute with one thread if the model is small, and print so: on a busy machine more are slower by far.

    A number that the environment gives, or a GPU, leaves things as they are.
    """
    count = sum(p.numel() for p in model.parameters())
    if device.type != "cpu" or count > SMALL or torch.get_num_threads() == 1 or any(map(os.environ.get, CHOSEN_BY)):
        return
    print(
        f"one thread of {torch.get_num_threads()}, since the network is small ({count:,} parameters); "
        "set OMP_NUM_THREADS for another number",
        file=sys.stderr,
    )
    torch.set_num_threads(1)
