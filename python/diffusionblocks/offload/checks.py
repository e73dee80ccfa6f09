"""What can't move: refused by name before anything is moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checkpoint.layout import DTYPES


def check_movable(part: str, module: nn.Module) -> None:
    """Raise ValueError if a part holds a tensor that can't lie in flat memory, or a view that would stay behind."""
    own = dict([*module.named_parameters(), *module.named_buffers()])
    for name, t in own.items():
        if is_lazy(t):
            raise ValueError(f"{part}'s {name} has no shape yet: run its lazy module on an example first")
        if t.layout != torch.strided or t.is_quantized or t.dtype not in DTYPES:
            raise ValueError(
                f"{part}'s {name} is {t.layout}, {t.dtype}, and blocks move as dense tensors of plain dtypes: make it "
                "one, or keep it as an attribute that is no buffer"
            )
    ids = {id(t): name for name, t in own.items()}
    for path, owner in module.named_modules():
        for name, value in vars(owner).items():
            if isinstance(value, Tensor) and (base := ids.get(id(value._base))):
                raise ValueError(
                    f"{part}'s {path}.{name} is a view of {base}, and would keep its old values when blocks move: "
                    "make the view in forward"
                )
