"""What pretrained networks make of samples: MAUVE of texts, FID and KID of images, each by the package for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


def mauve(texts: list[str], real: list[str], network: str, *, device: torch.device) -> float:
    """How far texts and real ones overlap in a language model's features: 1 if they can't be told apart, at least 0.

    network: a GPT-2 or BERT of transformers, by its name on the hub or its folder ("gpt2" or "bert" must be in it).
    The score of fewer than a thousand texts is mostly chance, and scores under different networks don't compare.
    Raises: ImportError without mauve-text and transformers. ValueError on another network. OSError if it isn't there.
    Source: Pillutla et al. 2021, arXiv 2102.01454.
    """
    if "gpt2" not in network and "bert" not in network:
        raise ValueError(f"judge={network!r} must be a GPT-2 or a BERT: a name or a folder with gpt2 or bert in it")
    try:
        import transformers  # noqa: F401  (mauve takes it only if it is there)
        from mauve import compute_mauve
    except ImportError as error:
        raise ImportError("MAUVE needs mauve-text and transformers: pip install 'diffusionblocks[mauve]'") from error
    gpu = torch.cuda.current_device() if device.type == "cuda" else -1
    found = compute_mauve(p_text=real, q_text=texts, featurize_model_name=network, device_id=gpu, batch_size=16)
    return float(found.mauve)


def inception(made: Tensor, real: Tensor, *, device: torch.device) -> dict[str, float]:
    """The Fréchet (fid) and the kernel distance (kid) of two sets of images in the features of Inception v3.

    made, real: (N, C, S, S) and (M, C, S, S), uint8, of one channel or three. Fewer than some thousand images of either
    kind raise fid.
    Raises: ImportError without torch-fidelity. ValueError on other shapes, or fewer than two images.
    Source: Heusel et al. 2017, arXiv 1706.08500; Binkowski et al. 2018, arXiv 1801.01401.
    """
    for name, images in {"made": made, "real": real}.items():
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) < 2:
            raise ValueError(f"{name} must be uint8 (N >= 2, 1 or 3, S, S), got {images.dtype} {tuple(images.shape)}")
    try:
        from torch_fidelity import calculate_metrics
    except ImportError as error:
        raise ImportError("Inception's distances need torch-fidelity: pip install 'diffusionblocks[fid]'") from error
    subset = min(1000, len(made), len(real))
    found = calculate_metrics(
        input1=Images(made), input2=Images(real), fid=True, kid=True, kid_subset_size=subset, cache=False,
        cuda=device.type == "cuda", save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    return {"fid": found["frechet_inception_distance"], "kid": found["kernel_inception_distance_mean"]}


class Images(Dataset[Any]):
    """Images (N, C, S, S) one by one, in three channels."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i].expand(3, -1, -1)
