"""What weights are in use for: a step, or an evaluation by their averages; never both, whatever threads ask for."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import torch


@torch._disable_dynamo  # the compiler warns of what it can't trace
def this_thread() -> int:
    """Return this thread's number."""
    return threading.get_ident()


class Use:
    """Who uses the weights now. Nobody waits for another thread: what can't be now is refused.

    Attributes:
        lock: Held while blocks change places or weights are exchanged, and while it is decided who may.
        averages: Evaluations under way, in any thread; the weights are averages from the first one's begin to the last
            one's end.
        threads: How many of them, and of calls that compute with a block, are of which thread.
        stepping: A step computes with the weights.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a state_dict may be asked for while another thread trains
        self.averages = 0
        self.threads: Counter[int] = Counter()
        self.stepping = False

    def check(self, what: str) -> None:
        """Raise RuntimeError if the weights are averages, or a step is under way."""
        if self.averages:
            raise RuntimeError(f"{what}: the weights are their averages now; leave averages() first")
        if self.stepping:
            raise RuntimeError(
                f"{what}: a step is under way, of another thread or around this call; do it between two steps"
            )

    def check_alone(self, what: str) -> None:
        """Raise RuntimeError if another thread evaluates: it may compute with what would move."""
        if any(count for thread, count in self.threads.items() if thread != this_thread()):
            raise RuntimeError(f"{what}: another thread evaluates, and the blocks wait elsewhere: one thread at a time")

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within it a step computes. Raises: RuntimeError as `check`."""
        with self.lock:
            self.check("step")
            self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    @contextlib.contextmanager
    def evaluating(self, bring: Callable[[], None]) -> Iterator[None]:
        """Within it a thread computes with the block that `bring` brings. Raises: RuntimeError as `check_alone`."""
        thread = this_thread()
        with self.lock:
            bring()
            self.threads[thread] += 1
        try:
            yield
        finally:
            with self.lock:
                self.threads[thread] -= 1

    @contextlib.contextmanager
    def averaged(self, exchange: Callable[[], None]) -> Iterator[None]:
        """Within it weights are averages, by `exchange` and back again. Raises: RuntimeError within a step."""
        thread = this_thread()  # a generator may be left in another one
        with self.lock:
            if not self.averages:
                self.check("averages")
                exchange()
            self.averages += 1
            self.threads[thread] += 1
        try:
            yield
        finally:
            with self.lock:
                if self.averages == 1:
                    exchange()
                self.averages -= 1
                self.threads[thread] -= 1
