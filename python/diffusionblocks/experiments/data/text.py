"""Text as tokens: the characters of a file, a folder, a data set of the hub, or the standard library's English.

Nothing here has state: which windows make up a batch is a function of (seed, step).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...noise.rng import stream
from ...targets.devices import send

UNKNOWN = "\ufffd"
EMBEDDED = "topics"
HELD_OUT = 0.05  # of the characters, for validation and for testing each


@dataclass(frozen=True)
class TextData:
    """Tokens (N,) int64 of each split; token i stands for alphabet[i], the last one for any other character, as do
    those that the text has no character for."""

    train: Tensor
    val: Tensor
    test: Tensor
    alphabet: str

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (N,)."""
        return "".join(self.alphabet[i] for i in tokens.tolist())

    def check_windows(self, length: int, least: int) -> None:
        """Raise ValueError unless every split has so many windows."""
        shortest = min(len(self.train), len(self.val), len(self.test))
        if shortest < least * length:
            raise ValueError(
                f"a split holds {shortest} characters, less than {least} windows of length={length}: give more text, "
                "or shorten the windows"
            )

    def fingerprint(self) -> str:
        """SHA-256 of what is trained on and of what its tokens stand for."""
        return hashlib.sha256(self.train.numpy().tobytes() + self.alphabet.encode()).hexdigest()


def encode(text: str, alphabet: str) -> Tensor:
    """Tokens (N,) of a text."""
    place = {symbol: i for i, symbol in enumerate(alphabet)}
    return torch.tensor([place.get(symbol, len(alphabet) - 1) for symbol in text], dtype=torch.int64)


def load(source: str, *, symbols: int) -> TextData:
    """Split a text: documents in an order of their own, the last twentieths of the characters held out.

    source: "topics", Python's own help in English (465 kB, always there); a text file or a folder of .txt files; or
    "hub:NAME", the "text" column of a data set of the Hugging Face hub or of a local copy.
    symbols: size of the alphabet: the most frequent characters of the training split, and one for all others.
    Raises: FileNotFoundError if there is no such file. ValueError if it isn't UTF-8 text, or too short.
    """
    documents = read(source)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(stream(0, "documents")))
    text = "\n\n".join(documents[i] for i in order)
    held = int(len(text) * HELD_OUT)
    if held < 1:
        raise ValueError(f"{source} holds {len(text)} characters: too few to hold any out")
    train, val, test = text[: -2 * held], text[-2 * held : -held], text[-held:]
    frequent = [symbol for symbol, _ in Counter(train).most_common(symbols - 1)]
    alphabet = "".join(sorted(frequent)).ljust(symbols, UNKNOWN)
    return TextData(encode(train, alphabet), encode(val, alphabet), encode(test, alphabet), alphabet)


def read(source: str) -> list[str]:
    """The documents of a source, in an order that doesn't change."""
    if source == EMBEDDED:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if source.startswith("hub:"):
        from .hub import read_text

        return read_text(source.removeprefix("hub:"))
    path = Path(source).expanduser()
    files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path} is no text file, and no folder with any .txt file")
    return [_text(file) for file in files]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error


class Windows:
    """Training batches of a text by step number: (x, y), both the tokens (batch_size, length) of random windows.

    Raises: ValueError if the text is shorter than a window.
    """

    def __init__(self, tokens: Tensor, length: int, batch_size: int, *, seed: int, device: torch.device | str):
        if len(tokens) < length:
            raise ValueError(f"the text holds {len(tokens)} characters, a window {length}: give more, or shorten it")
        self.tokens, self.length, self.batch_size = tokens, length, batch_size
        self.seed, self.device = seed, device

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch number `step`."""
        generator = torch.Generator().manual_seed(stream(self.seed, "windows", step))
        starts = torch.randint(len(self.tokens) - self.length + 1, (self.batch_size, 1), generator=generator)
        y = send(self.tokens[starts + torch.arange(self.length)], self.device)
        return y, y


def rows(tokens: Tensor, length: int) -> Tensor:
    """All of a split in windows that don't overlap: (N // length, length)."""
    return tokens[: len(tokens) // length * length].view(-1, length)
