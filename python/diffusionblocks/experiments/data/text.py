"""Text as tokens, from a file, a folder, a hub dataset or the standard library's help.

Stateless: the windows of a batch are a function of (seed, step).
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...noise.rng import stream
from ...targets.devices import send
from .vocabulary import UNKNOWN, BytePairs, Characters, Vocabulary, from_facts

EMBEDDED = "topics"
UNKNOWN_LIMIT = 0.1  # share of characters beyond the alphabet, above which a text of one's own is refused
HELD_OUT = 0.05  # share of the characters in validation, and in test


@dataclass(frozen=True)
class TextData:
    """Tokens (N,) int64 of each split, and their vocabulary."""

    train: Tensor
    val: Tensor
    test: Tensor
    vocabulary: Vocabulary

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens (N,)."""
        return self.vocabulary.decode(tokens)

    def check_windows(self, length: int, least: int) -> None:
        """Raise ValueError unless every split has at least `least` windows of `length` tokens."""
        shortest = min(len(self.train), len(self.val), len(self.test))
        if shortest < least * length:
            raise ValueError(
                f"a split holds {shortest} tokens, less than {least} windows of length={length}: give more text, "
                "or shorten the windows"
            )

    def facts(self) -> dict[str, Any]:
        """Return what a trained model needs of its data, and each split's size and SHA-256, as JSON values."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        digests = {name: hashlib.sha256(tokens.numpy().tobytes()).hexdigest() for name, tokens in splits.items()}
        sizes = {name: {"samples": len(splits[name]), "sha256": digests[name]} for name in splits}
        return {**self.vocabulary.facts(), "splits": sizes}


def load(source: str, *, vocab_size: int, tokens: str = "characters", stored: dict[str, Any] | None = None) -> TextData:
    """Load a text, shuffle its documents, hold out the end for validation and test, and encode it.

    Args:
        source: "topics" (Python's help, 465 kB, part of the standard library); "king-james" (the Bible, 4 MB, of
            Debian's package bible-kjv); a text file or a folder of .txt files; or "hub:NAME", the column "text" of a
            hub dataset or of a local copy.
        vocab_size: vocabulary size.
        tokens: "characters", the most frequent ones of the training split, and one token for all others; or "bpe",
            byte pairs, trained on the training split.
        stored: a run's facts, whose byte pairs are taken.

    Raises:
        FileNotFoundError: there is no such file, or program of Debian's.
        ValueError: the text isn't UTF-8, too short to hold any out, or more than a tenth of a text of one's own is
            beyond the alphabet.

    Warns: of characters beyond the alphabet, with their number.
    """
    documents = load_documents(source)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(stream(0, "documents")))
    text = "\n\n".join(documents[i] for i in order)
    held = int(len(text) * HELD_OUT)
    if held < 1:
        raise ValueError(f"{source} holds {len(text)} characters: too few to hold any out")
    train, val, test = text[: -2 * held], text[-2 * held : -held], text[-held:]
    vocabulary: Vocabulary
    if stored is not None and "tokenizer" in stored:
        vocabulary = from_facts(stored)
    elif tokens == "bpe":
        vocabulary = BytePairs.train(train, vocab_size)
    else:
        vocabulary = _characters(text, train, vocab_size, source)
    return TextData(vocabulary.encode(train), vocabulary.encode(val), vocabulary.encode(test), vocabulary)


def _characters(text: str, train: str, vocab_size: int, source: str) -> Characters:
    """Return the most frequent characters of the training split, in order."""
    counts = Counter(train)
    frequent = [character for character, _ in counts.most_common(vocab_size - 1)]
    alphabet = "".join(sorted(frequent)).ljust(vocab_size, UNKNOWN)
    _tell_unknown(text, counts, frequent, source)
    return Characters(alphabet)


def _tell_unknown(text: str, train: Counter[str], known: list[str], source: str) -> None:
    """Warn of characters beyond the alphabet, which the model sees as one. Raises: ValueError if they are too many."""
    counts = Counter(text)
    unknown = Counter({character: counts[character] for character in counts.keys() - set(known)})
    if not unknown:
        return
    share, kinds = unknown.total() / len(text), sorted(unknown, key=lambda character: (-unknown[character], character))
    more = f"; --model.vocab-size {len(train) + 1} keeps those of the training split" if len(train) > len(known) else ""
    said = (
        f"the text {source}: {unknown.total():,} of {len(text):,} characters ({share:.2%}) are beyond the {len(known)} "
        f"most frequent of the training split, the model's alphabet, and become U+FFFD, the replacement character: "
        f"{len(kinds)} rare one{'s' * (len(kinds) > 1)}, most often {', '.join(map(repr, kinds[:8]))}{more}"
    )
    if share > UNKNOWN_LIMIT and source != EMBEDDED:
        raise ValueError(f"{said}. More than {UNKNOWN_LIMIT:.0%} is refused: raise it, or remove them from the text")
    _warn_once(said)


@functools.cache
def _warn_once(said: str) -> None:  # a run loads its text several times
    warnings.warn(said, stacklevel=5)


def load_documents(source: str) -> list[str]:
    """Load the documents of a source (see `load`), in a fixed order."""
    if source == EMBEDDED:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if source == "king-james":
        from .king_james import chapters

        return chapters()
    if source.startswith("hub:"):
        from .hub import load_texts

        return load_texts(source.removeprefix("hub:"))
    path = Path(source).expanduser()
    files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path} is neither a text file nor a folder with .txt files")
    return [_load_text(file) for file in files]


def _load_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error


class Windows:
    """Training batches by step: (x, y), both the same random windows (batch_size, length) int64.

    Raises:
        ValueError: the text is shorter than a window.
    """

    def __init__(self, tokens: Tensor, length: int, batch_size: int, *, seed: int, device: torch.device | str):
        if len(tokens) < length:
            raise ValueError(f"the text holds {len(tokens)} tokens, a window {length}: give more, or shorten it")
        self.tokens, self.length, self.batch_size = tokens, length, batch_size
        self.seed, self.device = seed, device

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return batch `step` on the device."""
        generator = torch.Generator().manual_seed(stream(self.seed, "windows", step))
        starts = torch.randint(len(self.tokens) - self.length + 1, (self.batch_size, 1), generator=generator)
        y = send(self.tokens[starts + torch.arange(self.length)], self.device)
        return y, y


def rows(tokens: Tensor, length: int) -> Tensor:
    """Cut tokens (N,) into windows that don't overlap: (N // length, length)."""
    return tokens[: len(tokens) // length * length].view(-1, length)
