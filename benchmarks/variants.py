"""What each study compares: variants of a run, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffusionblocks.experiments.config import TrainConfig
from diffusionblocks.experiments.recipes import Recipe

# With six layers in three blocks there is no remainder; with a fixed codebook of unit vectors "raw" changes nothing.
SWITCHES = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("remainder", "estimate")]
Variants = dict[str, TrainConfig]


def tripled(base: TrainConfig) -> TrainConfig:
    """One block with three times the steps, at half the rate, which is better for all layers at once."""
    return base.in_blocks(1, steps=3 * base.steps, lr=base.lr / 2)


def lone(base: TrainConfig) -> Variants:
    """One block's layers alone, for all noise and all the steps: what blocks must beat to be worth their weights."""
    alone = replace(base.in_one_block(max(base.layer_counts)), steps=base.total_steps)
    name = "1 layer" if alone.layers == 1 else f"{alone.layers} layers"
    return {f"{name} alone": alone}


def controls(base: TrainConfig) -> Variants:
    """Machines that never speak: with blocks, of which nothing is shared, and noise cut beforehand; and without, where
    each trains one block's layers for its share of the updates."""
    (alone,) = lone(base).values()
    share = replace(alone, steps=base.steps)
    count = base.blocks
    ways = f"lone, 1/{count} of the updates", f"soup of {count}", f"soup of {count}, by outputs"
    return {f"B={count}, apart": replace(base, shared="per_block", adapt=False)} | dict.fromkeys(ways, share)


def late(base: TrainConfig) -> Variants:
    """Three blocks that begin as copies of one that was trained for all noise for three quarters of the steps."""
    return {"B=3, branched": base.in_blocks(3, branch=0.75)}


def branched(base: TrainConfig) -> Variants:
    """Blocks that begin as copies of one that was trained for all noise, from never to nearly always."""
    return {f"branch {share:g}": replace(base, branch=share) for share in (0.0, 0.25, 0.5, 0.75, 0.9)} | lone(base)


def vit(base: TrainConfig) -> Variants:
    """Numbers of blocks, independent blocks, and every difference between the two recipes."""
    sizes = {f"B={b}": base.in_blocks(b) for b in (1, 2, 3, 6)}
    independent = {f"B={b} per_block": base.in_blocks(b, shared="per_block") for b in (2, 3, 6)}
    switched = {f"corrected, {field} as published": replace(base, switch=(field,)) for field in SWITCHES}
    published = {"published": replace(base, recipe="published")}
    restored = {
        f"published, {field} as corrected": replace(base, recipe="published", switch=(field,)) for field in SWITCHES
    }
    return sizes | independent | lone(base) | late(base) | published | switched | restored


def causal_lm(base: Any) -> Variants:
    """Numbers of blocks, what they share, how they combine, and what the network sees of z; each alone."""
    return {
        "B=1": base.in_blocks(1),
        "B=2": base,
        "B=4": base.in_blocks(4),
        "B=2 per_block": replace(base, shared="per_block"),
        "B=2, each alone": replace(base, combine="none"),
        "B=2, half at the highest noise": replace(base, context=0.5),
        "B=2, all by information": replace(base, context=0.0),
        "B=2, layers 1-3": replace(base, split=(1, 3)),
        "B=2, layers 3-1": replace(base, split=(3, 1)),
        "B=2, sees its own z": seeing(base, 1),
        "B=2, groups of 4": seeing(base, 4),
        "B=2, groups of 16": seeing(base, 16),
    }


def seeing(base: Any, group_size: int) -> TrainConfig:
    """Blocks that look at the noised tokens, in groups, each alone."""
    return replace(base, combine="none", model=replace(base.model, sees_z=True, group_size=group_size))


def dit(base: Any) -> Variants:
    """Numbers of blocks (one is the end-to-end network), and one block with as many updates as three."""
    sizes = {"B=2": base.in_blocks(2), "B=3": base.in_blocks(3)}
    return {**sizes, **late(base), **lone(base), "B=1, equal updates": tripled(base)}


def dit_blocks(base: Any) -> Variants:
    """One to six blocks, without overlap and with it; at equal compute, and at the updates of the base's blocks."""
    found: Variants = {"B=1, equal compute": base.in_blocks(1), "B=1, equal updates": tripled(base)}
    for b in range(2, base.model.layers + 1):
        for overlap in (0.0, base.overlap):
            found[f"B={b}, overlap {overlap:g}, equal compute"] = base.in_blocks(b, overlap=overlap)
            if b != base.blocks:  # there they are the same
                steps = base.steps * base.blocks // b
                found[f"B={b}, overlap {overlap:g}, equal updates"] = base.in_blocks(b, overlap=overlap, steps=steps)
    return found


def dit_partition(base: Any) -> Variants:
    """How noise is cut, by how layers are split: three blocks."""
    layers = base.model.layers
    few, some, many = layers // 6 or 1, layers // 3, layers - layers // 3 - (layers // 6 or 1)
    splits = [(some, some, layers - 2 * some), (few, some, many), (many, some, few), (few, many, some)]
    return {
        f"{cut}, layers {'-'.join(map(str, split))}": replace(base, cut=cut, split=split)
        for cut in ("probability", "uniform", "log_uniform")
        for split in splits
    }


