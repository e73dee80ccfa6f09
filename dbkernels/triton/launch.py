"""Launch a Triton kernel that was prepared once per kind of input.

`kernel[grid](...)` binds, types and hashes every argument in each call: for thirty arguments that is more host time
than eager PyTorch takes for three ops. The result depends on shapes, strides and dtypes alone, so an op computes it
once per kind of input and keeps a `Launch`; from then on a call passes its pointers to the compiled kernel.

    launches = Kinds()

    def forward(x, scale):
        kind = x.dtype, x.shape, x.stride(), x.get_device(), scale.dtype, scale.stride()
        launch = launches.get(kind) or launches.keep(kind, prepare(x, scale))
        out = torch.empty_like(x)
        launch(x, scale, out)
        return out
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

MOST_KINDS = 4096  # shapes that change in every step must not fill the memory
ALIGNMENT = 16  # bytes: Triton compiles another kernel where a pointer isn't a multiple of it


class Kinds(dict[Hashable, Any]):
    """Prepared objects by kind of input; cleared when there are too many."""

    def keep(self, kind: Hashable, prepared: Any) -> Any:
        """Store and return the object prepared for a kind of input."""
        if len(self) >= MOST_KINDS:
            self.clear()
        self[kind] = prepared
        return prepared


class Launch:
    """A kernel with all arguments but its tensors fixed.

    The kernel's parameters must be, in this order: pointers; numbers that vary from call to call, if any (floats, or
    integers in `do_not_specialize` that lie in int32); other numbers; constexprs.

    Args:
        kernel: a `triton.jit` function.
        grid: programs, up to three numbers.
        device: index of the CUDA device; tensors lie there.
        numbers: the kernel's other numbers, in order.
        constants: the constexprs by name, and num_warps and num_stages.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], device: int, numbers: tuple[Any, ...] = (), **constants: Any
    ):
        self.kernel, self.grid, self.device = kernel, (*grid, 1, 1)[:3], device
        self.numbers, self.constants = numbers, constants
        names = [name for name in getattr(kernel, "arg_names", ()) if name in constants]
        self.tail = (*numbers, *(constants[name] for name in names))
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor, varying: tuple[float, ...] = ()) -> None:
        """Launch on the current stream of the tensors' device."""
        if self.device >= 0 and driver.active.get_current_device() != self.device:
            with torch.cuda.device(self.device):
                return self._launch(tensors, varying)
        return self._launch(tensors, varying)

    def _launch(self, tensors: tuple[Tensor, ...], varying: tuple[float, ...]) -> None:
        pointers = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        compiled = self.compiled
        aligned = not bits % ALIGNMENT
        if compiled is None or not aligned or knobs.runtime.launch_enter_hook.calls:
            launched = self.kernel[self.grid](*tensors, *varying, *self.numbers, **self.constants)
            if aligned:
                self.compiled = launched  # None in the interpreter, which compiles nothing
            return
        compiled.run(
            *self.grid, driver.active.get_current_stream(self.device), compiled.function, compiled.packed_metadata,
            None, None, None, *pointers, *varying, *self.tail,
        )  # fmt: skip
