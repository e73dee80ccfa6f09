"""Character n-gram model: judges generated text without a network or a download."""

from __future__ import annotations

import math
from collections import Counter, defaultdict


class NGram:
    """Interpolated n-grams with Witten-Bell smoothing, down to a uniform distribution.

    Args:
        text: training text.
        order: characters of context.
        vocab_size: number of possible characters.

    Source: Witten and Bell 1991.
    """

    def __init__(self, text: str, *, order: int, vocab_size: int):
        self.order, self.vocab_size = order, vocab_size
        self.counts: list[dict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(order + 1)]
        for length, table in enumerate(self.counts):
            for i in range(length, len(text)):
                table[text[i - length : i]][text[i]] += 1
        self.totals = [{context: sum(count.values()) for context, count in table.items()} for table in self.counts]

    def probability(self, context: str, character: str) -> float:
        """Return p(character | context)."""
        p = 1 / self.vocab_size
        for length in range(min(self.order, len(context)) + 1):
            counts = self.counts[length].get(context[len(context) - length :])
            if counts is None:
                break
            total = self.totals[length][context[len(context) - length :]]
            p = (counts[character] + len(counts) * p) / (total + len(counts))
        return p

    def bits(self, text: str) -> float:
        """Return the mean bits per character of a text. Raises ValueError if it is empty."""
        if not text:
            raise ValueError("text is empty: there is nothing to judge")
        logs = (math.log2(self.probability(text[max(0, i - self.order) : i], c)) for i, c in enumerate(text))
        return -sum(logs) / len(text)
