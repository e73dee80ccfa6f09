"""Whether a network is what its description builds, module by module: files give back nothing else."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..offloadable import plain_name

CALLED = ("__call__", "forward", "forward_features", "forward_head", "_pos_embed", "pool")  # of whole networks
# attributes that change nothing of what blocks compute
PASSING = ("training", "gradient_checkpointing", "name_or_path", "vocab_size", "padding_idx", "loss_type")
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Weightless(TorchFunctionMode):
    """Tensors that torch.empty makes, as large weights are, take no memory; buffers have their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs["device"] = "meta"
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):  # a millisecond each on the meta device
            weight = args[0] if args else kwargs.get("tensor")
            if isinstance(weight, Tensor) and weight.is_meta:
                return weight
        return func(*args, **kwargs)


def weightless(
    build: Callable[[dict[str, Any]], nn.Module], described: dict[str, Any], *, else_whole: bool = True
) -> nn.Module:
    """Return the network that `build` makes, its large weights on the meta device; no random number is drawn.

    Some adapters compute their first values from the weights: else_whole builds such a network with them.
    Raises: NotImplementedError or RuntimeError without else_whole.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with _Weightless():
                return build(described)
        except (NotImplementedError, RuntimeError):
            if not else_whole:
                raise
            return build(described)


def cast(network: nn.Module, dtype: str, buffers: dict[str, str]) -> None:
    """Cast what is floating: buffers to types of their own, where they have such."""
    for name, t in (*network.named_parameters(), *network.named_buffers()):
        if t.is_floating_point():
            t.data = t.data.to(getattr(torch, buffers.get(name, dtype)))


def dtypes(network: nn.Module) -> dict[str, Any]:
    """Return what `cast` takes: from_pretrained(dtype=) leaves buffers that no file holds in float32, `to` doesn't."""
    dtype = next(network.parameters()).dtype
    own = {name: t.dtype for name, t in network.named_buffers() if t.is_floating_point() and t.dtype != dtype}
    return {"dtype": _name(dtype), "buffers": {name: _name(kind) for name, kind in own.items()}}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_like(
    network: nn.Module, build: Callable[[dict[str, Any]], nn.Module], described: dict[str, Any]
) -> nn.Module:
    """Return the network that `build` makes, its large weights on the meta device.

    Raises: ValueError unless it computes with the network's weights what the network does.
    """
    kind = type(network).__name__
    try:
        rebuilt = weightless(build, described)
    except ValueError as error:
        raise ValueError(f"{kind} can't be built again, and so no file could give it back: {error}") from error
    found, wanted = ({plain_name(key): t.shape for key, t in net.state_dict().items()} for net in (network, rebuilt))
    if wrong := sorted({key for key, _ in found.items() ^ wanted.items()}):
        raise ValueError(
            f"{kind} isn't what its config describes, and so can't be built again; these differ: "
            f"{', '.join(wrong[:4])}. Merge adapters, unfuse projections, or set sizes where it is made"
        )
    shared = [" and ".join(sorted(names)) + " are tied, or aren't" for names in ties(network) ^ ties(rebuilt)]
    if others := [*differences(network, rebuilt), *_buffers(network, rebuilt), *shared]:
        raise ValueError(
            f"{kind} isn't what its config describes, and so files couldn't give it back: {'; '.join(others[:4])}. "
            "Choose by the config where it is made, or convert first and change the model's modules then"
        )
    return rebuilt


def differences(network: nn.Module, rebuilt: nn.Module, ignored: tuple[str, ...] = PASSING) -> Iterator[str]:
    """Yield in words which modules, methods and attributes differ, dropout aside."""
    own, built = _modules(network), _modules(rebuilt)
    for name, module in built.items():
        if name not in own:
            yield f"{name} is missing"
        elif not _is_one(own[name], module):
            yield f"{name or 'it'} is a {type(own[name]).__name__}, no {type(module).__name__}"
        else:
            at = f"{name}." if name else ""
            methods = [key for key in _patched(own[name], module) if name or key in CALLED]
            yield from (f"{at}{key} was replaced" for key in methods)
            for key, (value, wanted) in _attributes(own[name], module, ignored).items():
                if not _is_dropout(module, key) and not _is_equal(value, wanted):
                    yield f"{at}{key} is {value!r:.40}, not {wanted!r:.40}"
    for name in own.keys() - built.keys():
        if isinstance(own.get(name.rpartition(".")[0]), (nn.Sequential, nn.ModuleList)):  # they call all they have
            yield f"{name} was added"


