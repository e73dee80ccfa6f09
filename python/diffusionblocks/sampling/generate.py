"""Texts by a language model in blocks: token by token with a cache for each block, or all masks at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import dbkernels

from ..arguments import check_whole
from ..blocks import STEPS, DiffusionBlocks
from ..denoiser import StemHead
from ..noise.partition import step_levels
from ..noise.rng import draw, stream
from ..targets.masked import MaskedTarget
from .decoding import Filter, check_filters, filtered
from .sampler import Sampler

TEXTS = 64  # that are read at once: each has logits of a vocabulary for every token
Stop = Callable[[Tensor, Tensor | None], Any]


@torch.no_grad()
def generate(
    model: DiffusionBlocks,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    steps: int = STEPS,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stopping_criteria: Stop | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Return prompts with new tokens behind them, with averaged weights where there are any.

    A causal model writes one token after the other, each denoised by all blocks in turn; with more blocks than fit the
    device they come and go for every token. A masked model fills `max_new_tokens` masks, and those in the prompts.

    Args:
        model: A converted causal or masked language model.
        tokens: Prompts, (B, n) int64, n >= 1, all of one length: a tokenizer's `input_ids`. The mask's id is a mask.
        max_new_tokens: How many are written, at most.
        steps: Steps of the trajectory, at least one per block: for each token, or for all masks.
        temperature, top_k, top_p: Filter the network's logits, before what z tells of the token is added.
        eos_token_id: Ends a text, or ids that do; what comes behind is `pad_token_id`, by default the first of them.
        stopping_criteria: As transformers calls it, of tokens (B, N) and None -> whether each text, (B,), or all of
            them have ended; causal models alone.
        attention_mask: A tokenizer's, (B, n), which must hide nothing: prompts of other lengths are given apart.
        seed: Of the noise and the draws.

    Returns: (B, n + new) int64.
    Raises: ValueError or TypeError on arguments that don't fit, or a model that writes no text.
    """
    _check(model, tokens, max_new_tokens, attention_mask)
    check_whole("steps", steps, 1)
    if type(seed) is not int:
        raise TypeError(f"seed must be an int, got {seed!r}")
    _check_stop(model, stopping_criteria)
    ends = _ids(model, "eos_token_id", eos_token_id)
    pads = _ids(model, "pad_token_id", pad_token_id) or ends[:1]
    check_filters(temperature, top_k, top_p)
    keep = functools.partial(filtered, temperature=temperature, top_k=top_k, top_p=top_p)
    levels = step_levels(model.partition, max(steps, model.partition.blocks))
    eos, pad = torch.tensor(ends, dtype=torch.int64, device=tokens.device), pads[0] if pads else None
    training = model.training
    try:
        model.eval()
        with model.averages():
            if isinstance(model.target, MaskedTarget):
                made = _fill(model, tokens, max_new_tokens, levels, keep, seed)
                return _end(made, tokens.shape[1], eos, pad)
            return _write(Writer(model, levels, keep, seed), tokens, max_new_tokens, eos, pad, stopping_criteria)
    finally:
        model.train(training)


