"""Where each class of transformers' networks keeps its parts: a row per class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The parts of a class of networks, by their dotted names in it.

    Attributes:
        kind: What it maps to what: "images" or "texts" to labels, "masked" or "causal" tokens to tokens.
        embeddings: x -> tokens (B, N, D).
        layers: The list of layers; names of several versions of transformers, the first that exists counts.
        before: Modules between the layers and the pooling, in order.
        after: Modules behind the pooling, in order; the last is the linear map to logits.
        pool: Tokens to one vector: "first", "first and mean", "classifier_pooling" (as the config says), or None.
        positions: Position embeddings that aren't part of `embeddings`, and the dropout behind them.
        rotary: Module that computes rotary angles.
        rotary_by_type: Its angles depend on the layer's kind of attention.
        any_size: Images may have other sizes than the config's; positions are interpolated.
    """

    kind: str
    embeddings: str
    layers: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    pool: str | None = None
    positions: tuple[str, ...] = ()
    rotary: str | None = None
    rotary_by_type: bool = False
    any_size: bool = False


def _vision(name: str, pool: str, *, any_size: bool = False) -> Family:
    layers, norm = (f"{name}.layers", f"{name}.encoder.layer"), (f"{name}.layernorm",)
    return Family("images", f"{name}.embeddings", layers, norm, ("classifier",), pool, any_size=any_size)


def _bert(kind: str, before: tuple[str, ...], after: tuple[str, ...]) -> Family:
    return Family(kind, "bert.embeddings", ("bert.encoder.layer",), before, after)


def _modern_bert(kind: str, after: tuple[str, ...], pool: str | None) -> Family:
    return Family(
        kind, "model.embeddings", ("model.layers",), ("model.final_norm",), after, pool,
        rotary="model.rotary_emb", rotary_by_type=True,
    )  # fmt: skip


_LLAMA = Family(
    "causal", "model.embed_tokens", ("model.layers",), ("model.norm",), ("lm_head",), rotary="model.rotary_emb"
)
_GPT2 = Family(
    "causal", "transformer.wte", ("transformer.h",), ("transformer.ln_f",), ("lm_head",),
    positions=("transformer.wpe", "transformer.drop"),
)  # fmt: skip

FAMILIES = {
    f"transformers.models.{module}.modeling_{module}.{name}": family
    for module, name, family in (
        ("vit", "ViTForImageClassification", _vision("vit", "first")),
        ("deit", "DeiTForImageClassification", _vision("deit", "first")),
        ("dinov2", "Dinov2ForImageClassification", _vision("dinov2", "first and mean", any_size=True)),
        ("bert", "BertForSequenceClassification", _bert("texts", ("bert.pooler",), ("dropout", "classifier"))),
        ("bert", "BertForMaskedLM", _bert("masked", ("cls.predictions.transform",), ("cls.predictions.decoder",))),
        (
            "modernbert", "ModernBertForSequenceClassification",
            _modern_bert("texts", ("head", "drop", "classifier"), "classifier_pooling"),
        ),
        ("modernbert", "ModernBertForMaskedLM", _modern_bert("masked", ("head", "decoder"), None)),
        ("llama", "LlamaForCausalLM", _LLAMA),
        ("mistral", "MistralForCausalLM", _LLAMA),
        ("qwen2", "Qwen2ForCausalLM", _LLAMA),
        ("qwen3", "Qwen3ForCausalLM", _LLAMA),
        ("smollm3", "SmolLM3ForCausalLM", _LLAMA),
        ("gpt2", "GPT2LMHeadModel", _GPT2),
    )
}  # fmt: skip
