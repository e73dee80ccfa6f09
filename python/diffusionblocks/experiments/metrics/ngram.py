"""A character n-gram model: a judge of generated text that needs no network and no download."""

from __future__ import annotations

import math
from collections import Counter, defaultdict


class NGram:
    """Interpolated n-grams with Witten-Bell smoothing, down to equally likely symbols.

    text: what it learns from. order: characters of context. symbols: how many different characters there may be.
    Source: Witten and Bell 1991.
    """

    def __init__(self, text: str, *, order: int, symbols: int):
        self.order, self.symbols = order, symbols
        self.counts: list[dict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(order + 1)]
        for length, table in enumerate(self.counts):
            for i in range(length, len(text)):
                table[text[i - length : i]][text[i]] += 1
        self.totals = [{context: sum(seen.values()) for context, seen in table.items()} for table in self.counts]

    def probability(self, context: str, symbol: str) -> float:
        """Of `symbol` after `context`."""
        p = 1 / self.symbols
        for length in range(min(self.order, len(context)) + 1):
            seen = self.counts[length].get(context[len(context) - length :])
            if seen is None:
                break
            total = self.totals[length][context[len(context) - length :]]
            p = (seen[symbol] + len(seen) * p) / (total + len(seen))
        return p

    def bits(self, text: str) -> float:
        """Mean bits a character of a text. Raises: ValueError if it is empty."""
        if not text:
            raise ValueError("text is empty: there is nothing to judge")
        logs = (math.log2(self.probability(text[max(0, i - self.order) : i], symbol)) for i, symbol in enumerate(text))
        return -sum(logs) / len(text)
