"""Metrics by pretrained networks: MAUVE of texts, FID and KID of images, each computed by its reference package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


def mauve(texts: list[str], real: list[str], network: str, *, device: torch.device) -> float:
    """Compute MAUVE, the overlap of generated and real texts in a language model's features; in [0, 1], 1 is identical.

    With fewer than a thousand texts the score is mostly noise. Scores of different networks aren't comparable.

    Args:
        texts: generated texts.
        real: reference texts.
        network: a GPT-2 or BERT of transformers; its name on the hub or its folder, containing "gpt2" or "bert".
        device: where the network runs.

    Raises:
        ImportError: mauve-text or transformers isn't installed.
        ValueError: another network.
        OSError: the network can't be loaded.

    Source: Pillutla et al. 2021, arXiv 2102.01454.
    """
    if "gpt2" not in network and "bert" not in network:
        raise ValueError(f"judge={network!r} must be a GPT-2 or a BERT: a name or a folder with gpt2 or bert in it")
    try:
        import transformers  # noqa: F401  (mauve itself imports without it)
        from mauve import compute_mauve
    except ImportError as error:
        raise ImportError("MAUVE needs mauve-text and transformers: pip install 'diffusionblocks[mauve]'") from error
    gpu = torch.cuda.current_device() if device.type == "cuda" else -1
    result = compute_mauve(p_text=real, q_text=texts, featurize_model_name=network, device_id=gpu, batch_size=16)
    return float(result.mauve)


def inception(generated: Tensor, real: Tensor, *, device: torch.device) -> dict[str, float]:
    """Compute the Fréchet ("fid") and the kernel distance ("kid") between images in the features of Inception v3.

    fid is biased upwards for fewer than a few thousand images of either kind.

    Args:
        generated, real: (N, C, S, S) and (M, C, S, S) uint8, C = 1 or 3.
        device: where the network runs.

    Raises:
        ImportError: torch-fidelity isn't installed.
        ValueError: other shapes, or fewer than two images.

    Source: Heusel et al. 2017, arXiv 1706.08500; Binkowski et al. 2018, arXiv 1801.01401.
    """
    for name, images in {"generated": generated, "real": real}.items():
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) < 2:
            raise ValueError(f"{name} must be uint8 (N >= 2, 1 or 3, S, S), got {images.dtype} {tuple(images.shape)}")
    try:
        from torch_fidelity import calculate_metrics
    except ImportError as error:
        raise ImportError("Inception's distances need torch-fidelity: pip install 'diffusionblocks[fid]'") from error
    subset = min(1000, len(generated), len(real))
    result = calculate_metrics(
        input1=Images(generated), input2=Images(real), fid=True, kid=True, kid_subset_size=subset, cache=False,
        cuda=device.type == "cuda", save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    return {"fid": result["frechet_inception_distance"], "kid": result["kernel_inception_distance_mean"]}


class Images(Dataset[Any]):
    """Images (N, C, S, S) as a dataset of (3, S, S)."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i].expand(3, -1, -1)
