"""replace: swap a model's own norms for the ops, in the given instance, where a trial shows that they are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from dbkernels._drop_in import DropInLayerNorm, DropInRMSNorm
from dbkernels._same_function import same_function

LARGEST_EPS = 0.1  # a float attribute up to this may be a norm's eps


@dataclass(frozen=True)
class Replacement:
    """A module that `replace` swapped. name: its path in the model; was, now: the classes; op: that it calls."""

    name: str
    was: str
    now: str
    op: str

    def __str__(self) -> str:
        return f"{self.name}: {self.was} -> {self.now} ({self.op})"


def replace(model: nn.Module, ops: Iterable[str] | None = None) -> list[Replacement]:
    """Swap the matching modules of `model` for ours, in place; parameters stay the same objects under the same names.

    "ada_layer_norm" takes nn.LayerNorm over one dimension; "ada_rms_norm" takes nn.RMSNorm over one dimension; both
    take subclasses, too, and the latter every class named ...RMSNorm (in any case) whose only state is a `weight` and
    whose forward takes one tensor. A swap requires a trial to pass: the same values, dtype and gradients for
    activations from 1e-6 to 1e3, inputs of one to four dimensions and every floating dtype that the module takes, in
    training and in evaluation. Modules that differ (1 + weight, eps outside the root, dropout), can't be tried, or
    have hooks, buffers or children stay as they are.

    Args:
        model: any module.
        ops: which ops to put in, each of which must match something; by default whichever match.

    Returns:
        The replacements, in the model's order.

    Raises:
        TypeError: model isn't an nn.Module.
        ValueError: an op is unknown, a named one matched nothing, or none did; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    names = list(_RULES) if ops is None else [ops] if isinstance(ops, str) else list(ops)
    unknown = [name for name in names if name not in _RULES]
    if unknown or not names:
        raise ValueError(f"ops must name some of {', '.join(_RULES)}, got {names}")
    proved = {name: _proved_places(model, _RULES[name]) for name in names}
    missing = [name for name, places in proved.items() if not places]
    if missing and (ops is not None or len(missing) == len(names)):
        seen = sorted({type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()})
        raise ValueError(
            f"nothing in the model matches {', '.join(missing)}: its norms are {', '.join(seen) or 'none'}; "
            f"{'' if ops is None else 'leave the op out, or '}remove hooks from the norms first"
        )
    return [_swap(model, path, ours, op) for op, places in proved.items() for path, ours in places.items()]


def _proved_places(model: nn.Module, candidates: Callable[[nn.Module], list[nn.Module]]) -> dict[str, nn.Module]:
    """Return the replacement by path where a trial passes; a module with two paths stays one module."""
    replacements: dict[nn.Module, nn.Module | None] = {}
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module not in replacements:
            replacements[module] = next((ours for ours in candidates(module) if same_function(module, ours)), None)
        ours = replacements[module]
        if path and ours is not None:
            places[path] = ours
    return places


def _swap(model: nn.Module, path: str, ours: nn.Module, op: str) -> Replacement:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    theirs = getattr(owner, name)
    if theirs is not ours:
        ours.train(theirs.training)
        for attribute, value in vars(theirs).items():  # code that reads norm.normalized_shape or norm.variance_epsilon
            if not hasattr(ours, attribute):
                setattr(ours, attribute, value)
    setattr(owner, name, ours)
    return Replacement(path, type(theirs).__name__, type(ours).__name__, op)


def _layer_norms(module: nn.Module) -> list[nn.Module]:
    if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
        return []
    return [DropInLayerNorm(module.normalized_shape[0], module.eps, module.weight, module.bias)]


def _rms_norms(module: nn.Module) -> list[nn.Module]:
    """Return candidates, one for each number that may be the module's eps: libraries name it differently."""
    if isinstance(module, nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            return []
        return [DropInRMSNorm(module.normalized_shape[0], module.eps, module.weight)]
    own = dict(module.named_parameters())
    if not type(module).__name__.lower().endswith("rmsnorm") or list(own) != ["weight"] or own["weight"].dim() != 1:
        return []
    numbers = dict.fromkeys(v for v in vars(module).values() if isinstance(v, float) and 0 < v <= LARGEST_EPS)
    return [DropInRMSNorm(len(own["weight"]), eps, own["weight"]) for eps in numbers]


_RULES: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "ada_layer_norm": _layer_norms,
    "ada_rms_norm": _rms_norms,
}
