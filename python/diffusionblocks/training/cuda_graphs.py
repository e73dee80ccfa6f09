"""CUDA graphs of work that is recorded once and repeated, and of what keeps work from being recorded."""

from __future__ import annotations

import contextlib
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Graphs(Protocol):
    """Records a device's work and repeats it."""

    def watch(self) -> contextlib.AbstractContextManager[list[str]]:
        """Return a context that runs work as ever, and lists why it couldn't be recorded."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record the device's part of `work` without doing it. Returns a function that does it, and work's result.

        Raises: what `work` raises; RuntimeError if the host must wait for the device.
        """
        ...


def graphs_of(device: torch.device) -> Graphs | None:
    """Return the graphs of a device, if it has any."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """Graphs on a GPU. They share one memory pool, since none runs beside another."""

    def __init__(self, device: torch.device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[str]]:
        """List this thread's waits for the device and its draws from the host's generators."""
        found: list[str] = []
        thread, mode = threading.get_ident(), torch.cuda.get_sync_debug_mode()
        drawn = torch.default_generator.get_state(), random.getstate()

        def note(message: Warning | str, *_: Any, **__: Any) -> None:
            if "synchronizing" in str(message) and threading.get_ident() == thread:
                found.append("it reads values from the device")

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if not torch.equal(drawn[0], torch.default_generator.get_state()) or drawn[1] != random.getstate():
            found.append("it draws random numbers on the host")

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record into the shared pool, on a stream of its own; other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what the same work took outside of the pool
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        torch.cuda.current_stream(self.device).wait_stream(self.stream)  # where the generator's tensors were set
        return graph.replay, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed: where CUDA ended it, torch's allocator and generator still wait for its end."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        graph.reset()
        with contextlib.suppress(RuntimeError):  # a capture that ends well sets the generator free
            another = torch.cuda.CUDAGraph()
            another.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            torch.zeros((), device=self.device)
            another.capture_end()
