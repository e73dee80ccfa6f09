"""What a network must be to become blocks: everything else is refused by name, before a module is touched."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..blocks import DiffusionBlocks
from .families import Family

WRAPPERS = {  # class of what wraps a network: how to get at that, and what to do
    "OptimizedModule": ("_orig_mod", "compile blocks by Trainer(compile=True)"),
    "DataParallel": ("module", "train by Trainer(mesh=...) under torchrun"),
    "DistributedDataParallel": ("module", "train by Trainer(mesh=...) under torchrun"),
    "FullyShardedDataParallel": ("module before it is wrapped", "train by Trainer(offload=...)"),
    "PeftModel": ("get_base_model(), adapter and all", "import diffusionblocks.integrations.peft before"),
}
MASKED_ATTENTION = ("sdpa", "eager")  # take masks of any shape


def check_given(network: Any) -> None:
    """Raise TypeError or ValueError, saying what to do, unless this is a network, and bare."""
    kind = type(network).__name__
    if isinstance(network, DiffusionBlocks):
        raise TypeError("the network is DiffusionBlocks already: train it, or convert the network that it was made of")
    if not isinstance(network, nn.Module):
        found = repr(network) if isinstance(network, (str, type)) else f"a {kind}"
        instead = "convert its transformer" if hasattr(network, "transformer") else "load it by from_pretrained first"
        raise TypeError(f"network must be a torch.nn.Module, got {found}: {instead}")
    for config in getattr(network, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise ValueError(
                f"{type(config).__name__}: prompts before each text or layer are no part of blocks, and the network "
                "within is without them: use LoRA, or another adapter of the layers' own weights"
            )
    for wrapper in (base.__name__ for base in type(network).__mro__):
        if wrapper in WRAPPERS:
            inner, instead = WRAPPERS[wrapper]
            raise TypeError(f"{kind} wraps the network: convert its .{inner}, and {instead}")
    check_initialized("network", network)


def check_initialized(name: str, module: nn.Module) -> None:
    """Raise ValueError if a weight has no shape yet, as those of torch's lazy modules."""
    for key, t in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(t):
            raise ValueError(f"{name} has a lazy weight, {key}, without a shape yet: run it on a batch once before")


def check_network(network: Any, family: Family, mask_token_id: int | None) -> None:
    """Raise ValueError, saying what to do, unless a network can be converted."""
    name = type(network).__name__
    _check_parts(network, family)
    _check_weights(network, name)
    if family.kind in ("images", "texts"):
        _check_labels(network, family, name)
    if family.kind != "images":
        _check_attention(network.config, name)
    if family.kind in ("masked", "causal"):
        _check_vocabulary(network, family, name)
    _check_mask(network.config, family, name, mask_token_id)
    _check_checkpointing(network.get_submodule(layers_name(network, family)), name)


def check_latent_network(network: Any) -> None:
    """Raise ValueError, saying what to do, unless one of diffusers' networks can be converted."""
    name = type(network).__name__
    _check_weights(network, name)
    _check_plain_layers(name, network.gradient_checkpointing, "disable_gradient_checkpointing()")
    config = network.config
    if (config.out_channels or config.in_channels) < config.in_channels or config.get("image_dim"):
        raise ValueError(f"{name} is given images beside latents and texts, which blocks aren't: it isn't converted")


def check_timm_network(network: Any) -> None:
    """Raise ValueError, saying what to do, unless one of timm's networks can be converted."""
    name = type(network).__name__
    _check_weights(network, name)
    _check_plain_layers(name, network.grad_checkpointing, "set_grad_checkpointing(False)")
    if getattr(network, "distilled_training", False) or getattr(network, "rope_mixed", False):
        raise ValueError(f"{name} with distilled_training or a rotary table for each layer isn't converted")
    if network.num_classes < 2 or not network.global_pool:
        raise ValueError(
            f"{name} with num_classes={network.num_classes} and global_pool={network.global_pool!r} is no classifier: "
            "network.reset_classifier(num_classes, global_pool)"
        )


def _check_plain_layers(name: str, checkpointing: bool, off: str) -> None:
    if checkpointing:
        raise ValueError(
            f"{name}'s gradient checkpointing isn't of its layers, and would be lost: network.{off}, and "
            "Trainer(checkpoint_layers=True)"
        )


