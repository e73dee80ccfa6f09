"""Graphs for the CPU: a step is recorded op by op and repeated on the same memory, as a CUDA graph would repeat it."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# Ops whose result, or its shape, the host must wait for.
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
}  # fmt: skip
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
CHECKS = ("_address", "_cross_entropy_checks", "inject_noise_table")  # modules that read values of tensors on the CPU


def reads(op, args):
    """Return whether the host waits for an op."""
    by_mask = op is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1])
    return op in READS or by_mask


class Watch(TorchDispatchMode):
    """Lists what the host reads."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if reads(op, args):
            self.found.append(f"{op} reads values")
        return op(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records ops with the memory that they read and write. Python's numbers stay as they are.

    An op of dbkernels is recorded as one: on the CPU it may read a number that is in a tensor.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.own = {}  # storages that the recorded ops made, by address: kept, so that no other takes it
        self.before = {}  # others that they wrote to, as they were

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reads(op, args):
            raise RuntimeError(f"{op} reads values")
        written = [t for name, given in named(op, args, kwargs) if name.is_write for t in tensors(given)]
        for t in written:
            memory = t.untyped_storage()
            if memory.data_ptr() not in self.own and memory.data_ptr() not in self.before:
                self.before[memory.data_ptr()] = memory, memory.clone()
        args_, kwargs_ = (tree_map_only(Tensor, lambda t: t.detach(), a) for a in (args, kwargs))
        result = op(*args, **kwargs)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if not view:
            fresh = [] if written and op._schema.is_mutable and not made(op) else tensors(result)
            for t in fresh:
                self.own[t.untyped_storage().data_ptr()] = t.untyped_storage()
            if op not in EMPTY:
                self.calls.append((op, args_, kwargs_, [t.detach() for t in fresh]))
        return result

    def undo(self):
        """Leave memory as it was before the ops ran: a recording does nothing."""
        for memory, values in self.before.values():
            memory.copy_(values)

    @torch.no_grad()
    def replay(self):
        """Run the ops again, their results into the same memory."""
        for op, args, kwargs, results in self.calls:
            again = tensors(op(*args, **kwargs))
            for t, value in zip(
                results, again[: len(results)], strict=True
            ):  # an op in place returns what it was given
                t.copy_(value)


def made(op):
    """Return whether an op that writes to its arguments also makes results."""
    return any(r.alias_info is None for r in op._schema.returns)


def named(op, args, kwargs):
    """Yield an op's arguments that it has in its schema with an alias, and their values."""
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and (i < len(args) or argument.name in kwargs):
            yield argument.alias_info, args[i] if i < len(args) else kwargs[argument.name]


def tensors(values):
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


class RecordedGraphs:
    """Stands in for CudaGraphs. recordings, replays: how many there were; watching: whether `watch` sees anything."""

    def __init__(self, watching=True):
        self.recordings, self.replays, self.watching = 0, 0, watching

    @contextlib.contextmanager
    def watch(self):
        with unchecked(), Watch() as watch:
            yield watch.found if self.watching else []

    def record(self, work):
        recorder, generator = Recorder(), torch.default_generator.get_state()
        try:
            with unchecked(), recorder:
                result = work()
        finally:
            recorder.undo()
            torch.default_generator.set_state(generator)
        self.recordings += 1
        return lambda: self._replay(recorder), result

    def _replay(self, recorder):
        self.replays += 1
        with unchecked():
            recorder.replay()


@contextlib.contextmanager
def unchecked():
    """Let dbkernels leave numbers in tensors, as it does on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CHECKS:
            patch.setattr(importlib.import_module(f"dbkernels.{name}"), "readable", lambda tensor: False)
        yield
