"""Flat buffers: on the host aligned to pages, page-locked where a GPU copies from and to them; on the device."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor


def host_buffer(nbytes: int, *, pin: bool = False) -> Tensor:
    """Return a zeroed uint8 buffer in host memory that begins at a page.

    Its pages are taken from the system when they are first written and go back when it is freed. torch's own pinned
    memory is not used: its allocator rounds up to powers of two and keeps what was freed.

    Raises: RuntimeError if the host refuses to lock so much memory.
    """
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]
    if pin and nbytes:
        _lock(buffer, memory)
    return buffer


def _lock(buffer: Tensor, memory: mmap.mmap) -> None:
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    error = runtime.cudaHostRegister(address, buffer.numel(), 0)
    if int(error) != 0:
        raise RuntimeError(
            f"the host refuses to page-lock {buffer.numel()} bytes ({error}); raise its limit (ulimit -l), or set "
            "pin=False, which makes moves slower"
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, address)


def device_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Return a uint8 buffer on a device, on the host one that begins at a page."""
    return host_buffer(nbytes) if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, device=device)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps large pieces once it has seen some, several blocks' worth."""
    with contextlib.suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)