def _check(model: DiffusionBlocks, tokens: Tensor, max_new_tokens: int, attention_mask: Tensor | None) -> None:
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(f"model must be DiffusionBlocks, from convert, got {type(model).__name__}")
    stem = model.blocks[0].around(model.stem_head).stem
    if not (isinstance(model.target, MaskedTarget) or hasattr(stem, "decode")):
        raise ValueError("this model writes no text: generate takes causal and masked language models of db.convert")
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"tokens must be an int64 tensor (B, n), got {type(tokens).__name__}: of tokenizer(prompts, "
            "return_tensors='pt') give .input_ids"
        )
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(f"tokens must be non-empty int64 prompts (B, n), got {tuple(tokens.shape)} {tokens.dtype}")
    if attention_mask is not None and torch.as_tensor(attention_mask).shape != tokens.shape:
        shape = tuple(torch.as_tensor(attention_mask).shape)
        raise ValueError(f"attention_mask must be of the tokens' shape {tuple(tokens.shape)}, got {shape}")
    if attention_mask is not None and not bool(torch.as_tensor(attention_mask).all()):
        raise ValueError(
            "attention_mask hides tokens: prompts must be of one length without padding; generate those of each length "
            "apart, e.g. prompt by prompt, tokens[i : i + 1, attention_mask[i].bool()]"
        )
    check_whole("max_new_tokens", max_new_tokens, 1)
    if isinstance(model.target, MaskedTarget):
        model.target.check_noised(tokens)
    else:
        stem.check(tokens)
        try:  # as long as it becomes but for the last token, which isn't read
            stem.check(torch.cat([tokens, tokens[:, :1].expand(-1, max_new_tokens - 1)], 1))
        except ValueError as error:
            raise ValueError(f"the prompts with max_new_tokens={max_new_tokens}: {error}") from error


def _check_stop(model: DiffusionBlocks, stop: Stop | None) -> None:
    if stop is not None and not callable(stop):
        raise TypeError(f"stopping_criteria must be a function of tokens and None, got {stop!r}")
    if stop is not None and isinstance(model.target, MaskedTarget):
        raise ValueError("stopping_criteria: a masked model writes all tokens at once; give eos_token_id, or cut them")


def _ids(model: DiffusionBlocks, name: str, given: int | Sequence[int] | None) -> list[int]:
    """Return token ids as a list. Raises: ValueError if the model has no such tokens."""
    ids: list[Any] = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    target = model.target
    size = target.mask_id if isinstance(target, MaskedTarget) else len(target.table)
    if any(type(i) is not int or not 0 <= i < size for i in ids):
        raise ValueError(f"{name} must be among the model's {size} tokens, got {given!r}")
    return ids


def _fill(model: DiffusionBlocks, tokens: Tensor, count: int, levels: list[float], keep: Filter, seed: int) -> Tensor:
    """Return prompts, and `count` masks behind them, with all masks filled."""
    target = model.target
    assert isinstance(target, MaskedTarget)
    own = getattr(model.blocks[0].around(model.stem_head).stem, "mask_token_id", None)
    if own is not None:
        tokens = torch.where(tokens == own, target.mask_id, tokens)  # the tokenizer's mask
    z = torch.cat([tokens, torch.full_like(tokens[:, :1], target.mask_id).expand(-1, count)], 1)
    *_, (_, filled) = fill(model, z, levels, seed=seed, keep=keep)
    return filled


def fill(
    model: DiffusionBlocks, z: Tensor, levels: Sequence[float], *, seed: int, keep: Filter = lambda logits: logits
) -> Iterator[tuple[float, Tensor]]:
    """Yield each level of a masked model's trajectory, and the tokens as the step from it leaves them.

    Args:
        z: Tokens and masks, (B, N) int64.
        levels: Falling times, then 0.
        keep: Filter of the logits.
        seed: Of the draws.

    Source: Shi et al. 2024 (MD4), algorithm 2.
    """
    target = model.target
    assert isinstance(target, MaskedTarget)
    read = Sampler(model, z[:, :0], batch=TEXTS)
    for i, (t, s) in enumerate(itertools.pairwise(levels)):
        drawn = draw(keep(target.writable(read(z, t).raw)), seed=stream(seed, "tokens"), offset=i)
        z = target.reveal(z, drawn, t, s, seed=seed, step=i)
        yield t, z


def _end(tokens: Tensor, begin: int, eos: Tensor, pad: int | None) -> Tensor:
    """Return texts whose tokens behind the first of `eos`, from `begin` on, are `pad`."""
    if not len(eos) or pad is None:
        return tokens
    ended = torch.isin(tokens[:, begin:], eos)
    behind = ended.cumsum(1) - ended.long() > 0
    return torch.cat([tokens[:, :begin], tokens[:, begin:].masked_fill(behind, pad)], 1)


