"""AdamW and an exponential moving average of weights in one fused step, for blocks that come and go."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dbkernels

from ..noise.rng import stream
from .config import TrainerConfig

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

NEXT = "next_step"  # state: number of a parameter's next update, shared by all that were updated together


class BlockAdamW(torch.optim.Optimizer):
    """AdamW + EMA by one fused call per group and dtype, without host reads.

    A parameter without a gradient isn't touched, nor are its moments, its average or its count of updates. An update
    whose gradients' norm isn't finite changes nothing and doesn't count. State is float32, float64 of float64; moments
    may be bfloat16. Tensors with fewer than two dimensions (biases, norms) are not decayed. The average of a parameter
    is `state[p]["ema"]`; Offloader.averages() puts them in place of weights.

    Args:
        params: Parameters, (name, parameter) pairs or groups, as for any torch optimizer; of floating dtypes.
        lr, betas, eps, weight_decay: AdamW's.
        ema_decay: Decay of the moving average, shorter at first so that it forgets the start; 0 keeps none.
        masters: Keep a float32 copy of float16 and bfloat16 parameters and update that; False rounds bfloat16
            stochastically.
        moments: torch.float32 or torch.bfloat16, or the name: with bfloat16 a parameter's two moments take 4 bytes, not
            8, and are rounded stochastically (not those of float64).
        seed: Of stochastic rounding.

    Raises: ValueError on a setting out of range; TypeError on a parameter that isn't floating point.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ema_decay: float = 0.0,
        masters: bool = True,
        moments: str | torch.dtype = "float32",
        seed: int = 0,
    ):
        moments = str(moments).removeprefix("torch.")
        if moments not in ("float32", "bfloat16"):
            raise ValueError(f"moments must be float32 or bfloat16, got {moments}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be zero or positive, got {weight_decay}")
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be zero or positive, got {lr}")
        own = dict(
            ema_decay=ema_decay, masters=masters, moments=moments, seed=seed
        )  # in the groups, so that copies and state_dicts have them
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **own))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as to any torch optimizer. Raises: TypeError on a dtype that can't be trained."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}: only real floats are trained")
            if p.dtype == torch.float16 and not group["masters"]:
                raise TypeError("float16 parameters need masters=True: only bfloat16 is rounded stochastically")

    def params(self) -> list[Tensor]:
        """Return all parameters."""
        return [p for group in self.param_groups for p in group["params"]]

    def prepare(self) -> None:
        """Create all parameters' state now: its size is known before the first step, and results are the same bits.

        Weights must be in place: averages and masters begin as their copies.
        """
        for group in self.param_groups:
            self._begin([p for p in group["params"] if p not in self.state], group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        norm: Tensor | None = None,
        max_norm: float | None = None,
        rates: Sequence[Tensor] | None = None,
    ) -> Any:
        """Make one update from the parameters' gradients.

        Args:
            closure: Computes the loss anew, as for any torch optimizer.
            norm: The gradients' 2-norm, 0-dim, if it is of more than this optimizer's; taken here by default.
            max_norm: Scale gradients to a norm of at most this; None doesn't clip.
            rates: A learning rate per group, float64 on the device, in place of the groups' own numbers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [p for p in self.params() if p.grad is not None]
        if moving:
            gradients = gradients_of(moving)
            norm = dbkernels.total_norm(gradients) if norm is None else norm
            for group, lr in zip(self.param_groups, rates or [g["lr"] for g in self.param_groups], strict=True):
                for together in self._together(group):
                    self._update(together, group | {"lr": lr}, norm, max_norm)
        return loss

    def _together(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """Return a group's parameters that have gradients, by dtype and number of updates; new ones get their state."""
        self._begin([p for p in group["params"] if p.grad is not None and p not in self.state], group)
        alike: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for p in group["params"]:
            if p in self.state:
                alike.setdefault((id(self.state[p][NEXT]), p.dtype), []).append(p)
        moving = []
        for members in alike.values():
            moving.append([p for p in members if p.grad is not None])
            if 0 < len(moving[-1]) < len(members):  # from now on they have had more updates than the others
                number = self.state[members[0]][NEXT].clone()
                for p in moving[-1]:
                    self.state[p][NEXT] = number
        return [together for together in moving if together]

    @torch.no_grad()
    def _begin(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Create the state of parameters that have none; those of one dtype share the number of their next update."""
        numbers: dict[torch.dtype, Tensor] = {}
        for p in params:
            if p.dtype not in numbers:
                numbers[p.dtype] = torch.ones((), dtype=torch.int64, device=p.device)
            wide = _wide(p)
            moments = torch.bfloat16 if group["moments"] == "bfloat16" and wide == torch.float32 else wide
            state = self.state[p]
            state[NEXT] = numbers[p.dtype]
            state["exp_avg"] = torch.zeros_like(p, dtype=moments)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=moments)
            if group["ema_decay"]:
                state["ema"] = p.detach().to(wide, copy=True)
            if group["masters"] and p.element_size() == 2:
                state["master"] = p.detach().to(wide, copy=True)

    def _update(self, params: list[Tensor], group: dict[str, Any], norm: Tensor, max_norm: float | None) -> None:
        first = self.state[params[0]]

        def of(key: str) -> list[Tensor] | None:
            return [self.state[p][key] for p in params] if key in first else None

        number = first[NEXT]
        rounded = params[0].element_size() == 2 and not group["masters"]  # stochastically
        drawn = rounded or first["exp_avg"].dtype == torch.bfloat16
        dbkernels.adamw_ema_step(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            of("exp_avg") or [],
            of("exp_avg_sq") or [],
            of("ema"),
            step=number,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=[group["weight_decay"] if p.dim() > 1 else 0.0 for p in params],
            ema_decay=_warm(number, group["ema_decay"]) if group["ema_decay"] else None,
            norm=norm.to(_wide(params[0])),  # float64, where any gradient is
            max_norm=max_norm,
            masters=of("master"),
            stochastic_rounding=rounded,
            **({"seed": self._seed_of(params[0], group["seed"]), "offset": number} if drawn else {}),
        )

    def _seed_of(self, first: Tensor, seed: int) -> int:
        """Return the seed of the list that begins with this parameter: no two lists of a step draw the same bits."""
        place = next(i for i, p in enumerate(self.params()) if p is first)
        return (seed + place) % 2**64

    @property
    def counts(self) -> list[int]:
        """Updates that each parameter has had. Waits for the device."""
        values: dict[int, int] = {}
        for state in self.state.values():
            values.setdefault(id(state[NEXT]), int(state[NEXT]) - 1)
        return [values[id(self.state[p][NEXT])] if p in self.state else 0 for p in self.params()]

    def share_counts(self) -> None:
        """Let parameters that had the same updates share one counter again, after their state was loaded."""
        counts = iter(self.counts)
        for group in self.param_groups:
            shared: dict[tuple[int, torch.dtype], Tensor] = {}
            for p in group["params"]:
                count = next(counts)
                if p in self.state:
                    self.state[p][NEXT] = shared.setdefault((count, p.dtype), self.state[p][NEXT])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Load state as any torch optimizer does, but keep each tensor's own dtype: half parameters' state is wide."""
        super().load_state_dict(dict(state_dict))
        for p, index in zip(self.params(), (i for g in state_dict["param_groups"] for i in g["params"]), strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[p][key] = value.detach().to(p.device, copy=True)
        self.share_counts()


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _warm(number: Tensor, decay: float) -> Tensor:
    """Return the average's decay at update `number`: shorter at first, so that the average forgets the start."""
    n = number.double()
    return ((1 + n) / (10 + n)).clamp(max=decay)


def gradients_of(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of the parameters that have one; sparse ones are made dense in place."""
    gradients = []
    for p in params:
        if p.grad is not None:
            p.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
            gradients.append(p.grad)
    return gradients


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keep a moving average of weights beside any torch optimizer, in `state[p]["ema"]`, after each of its steps."""

    @torch.no_grad()
    def average(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = optimizer.state[p]
                updates = state["ema_updates"] = state.get("ema_updates", 0) + 1
                value = p.detach().to(_wide(p))
                if "ema" not in state:
                    state["ema"] = value.clone()
                else:
                    state["ema"].lerp_(value, 1 - min(decay, (1 + updates) / (10 + updates)))

    optimizer.register_step_post_hook(average)


def adamw_of(config: TrainerConfig, part: str = "shared") -> MakeOptimizer:
    """Return what makes the default optimizer of a part, which rounds by random bits of its own."""
    return partial(
        BlockAdamW, lr=config.lr, weight_decay=config.weight_decay, ema_decay=config.ema, moments=config.moments,
        seed=stream(config.seed, "rounding", part),
    )  # fmt: skip


def optimizer_of(module: nn.Module, make: MakeOptimizer, ema: float) -> torch.optim.Optimizer | None:
    """Return the optimizer of a part's trained parameters, which keeps their average; None if there are none."""
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        return None
    optimizer = make(params)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{type(optimizer).__name__} needs a closure in every step: a Trainer has none, take another")
    if ema and not isinstance(optimizer, BlockAdamW):
        keep_average(optimizer, ema)
    return optimizer


def clipped_step(
    optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float, rates: Sequence[Tensor] | None = None
) -> None:
    """Update by gradients whose joint norm is `norm`, scaled to at most `max_norm`, if that is positive.

    rates: As for BlockAdamW.step, which alone takes them.

    An update whose norm isn't finite changes nothing. Only BlockAdamW can hold it back on the device: for others the
    norm is read.
    """
    if isinstance(optimizer, BlockAdamW):
        optimizer.step(norm=norm, max_norm=max_norm or None, rates=rates)
    elif bool(norm.isfinite()):
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        optimizer.step()
