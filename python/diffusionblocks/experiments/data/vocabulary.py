"""Vocabularies: text to tokens and back, by characters or by byte pairs; a run stores its own."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

UNKNOWN = "\ufffd"
BYTES = 256


class Vocabulary(ABC):
    """The tokens of a text."""

    characters: int
    """Number of characters that a text may hold."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Encode a text as tokens (N,) int64."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens (N,)."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what `from_facts` makes the vocabulary of, as JSON values."""

    @abstractmethod
    def check(self, prompt: str) -> None:
        """Raise ValueError if a prompt can't be encoded without loss."""

    def rate(self, windows: Tensor) -> float:
        """Return tokens per character of windows (W, N): the factor from bits per token to bits per character."""
        return windows.numel() / max(1, sum(len(self.decode(window)) for window in windows))


class Characters(Vocabulary):
    """Token i stands for alphabet[i], the last one for every other character."""

    def __init__(self, alphabet: str):
        self.alphabet, self.characters = alphabet, len(alphabet)

    def encode(self, text: str) -> Tensor:
        token = {character: i for i, character in enumerate(self.alphabet)}
        return torch.tensor([token.get(character, len(self.alphabet) - 1) for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.alphabet[i] for i in tokens.tolist())

    def facts(self) -> dict[str, Any]:
        return {"alphabet": self.alphabet}

    def check(self, prompt: str) -> None:
        """Raise ValueError if a prompt has characters that aren't in the alphabet: the model would see others."""
        known = self.alphabet.rstrip(UNKNOWN)
        unknown = sorted(set(prompt) - set(known))
        if unknown:
            count = sum(character in unknown for character in prompt)
            raise ValueError(
                f"prompt has {''.join(unknown)!r}, {count} of {len(prompt)} characters, the model knows "
                f"{known!r}: leave it out"
            )


class BytePairs(Vocabulary):
    """Byte-level byte-pair encoding: any text, without loss. It needs the library `tokenizers`.

    Source: Sennrich, Haddow, Birch 2016, arXiv 1508.07909; on bytes as GPT-2's.
    """

    characters = BYTES

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BytePairs:
        """Merge the most frequent pairs of a text until there are `vocab_size` tokens, the 256 bytes among them.

        Raises: ValueError if there are fewer, or the text hasn't that many.
        """
        if vocab_size < BYTES:
            raise ValueError(
                f"tokens='bpe' needs --model.vocab-size of at least {BYTES}, one per byte, got {vocab_size}"
            )
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        bytes_ = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=bytes_, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
        if tokenizer.get_vocab_size() < vocab_size:
            raise ValueError(
                f"the text gives {tokenizer.get_vocab_size()} byte-pair tokens, not {vocab_size}: lower "
                "--model.vocab-size, or give more text"
            )
        return cls(tokenizer)

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens (N,); a character that is cut is U+FFFD."""
        text: str = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return text

    def check(self, prompt: str) -> None:
        """Accept any prompt: all bytes are known."""

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self.tokenizer.to_str())}


def from_facts(facts: dict[str, Any]) -> Vocabulary:
    """Return the vocabulary that a run stored."""
    if "tokenizer" in facts:
        return BytePairs(_library().Tokenizer.from_str(json.dumps(facts["tokenizer"])))
    return Characters(facts["alphabet"])


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "byte-pair tokens need the library `tokenizers`: pip install 'diffusionblocks[bpe]'"
        ) from error
    return tokenizers