def dropout(network: nn.Module, rebuilt: nn.Module) -> dict[str, float]:
    """Return the shares of dropout that were changed by hand, by their names."""
    built, changed = _modules(rebuilt), {}
    for name, module in _modules(network).items():
        for key, (value, wanted) in _attributes(module, built.get(name, module), PASSING).items():
            if _is_dropout(module, key) and isinstance(value, (int, float)) and value != wanted:
                changed[f"{name}.{key}"] = value
    return changed


def set_dropout(network: nn.Module, changed: dict[str, float]) -> None:
    """Set shares of dropout, by their names."""
    for name, value in changed.items():
        module, _, key = name.rpartition(".")
        setattr(network.get_submodule(module), key, value)


def check_hooks(network: nn.Module, model: nn.Module) -> None:
    """Raise ValueError if a hook of a network is on no module that its blocks call."""
    kept = {key for module in model.modules() if type(module) is not type(network) for key in _hooks(module)}
    for name, module in network.named_modules():
        if any(key not in kept for key in _hooks(module)):
            raise ValueError(
                f"{name or type(network).__name__} has a hook, which would be lost, for blocks don't call this "
                "module: put it on a layer, or remove it"
            )


def _hooks(module: nn.Module) -> Iterator[int]:
    """Yield the numbers of hooks, which copies share."""
    for kind in HOOKS:
        yield from getattr(module, kind)


def ties(network: nn.Module) -> set[frozenset[str]]:
    """Return the names that parameters have together."""
    names: dict[int, set[str]] = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(plain_name(name))
    return {frozenset(together) for together in names.values() if len(together) > 1}


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return modules by their names; of compiled ones those inside."""
    return {plain_name(name): module for name, module in network.named_modules(remove_duplicate=False)}


def _is_one(module: nn.Module, wanted: nn.Module) -> bool:
    if _drops(module) and _drops(wanted):
        return True
    return issubclass(type(module), type(wanted)) and type(module).forward is type(wanted).forward


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or "drop" in type(module).__name__.lower()


def _is_dropout(module: nn.Module, key: str) -> bool:
    return "drop" in key or (_drops(module) and key == "p")


def _patched(module: nn.Module, wanted: nn.Module) -> Iterator[str]:
    """Yield which methods a module itself has in place of its class's."""
    for key in vars(module).keys() - vars(wanted).keys():
        method = getattr(type(module), key, None)
        if isinstance(method, types.FunctionType) and (key == "forward" or not hasattr(nn.Module, key)):
            # accelerate moves inputs and weights around a forward
            inner = vars(module).get("_old_forward", vars(module).get("_original_forward"))
            if key != "forward" or getattr(inner, "__func__", None) is not method:
                yield key


def _attributes(module: nn.Module, wanted: nn.Module, ignored: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """Return the attributes that both have, without those that calls change."""
    own, built = vars(module), vars(wanted)
    names = (name for name in own if name in built and name not in ignored and not name.startswith("_"))
    return {name: (own[name], built[name]) for name in names if not name.endswith("_cached")}


def _is_equal(value: Any, wanted: Any) -> bool:
    """Return whether attributes are equal, or of kinds that aren't compared."""
    plain = (bool, int, float, str, tuple, type(None))
    if isinstance(value, plain) and isinstance(wanted, plain):
        return bool(value == wanted)
    if isinstance(value, FUNCTIONS) and isinstance(wanted, FUNCTIONS):
        return value is wanted or getattr(value, "__code__", value) is getattr(wanted, "__code__", None)
    if not callable(value) or not callable(wanted) or isinstance(value, (type, functools.partial, types.MethodType)):
        return True
    # e.g. diffusers' attention processors, of which the library's own compute the same
    libraries = [type(v).__module__.partition(".")[0] for v in (value, wanted)]
    return type(value) is type(wanted) or libraries[0] == libraries[1]


def _buffers(network: nn.Module, rebuilt: nn.Module) -> Iterator[str]:
    """Yield in words which buffers differ that are in no file, and are computed anew."""
    own = _modules(network)
    for at, name, wanted in tables(rebuilt):
        found = getattr(own[at], name, None)
        if isinstance(found, Tensor) and not is_close(found, wanted):
            yield f"the values of {at}.{name}"


def tables(network: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield buffers that are in no file, with their module's name and their own, but those that vary with lengths."""
    for at, module in _modules(network).items():
        varies = any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))
        for name in () if varies else module._non_persistent_buffers_set:
            if isinstance(t := getattr(module, name), Tensor):
                yield at, name, t


def is_close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if found.is_meta or wanted.is_meta:
        return True
    found, wanted = found.detach().cpu(), wanted.detach().to(found.dtype)
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    tolerance = max(1e-4, 2 * torch.finfo(found.dtype).eps)  # a GPU's functions differ from a CPU's
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance / 10)
