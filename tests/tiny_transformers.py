"""Tiny random networks of transformers' classes, and batches for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffusionblocks as db

VOCAB, LABELS, MASK = 20, 5, 19
IMAGES = dict(hidden_size=16, num_attention_heads=2, image_size=8, patch_size=4, num_channels=3, num_labels=LABELS)
TEXTS = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=VOCAB, max_position_embeddings=12)
LLAMA = dict(**TEXTS, num_key_value_heads=1, initializer_range=0.2)
MODERN = dict(
    **TEXTS, num_labels=LABELS, pad_token_id=0, local_attention=4, global_attn_every_n_layers=2, bos_token_id=1,
    eos_token_id=2, cls_token_id=1, sep_token_id=2, initializer_range=0.2,
)  # fmt: skip
QWEN = dict(LLAMA, use_sliding_window=True, sliding_window=3, max_window_layers=2, head_dim=8)

# class -> its config's class and values; attention reaches few tokens, so that a wrong window shows
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", dict(IMAGES, intermediate_size=32)),
    "DeiTForImageClassification": ("DeiTConfig", dict(IMAGES, intermediate_size=32)),
    "Dinov2ForImageClassification": ("Dinov2Config", dict(IMAGES, mlp_ratio=2, layerscale_value=0.5)),
    "BertForSequenceClassification": ("BertConfig", dict(TEXTS, num_labels=LABELS, initializer_range=0.2)),
    "ModernBertForSequenceClassification": ("ModernBertConfig", dict(MODERN, classifier_pooling="mean")),
    "BertForMaskedLM": ("BertConfig", dict(TEXTS, initializer_range=0.2)),
    "ModernBertForMaskedLM": ("ModernBertConfig", MODERN),
    "LlamaForCausalLM": ("LlamaConfig", dict(LLAMA, tie_word_embeddings=True)),
    "MistralForCausalLM": ("MistralConfig", dict(LLAMA, sliding_window=3, head_dim=8)),
    "Qwen2ForCausalLM": ("Qwen2Config", QWEN),
    "Qwen3ForCausalLM": ("Qwen3Config", QWEN),
    "SmolLM3ForCausalLM": ("SmolLM3Config", dict(LLAMA, no_rope_layer_interval=2, pad_token_id=0)),
    "GPT2LMHeadModel": (
        "GPT2Config", dict(n_embd=16, n_head=2, n_inner=32, vocab_size=VOCAB, n_positions=12, initializer_range=0.2)
    ),
}  # fmt: skip
CLASSES = list(NETWORKS)
IMAGE, TEXT, MASKED, CAUSAL = CLASSES[:3], CLASSES[3:5], CLASSES[5:7], CLASSES[7:]


def network(name: str, *, layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Return an untrained network of a class, in evaluation mode as from_pretrained gives it."""
    transformers = pytest.importorskip("transformers")
    config_name, values = NETWORKS[name]
    values = {**values, "n_layer" if name.startswith("GPT2") else "num_hidden_layers": layers, **changes}
    torch.manual_seed(seed)
    made = getattr(transformers, name)(getattr(transformers, config_name)(**values)).eval()
    with torch.no_grad():  # biases and norms that do nothing would hide a lost module
        for p in made.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn_like(p)
    return made


def convert(made: nn.Module, blocks: Any = 2, **options: Any) -> db.DiffusionBlocks:
    """Return a network as blocks."""
    if type(made).__name__ in MASKED:
        options["mask_token_id"] = MASK
    return db.convert(made, blocks, **options)


def batch(name: str, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a learnable batch (x, y) for a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(LABELS, (size,), generator=generator)
    if name in IMAGE:
        shade = (labels.float() / 2 - 1).view(-1, 1, 1, 1)
        return 0.1 * torch.randn(size, 3, 8, 8, generator=generator) + shade, labels
    tokens = 1 + (labels.view(-1, 1) + torch.arange(9)) % 18  # each the one before it, plus one; none is padding
    if name in TEXT:
        return tokens, labels
    return (tokens[:, :0], tokens) if name in MASKED else (tokens[:, :-1].clone(), tokens[:, 1:].clone())


def inputs(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Return what the network itself takes: for masked language models some tokens and masks."""
    return torch.where(torch.arange(y.shape[1]) % 3 == 0, MASK, y) if name in MASKED else x