def _write(writer: Writer, tokens: Tensor, count: int, eos: Tensor, pad: int | None, stop: Stop | None) -> Tensor:
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(count):
        token = writer.next(tokens)
        if pad is not None:
            token = torch.where(ended.unsqueeze(1), pad, token)
        tokens = torch.cat([tokens, token], 1)
        ended = ended | torch.isin(token.squeeze(1), eos)
        if stop is not None:
            ended = ended | torch.as_tensor(stop(tokens, None), device=tokens.device)
        if (len(eos) or stop is not None) and bool(ended.all()):
            break
    return tokens


class Writer:
    """Writes the next token of a batch of texts; each block caches the keys and values of those before.

    Args:
        model: A causal model, in eval mode.
        levels: Falling noise levels, the last 0.
        keep: Filter of the logits before z's evidence is added.
        seed: Of the noise and the draws.
    """

    def __init__(self, model: DiffusionBlocks, levels: list[float], keep: Filter, seed: int):
        self.model, self.levels, self.keep, self.seed = model, levels, keep, seed
        self.caches = [self.around(b).stem.cache() for b in range(len(model.blocks))]

    def next(self, tokens: Tensor) -> Tensor:
        """Return the token (B, 1) behind tokens (B, N), which begin with those of the calls before."""
        key = stream(self.seed, "generate", tokens.shape[1])
        if self.model.ensemble:
            told = [self.read(b, tokens) for b in range(len(self.model.blocks))]
            return draw(self.keep(torch.stack(told).mean(0)), seed=key)
        target, table = self.model.target, self.model.target.table
        shape = (len(tokens), 1, table.shape[1])
        z = self.levels[0] * dbkernels.philox_normal(shape, seed=key, device=tokens.device)
        for sigma, below in itertools.pairwise(self.levels):
            level = torch.full(shape[:2], sigma, device=tokens.device)
            logits = self.denoise(self.model.partition.owner(sigma), tokens, z, level)
            output = target.posterior(self.keep(logits), z, level)
            z = target.advance(z, output, sigma, below, seed=self.seed, step=0)
        return output.raw.argmax(-1)

    def read(self, block: int, tokens: Tensor) -> Tensor:
        """Return a block's logits (B, 1, V) of the next token, from those before alone."""
        head, h = self.around(block).head, self.extend(block, tokens)
        return head(head.features(h)[:, -1:], None).float()

    def denoise(self, block: int, tokens: Tensor, z: Tensor, level: Tensor) -> Tensor:
        """Return a block's logits (B, 1, V) of the next token, of which z (B, 1, d) is the noised embedding."""
        around, cache = self.around(block), self.caches[block]
        if tokens.shape[1] - 1 > cache.length:
            self.extend(block, tokens[:, :-1])
        self.model.activate(block)
        cache.keeps = False  # the noisy token goes as it came
        h, cond = around.stem.decode(tokens[:, -1:], *self.model.target.inputs(z, level), cache)
        features = around.head.features(self.layers(block, h, cond))
        cache.keeps = True
        return around.head(features, cond).float()

    def extend(self, block: int, tokens: Tensor) -> Any:
        """Run a block on those tokens (B, N) that its cache doesn't hold, append them, and return what comes out."""
        cache, stem = self.caches[block], self.around(block).stem
        self.model.activate(block)
        made = self.layers(block, *stem.extend(tokens[:, cache.length :], cache))
        cache.length = tokens.shape[1]
        return made

    def layers(self, block: int, h: Any, cond: Tensor | None) -> Any:
        """Run a block's layers."""
        for layer in self.model.blocks[block].layers:
            h = layer(h, cond)
        return h

    def around(self, block: int) -> StemHead:
        """Return the stem and head of a block."""
        return self.model.blocks[block].around(self.model.stem_head)
