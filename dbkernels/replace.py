"""replace: put the ops in place of a model's own norms, in the instance at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dbkernels.nn import AdaLayerNorm, AdaRMSNorm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# One rounding fewer than the module replaced makes one unit of difference, and some compute float64 in float32; a norm
# of another kind differs by far more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Replacement:
    """One module that `replace` put in. name: where in the model; was, now: classes; op: what it runs on."""

    name: str
    was: str
    now: str
    op: str

    def __str__(self) -> str:
        return f"{self.name}: {self.was} -> {self.now} ({self.op})"


def replace(model: nn.Module, ops: Iterable[str] = ("ada_layer_norm", "ada_rms_norm")) -> list[Replacement]:
    """Swap the matching modules of `model` for ours, in place; parameters stay the same objects under the same names.

    "ada_layer_norm" takes nn.LayerNorm over one dimension; "ada_rms_norm" takes nn.RMSNorm over one dimension and every
    class named ...RMSNorm whose only parameter is `weight` (as in transformers). Each swap is first tried on random
    input: a module that computes something else (say, with 1 + weight) stays, as do modules with hooks.

    Args:
        model: any module; ops: which ops to put in.

    Returns:
        What was changed, in the model's order.

    Raises:
        TypeError: model isn't an nn.Module. ValueError: an op is unknown or nothing matched it; the model is then
        unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    names = [ops] if isinstance(ops, str) else list(ops)
    unknown = [name for name in names if name not in _RULES]
    if unknown or not names:
        raise ValueError(f"ops must name some of {', '.join(_RULES)}, got {names}")
    found = {name: _candidates(model, _RULES[name]) for name in names}
    missing = [name for name, candidates in found.items() if not candidates]
    if missing:
        seen = sorted({type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()})
        raise ValueError(
            f"nothing in the model matches {', '.join(missing)}: its norms are {', '.join(seen) or 'none'}; "
            "leave the op out, or remove hooks from the norms first"
        )
    return [_swap(model, path, ours, op) for op, candidates in found.items() for path, ours in candidates.items()]


def _candidates(model: nn.Module, build: Callable[[nn.Module], nn.Module | None]) -> dict[str, nn.Module]:
    """Ours for every place in the model where it computes the same; a module in two places stays one module."""
    made: dict[nn.Module, nn.Module | None] = {}
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module not in made:
            made[module] = _proved(module, build(module))
        ours = made[module]
        if path and ours is not None:
            places[path] = ours
    return places


def _proved(module: nn.Module, ours: nn.Module | None) -> nn.Module | None:
    """`ours` if it may stand for `module`: no hooks to lose, and the same output on random input."""
    if ours is None or any(getattr(module, hooks) for hooks in _HOOKS):
        return None
    parameter = next(module.parameters(), torch.empty(0))
    if parameter.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, int(ours.dim), generator=generator) + 1).to(parameter)  # type: ignore[arg-type]
    with torch.no_grad():
        theirs, mine = module(x), ours(x)
    tolerance = _TOLERANCE[x.dtype] * (1 + theirs.double().abs())
    return ours if bool(((mine.double() - theirs.double()).abs() <= tolerance).all()) else None


def _swap(model: nn.Module, path: str, ours: nn.Module, op: str) -> Replacement:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    was = type(getattr(owner, name)).__name__
    ours.train(getattr(owner, name).training)
    setattr(owner, name, ours)
    return Replacement(path, was, type(ours).__name__, op)


def _layer_norm(module: nn.Module) -> nn.Module | None:
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
        return None
    ours = AdaLayerNorm(module.normalized_shape[0], eps=module.eps, device="meta")
    ours.weight, ours.bias = module.weight, module.bias
    return ours


def _rms_norm(module: nn.Module) -> nn.Module | None:
    if type(module) is nn.RMSNorm:
        if len(module.normalized_shape) != 1:
            return None
        weight, dim = module.weight, module.normalized_shape[0]
        eps = module.eps
    else:
        own = dict(module.named_parameters())
        if not type(module).__name__.endswith("RMSNorm") or list(own) != ["weight"] or own["weight"].dim() != 1:
            return None
        weight, dim = module.weight, len(own["weight"])
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float | None):
        return None
    if eps is None:  # nn.RMSNorm's default: the smallest step of the dtype it computes in
        wide = weight is not None and weight.dtype == torch.float64
        eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    ours = AdaRMSNorm(dim, eps=eps, device="meta")
    ours.weight = weight
    return ours


_RULES: dict[str, Callable[[nn.Module], nn.Module | None]] = {
    "ada_layer_norm": _layer_norm,
    "ada_rms_norm": _rms_norm,
}