def layers_name(network: nn.Module, family: Family) -> str:
    """Return the name of a network's list of layers.

    Raises: ValueError if there is none.
    """
    for name in family.layers:
        try:
            if isinstance(found := network.get_submodule(name), nn.ModuleList) and len(found):
                return name
        except AttributeError:
            continue
    raise ValueError(
        f"{type(network).__name__} has no layers at {' or '.join(family.layers)}: use from_layers(layers, stem=, "
        "head=, target=, blocks=), or @register(Class) a converter of its own"
    )


def _check_parts(network: Any, family: Family) -> None:
    layers, depth = network.get_submodule(layers_name(network, family)), network.config.num_hidden_layers
    if len(layers) != depth:
        raise ValueError(
            f"{type(network).__name__} has {len(layers)} layers, its config says num_hidden_layers={depth}: correct "
            "it, for the network is built from it again"
        )
    names = [family.embeddings, *family.positions, *family.before, *family.after, family.rotary]
    for name in filter(None, names):
        try:
            network.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{type(network).__name__} has no {name}: convert a network as transformers makes it"
            ) from None


def _check_weights(network: Any, name: str) -> None:
    if getattr(network, "is_quantized", False):
        raise ValueError(
            f"this {name} is quantized, and quantized weights aren't trained: load it without quantization"
        )
    weights = dict(network.named_parameters())
    absent = next((n for n, p in weights.items() if p.is_meta), None)
    if absent is not None:
        raise ValueError(f"{absent} is on the meta device: load {name} without device_map, so that weights are there")
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in weights.values()})
    if len(dtypes) > 1:
        raise ValueError(f"this {name} has weights of {' and '.join(dtypes)}: make them one, network.to(torch.float32)")


def _check_labels(network: Any, family: Family, name: str) -> None:
    count, problem = network.config.num_labels, getattr(network.config, "problem_type", None)
    if count < 2 or problem not in (None, "single_label_classification"):
        what = f"num_labels={count}" if count < 2 else f"problem_type={problem!r}"
        raise ValueError(f"{name} with {what} is no classifier of single labels, the only kind that is converted")
    _check_linear(network, family, name, count, "num_labels")


def _check_linear(network: Any, family: Family, name: str, count: int, what: str) -> None:
    linear: Any = network.get_submodule(family.after[-1])
    if hasattr(linear, "base_layer"):
        raise ValueError(
            f"{name}'s {family.after[-1]} has an adapter, and the loss takes its plain weight: leave it out of "
            f"target_modules, or train it whole, modules_to_save=[{family.after[-1]!r}]"
        )
    if linear._forward_hooks or linear._forward_pre_hooks:
        raise ValueError(
            f"{name}'s {family.after[-1]} has a hook, and the loss takes its plain weight: remove the hook"
        )
    if type(linear) is not nn.Linear or linear.out_features != count:
        raise ValueError(
            f"{name}'s {family.after[-1]} must be a torch.nn.Linear to config.{what}={count} logits, got {linear}: "
            f"change the network through its config, e.g. from_pretrained(..., {what}=...)"
        )


def _check_attention(config: Any, name: str) -> None:
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} can't take the masks of blocks: "
            "network.set_attn_implementation('sdpa')"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name} with is_decoder or add_cross_attention isn't converted: set both False in its config")


def _check_vocabulary(network: Any, family: Family, name: str) -> None:
    _check_linear(network, family, name, network.config.vocab_size, "vocab_size")
    tied = network.get_input_embeddings().weight is network.get_submodule(family.after[-1]).weight
    if tied != bool(network.config.tie_word_embeddings):
        raise ValueError(
            f"{name}'s config has tie_word_embeddings={network.config.tie_word_embeddings}, but its embeddings and "
            f"{family.after[-1]} are {'one' if tied else 'two'}: call network.tie_weights(), or correct the config"
        )


def _check_mask(config: Any, family: Family, name: str, mask_token_id: int | None) -> None:
    if family.kind != "masked":
        if mask_token_id is not None:
            raise ValueError(f"mask_token_id is for masked language models, {name} is none")
    elif type(mask_token_id) is not int or not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(
            f"{name} needs mask_token_id in [0, {config.vocab_size}), got {mask_token_id!r}: its config doesn't know "
            "it, give the tokenizer's, mask_token_id=tokenizer.mask_token_id"
        )


def _check_checkpointing(layers: nn.Module, name: str) -> None:
    for layer in layers.modules():
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(layer, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                f"{name}'s gradient checkpointing is reentrant, which loses gradients behind a frozen stem: "
                "network.gradient_checkpointing_enable({'use_reentrant': False})"
            )
