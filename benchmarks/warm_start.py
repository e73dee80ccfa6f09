"""Fine-tuning a causal language model in blocks, from the weights of one that was trained end to end.

python benchmarks/warm_start.py [--out FOLDER] [--seeds 0 1 2] [--quick]

A small Llama learns the King James Bible by characters, then Python's help, at equal layer evaluations: all layers end
to end; in blocks, each alone; in blocks, to whose loss the ordinary cross-entropy of the whole network is added,
through the other blocks, frozen (so all are at hand). Read are bits per character of the whole network, of each block
and of the blocks' mean. Each way has the best of four learning rates, on the validation split.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables
import torch
import tyro
from torch import Tensor
from torch.nn import functional

import diffusionblocks as db
from diffusionblocks.experiments.data import text
from diffusionblocks.experiments.run_folder import machine
from diffusionblocks.training.schedule import learning_rate

LENGTH, BATCH, BLOCKS = 64, 16, 2
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
READ = 256  # windows that are read
PRETRAINED, TUNED = 4000, 1000  # steps of all layers


@dataclass
class Options:
    """What to run."""

    out: Path = tables.RESULTS
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    quick: bool = False
    """Few steps: does it run?"""


def llama(seed: int) -> Any:
    """Return an untrained Llama of four layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean, nats."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def fit(parameters: Any, loss: Callable[[int, Tensor, Tensor], Tensor], data: Any, steps: int, lr: float) -> None:
    """Train parameters by a loss of (step, x, y)."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr)
    for step in range(steps):
        tokens, _ = data.batch(step)
        loss(step, tokens[:, :-1], tokens[:, 1:]).backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=steps, peak=lr, warmup=steps // 20)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # None: what has no gradient stays as it is, its moments too


def whole(model: db.DiffusionBlocks, x: Tensor) -> Tensor:
    """Return the logits of all layers, one block after the other, without noise."""
    around = model.stem_head
    assert around is not None
    h = around.stem.clean(x)
    for block in model.blocks:
        for layer in block.layers:
            h = layer(h, None)
    return around.head(around.head.features(h), None)


def end_to_end(network: Any, data: Any, steps: int, lr: float, seed: int) -> db.DiffusionBlocks:
    """Train all layers at once."""
    model = db.convert(network, BLOCKS, cond=0)
    fit(model.parameters(), lambda step, x, y: cross_entropy(whole(model, x), y), data, steps, lr)
    return model


def in_blocks(network: Any, data: Any, steps: int, lr: float, seed: int, *, mixed: bool = False) -> db.DiffusionBlocks:
    """Train one block after the other; mixed: half the loss is that of the whole network, through the frozen others."""
    model = db.convert(network, BLOCKS, cond=0)

    def loss(step: int, x: Tensor, y: Tensor) -> Tensor:
        active = step // 25 % BLOCKS
        own = model.loss(active, x, y, seed=seed, step=step).loss
        if not mixed:
            return own
        for b, block in enumerate(model.blocks):
            block.requires_grad_(b == active)
        return (own + cross_entropy(whole(model, x), y)) / 2

    # a block is 1 / BLOCKS of the layers; with the whole network beside it a step runs all of them, forward, once more
    cost = 1 / BLOCKS + (1.0 if mixed else 0.0)
    fit(model.parameters(), loss, data, round(steps / cost), lr)
    return model


WAYS: dict[str, Callable[..., db.DiffusionBlocks]] = {
    "end to end": end_to_end,
    "in blocks": in_blocks,
    "in blocks, with the whole network's loss": lambda *given: in_blocks(*given, mixed=True),
}


@torch.no_grad()
def bits(model: db.DiffusionBlocks, tokens: Tensor) -> dict[str, Any]:
    """Return bits per character: of the whole network, of each block's own answer, and of their mean."""
    x, y, model = tokens[:, :-1], tokens[:, 1:], model.eval()
    told = [model.logits(x, b) for b in range(BLOCKS)]
    nats = [cross_entropy(logits, y) for logits in (whole(model, x), *told, torch.stack(told).mean(0))]
    every = [float(value) / math.log(2) for value in nats]
    return {"whole": every[0], "blocks": every[1:-1], "mean": every[-1]}


def best(found: dict[str, Any]) -> float:
    """Return the bits of the better use of a model: as a whole, or the mean of its blocks."""
    return min(found["whole"], found["mean"])


def tune(way: str, weights: dict[str, Tensor], data: Any, splits: dict[str, Tensor], steps: int, seed: int) -> Any:
    """Return what a way of training reaches, at the best of the rates on the validation split."""
    found = []
    for lr in RATES:
        network = llama(seed)
        network.load_state_dict(weights)
        torch.manual_seed(seed)
        model = WAYS[way](network.train(), data, steps, lr, seed)
        found.append({"lr": lr, **{name: bits(model, tokens) for name, tokens in splits.items()}})
    return min(found, key=lambda one: best(one["val"]))


def windows(tokens: Tensor, seed: int) -> Any:
    """Return batches of a text."""
    return text.Windows(tokens, LENGTH, BATCH, seed=seed, device=torch.device("cpu"))


def pretrained(tokens: Tensor, steps: int, seed: int) -> Any:
    """Return a network that has learnt a text."""
    network = llama(seed)
    loss = lambda step, x, y: cross_entropy(network(x).logits, y)  # noqa: E731
    fit(network.parameters(), loss, windows(tokens, seed), steps, 2e-3)
    return network


def main(options: Options) -> None:
    """Write a row for each way and seed to warm_start.jsonl."""
    torch.set_num_threads(options.threads)
    shrink = 200 if options.quick else 1
    new = text.load("topics", vocab_size=96)
    old = new.train if options.quick else new.vocabulary.encode("\n".join(text.load_documents("king-james")))
    splits = {name: text.rows(getattr(new, name), LENGTH)[:READ] for name in ("val", "test")}
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        network = pretrained(old, PRETRAINED // shrink, seed)
        facts = {"seed": seed, "start": bits(db.convert(network, BLOCKS, cond=0), splits["test"])}
        weights = {name: t.clone() for name, t in network.state_dict().items()}
        for way in WAYS:
            found = tune(way, weights, windows(new.train, seed), splits, max(TUNED // shrink, 4), seed)
            row = {"way": way, **facts, **found, "machine": machine(torch.device("cpu"))}
            with (options.out / "warm_start.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(way, seed, row["lr"], row["test"], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