def dit_overlap(base: Any) -> Variants:
    """How far the ranges of noise overlap."""
    return {f"overlap {overlap:g}": replace(base, overlap=overlap) for overlap in (0.0, 0.025, 0.05, 0.1, 0.2)}


def sharing(base: Any) -> Variants:
    """What the blocks share: stem and head, nothing, or ends that nobody trains."""
    return {shared: replace(base, shared=shared) for shared in ("shared", "per_block", "frozen")}


def moments(base: TrainConfig) -> Variants:
    """How the optimizer stores its moments; torchao's 8-bit ones are compared with them."""
    return {f"moments in {dtype}": replace(base, moments=dtype) for dtype in ("float32", "bfloat16")}


def masked_lm(base: Any) -> Variants:
    """The same for masked text, whose ranges don't overlap; and independent blocks."""
    return {**dit(base), "B=3 per_block": replace(base, shared="per_block")}


def tokens(base: Any) -> Variants:
    """Characters and byte pairs of a longer text, in windows of as many tokens; and one block's layers alone."""
    characters = replace(base, text="king-james", steps=base.steps // 2, levels=base.blocks)
    pairs = replace(characters, tokens="bpe", model=replace(base.model, vocab_size=2048))
    named = {"characters": characters, "2,048 byte pairs": pairs}
    return {
        f"{name}, {way}": config
        for name, kind in named.items()
        for way, config in {f"B={base.blocks}": kind, **lone(kind)}.items()
    }


def capacity(base: Any) -> Variants:
    """One narrow layer a block, trained up to fifteen times as long: what becomes of a lone block that is filled?"""
    found: Variants = {}
    for dim, steps in ((32, 1500), (32, 5000), (32, 15000), (16, 5000), (16, 15000)):
        model = replace(base.model, dim=dim, layers=3, heads=2, mlp=4 * dim, cond=dim // 4)
        small = replace(base, model=model, steps=steps)
        ways = {"B=3": small, "B=3, branched at half": replace(small, branch=0.5), **lone(small)}
        found |= {f"width {dim}, {steps} steps: {name}": config for name, config in ways.items()}
    return found


def forks(base: Any) -> Variants:
    """What is trained on from one network for all noise, of a width that the task fills and of one that it doesn't."""
    found: Variants = {}
    for blocks in (3, 2):
        for dim in FORKED:
            model = replace(base.model, dim=dim, heads=2, mlp=4 * dim, layers=2 * blocks)
            longer: dict[str, Any] = {"steps": FORKED_AT, "lr": base.lr / 2}
            longer |= {"draws": 0.5} if base.architecture == "dit" else {}
            found[f"width {dim}, B={blocks}"] = base.in_blocks(blocks, model=model, split=(), **longer)
    return found


def on_gpu(base: Any) -> Variants:
    """The forks that fit minutes of a large GPU."""
    model = replace(base.model, dim=256, heads=4, mlp=1024, layers=6)
    return {
        "width 256, B=3": base.in_blocks(3, model=model, split=(), steps=25_000, batch_size=512, lr=1e-3, draws=0.5)
    }


def tiny(config: Any) -> TrainConfig:
    """The same of a network that trains in no time, to no end."""
    return replace(config, steps=40, model=replace(config.model, dim=16, heads=2, mlp=16, cond=8))


def recurrent(base: Any) -> Variants:
    """One pass a step, at a tenth of the ordinary network's compute and at all of it, where no haste is needed."""
    return {"a tenth": base, "equal compute": replace(base, share=1.0, lr=1e-3)}


def recurrence(base: Any) -> Variants:
    """Nothing but what is compared: ways to train one core, or a tiny network, for many passes at equal compute."""
    return {}


FORKED, FORKED_AT = (32, 64), 16_000  # widths, and steps of the bases
EIGHT_BIT = "moments in 8 bits (torchao)"
# With what an architecture is compared in its main study, if not with the end-to-end network alone.
COMPARED = {
    "vit": ("end-to-end", "forward-forward", "noprop"),
    "causal_lm": ("end-to-end", "shallow", "shallow, equal compute", "shallow, averaged"),
}
STUDIES: dict[str, dict[str, Callable[[Any], Variants]]] = {
    "vit": {"main": vit, "controls": controls, "sharing": sharing, "branch": branched, "moments": moments},
    "dit": {
        "main": dit,
        "controls": controls,
        "blocks": dit_blocks,
        "partition": dit_partition,
        "overlap": dit_overlap,
        "sharing": sharing,
        "branch": branched,
        "moments": moments,
        "forks": forks,
    },
    "masked_lm": {
        "main": masked_lm,
        "controls": controls,
        "sharing": sharing,
        "branch": branched,
        "capacity": capacity,
        "tokens": tokens,
        "moments": moments,
        "forks": forks,
    },
    "causal_lm": {"main": causal_lm, "controls": controls, "sharing": sharing, "branch": branched},
    "recurrent": {"main": recurrent, "recurrence": recurrence},
}


def choices(base: TrainConfig) -> Variants:
    """Learning rates and warm-ups to choose from on the validation split, by number of blocks."""
    return {
        f"B={b}, lr {lr:g}, warm-up {warmup:g}": base.in_blocks(b, lr=lr, warmup=warmup)
        for b in (1, 2, 3, 6)
        if b in base.block_counts
        for lr in base.tune_lr
        for warmup in base.tune_warmup
    }
