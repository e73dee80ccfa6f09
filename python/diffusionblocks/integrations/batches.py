"""What the batches of transformers' collators are to a model of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks import DiffusionBlocks
from ..targets.masked import MaskedTarget
from ..targets.tokens import TokenTarget

IMPLIED = {"token_type_ids": "0", "position_ids": "0, 1, 2 and so on"}  # inputs that blocks don't take: what they imply


def batch_of(model: DiffusionBlocks, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (x, y) of what transformers' collators give.

    Raises: ValueError if there is no input, no label, or a mask that the model wouldn't honour.
    """
    x, labels = inputs.get("pixel_values", inputs.get("input_ids")), inputs.get("labels")
    if x is None or (labels is None and not isinstance(model.target, (MaskedTarget, TokenTarget))):
        raise ValueError(
            f"the batch has {', '.join(inputs)}, not pixel_values or input_ids, and labels: give batch=, a function "
            "that makes (x, y) of it"
        )
    if "attention_mask" in inputs:
        _check_hidden(model, x, inputs["attention_mask"])
    _check_implied(inputs)
    if isinstance(model.target, MaskedTarget):
        return x[:, :0], x if labels is None else torch.where(labels == -100, x, labels)  # what the collator masked
    if isinstance(model.target, TokenTarget):
        if labels is not None and not torch.equal(labels, x):
            raise ValueError("labels differ from input_ids: prompts can't be left out of the loss; leave labels out")
        return x[:, :-1], x[:, 1:]
    assert labels is not None
    return x, labels


def _check_implied(inputs: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless other inputs are what the network takes without them: only input_ids go into blocks."""
    for name, said in IMPLIED.items():
        if inputs.get(name) is None:
            continue
        t = torch.as_tensor(inputs[name])
        own = torch.zeros_like(t) if name == "token_type_ids" else torch.arange(t.shape[-1], device=t.device)
        differs = t != own
        if (seen := inputs.get("attention_mask")) is not None:
            differs = differs & torch.as_tensor(seen, device=t.device).bool()
        if differs.any():
            raise ValueError(
                f"{name} must be {said}, which blocks take of every text: give batch=, a function that makes (x, y) of "
                "a batch, to train without them"
            )


def _check_hidden(model: DiffusionBlocks, ids: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless the model hides the very tokens that an attention mask does."""
    embedding: Any = getattr(model.blocks[0].around(model.stem_head).stem, "embedding", None)
    padding = embedding.padding if getattr(embedding, "hides_padding", False) else None
    seen = torch.ones_like(mask) if padding is None else ids != padding
    if not torch.equal(seen.bool(), mask.bool()):
        what = "no token" if padding is None else f"tokens {padding} (pad_token_id)"
        raise ValueError(
            f"attention_mask hides tokens, where the model hides {what}: pack texts into full windows, or let the "
            "tokenizer pad by the network's pad_token_id"
        )
