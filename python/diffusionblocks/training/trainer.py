"""Block-wise training: one step is noise, one block's loss, that block's optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks import DiffusionBlocks
from ..denoiser import BlockLoss
from ..noise.information import InformationMeter
from ..noise.rng import stream
from ..offload.memory import Usage, allocated, reset_peak
from ..offload.offloader import Offloader
from ..offload.uninterrupted import uninterrupted
from ..offloadable import check_free
from ..targets.devices import send_batch
from . import state
from .batches import endless, pair
from .branch import branch
from .capture import Capture
from .config import TrainerConfig, check_complete
from .devices import pick_device
from .finite import FiniteWatch
from .log import loggers, row
from .mesh import open_mesh
from .optimizer import MakeOptimizer, adamw_of, optimizer_of
from .precision import autocast, seeded, stored
from .progress import Progress
from .schedule import adaptive_density, learning_rate, own_blocks, turn, warn_untrained
from .settings import settings_from, typed
from .step import Batch, StepOutput, Work, check_trained, pass_over


class Trainer:
    """Trains a model block by block: whose turn it is, noise, loss, clipping, optimizer, averages, offloading.

    Args:
        model: From `from_layers` or `convert`. The trainer places its blocks from now on.
        config: Settings; `settings` override its fields.
        optimizer: Makes a torch optimizer from a part's parameters, e.g. `lambda params: torch.optim.SGD(params, 0.1)`;
            BlockAdamW by default. Its learning rates are scaled by the warm-up and the cosine.
        callbacks: Objects with any of on_block_start(trainer, block), on_step_end(trainer, output),
            on_log(trainer, row), on_save(trainer, folder).
        settings: TrainerConfig's fields: lr, steps, warmup, clip, ema, visit, accumulate, precision, offload, ...

    Raises: ValueError or TypeError on a bad setting.

    Examples:
        >>> import torch, diffusionblocks as db
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()) for _ in range(4)]
        >>> model = db.from_layers(layers, stem=torch.nn.Linear(8, 16), head=torch.nn.Linear(16, 3),
        ...                        target=db.LabelTarget(num_classes=3, dim=16), blocks=2)
        >>> trainer = db.Trainer(model, lr=1e-2, offload="cpu", device="cpu", seed=0)
        >>> output = trainer.step(torch.randn(32, 8), torch.randint(3, (32,)))
        >>> output.loss.isfinite().item(), trainer.steps_done
        (True, 1)
    """

    def __init__(
        self,
        model: DiffusionBlocks,
        config: TrainerConfig | None = None,
        *,
        optimizer: MakeOptimizer | None = None,
        callbacks: Sequence[Any] = (),
        **settings: Any,
    ):
        self.config = settings_from(TrainerConfig, config, settings, "optimizer", "callbacks")
        self.mesh, self.device = open_mesh(self.config.mesh, pick_device(self.config.device))
        check_complete(self.config, self.device, optimizer, callbacks, settings)
        check_free(model)
        self.model, self.callbacks = model, [*callbacks, *(loggers(self.config) if self.mesh.is_first else [])]
        self.steps_done, self.batches_done = 0, 0
        self.own = own_blocks(model, self.config, self.mesh)
        self.own_parts = {"shared", *(f"block_{b}" for b in self.own)}
        with stored(model, self.config.precision) as narrowed:
            modules = {part: module for part, module in model.parts().items() if part in self.own_parts}
            self.optimizers = {
                part: made
                for part, module in modules.items()
                if (made := optimizer_of(module, optimizer or adamw_of(self.config, part), self.config.ema)) is not None
            }
        self.peaks = {o: [g["lr"] for g in o.param_groups] for o in self.optimizers.values()}
        self.offloader = Offloader(
            model,
            self.optimizers,
            device=self.device,
            offload=self.config.offload_from(self.device),
            folder=self.mesh.own_folder(self.config.folder),
            slots=self.config.slots,
            pin=self.config.pin,
        )
        self.mesh.check_weights(self.offloader, self.own_parts)
        for part in self.offloader.parts.values():
            part.wide = narrowed
        density = adaptive_density(model, self.config)
        self.meter = InformationMeter(density, device=self.device) if density else None
        self.changed = set(self.own_parts)  # since `saved`: the last checkpoint's folder and files
        self.saved: tuple[Path, Any] = Path(), None
        self.watch = FiniteWatch(self.device, model.target.level)
        self.loader: Any = None  # of the last fit
        self.positions: dict[str, Any] = {}  # a loader's state_dict, from a checkpoint
        self._losses: list[BlockLoss] = []
        for block in model.blocks if self.config.compile else ():
            block.compile()
        warn_untrained(self.own, len(model.blocks), self.config, self.config.total_steps)
        self._run = Capture(self).run
        reset_peak(self.device)

    @property
    def block(self) -> int:
        """The block whose turn it is: every block once per round of visits, in an order drawn for the round."""
        return self._block_at(self.steps_done)

    def _block_at(self, step: int) -> int:
        if step < self.config.trunk_steps:
            return 0
        return turn(step // self.config.visit, len(self.model.blocks), seed=self.config.seed)

    @uninterrupted()
    def step(self, x: Tensor, y: Tensor) -> StepOutput:
        """Train the block whose turn it is on one batch.

        With accumulate > 1 weights move at every accumulate-th call. Nothing is read from the device. A block that is
        trained elsewhere (`train_blocks`) takes its batches without work, and its loss is NaN.

        Args:
            x: Conditioning, (B, ...). y: targets, (B, ...). From any device.

        Raises: ValueError if the batch doesn't fit the model; RuntimeError within averages() or after release().
        """
        self.offloader.check_in_charge("step")
        if self.block not in self.own:
            return pass_over(self)
        if not self.model.training:
            self.model.train()  # sampling came between two batches
        if self.batches_done % self.config.accumulate == 0:
            self._begin()
        x, y = send_batch(x, y, self.device, self.model.target.check)
        block, sigma = self.choose(y)
        self.model.activate(block)
        with autocast(self.device, self.config.precision):
            self.model.check(block, x, y)
        key = stream(self.config.seed, "layers", self.batches_done, *self.mesh.draws)
        with self.offloader.use.step(), seeded(key, self.device):
            work = self._run(block, Batch(x, y, sigma), self._losses, counted=self._logs(self.steps_done))
        self.batches_done += 1
        if work.norm is not None:
            self._finish(block, work)
        output = StepOutput(block, work.loss.per_sample.mean(), work.norm)
        if work.norm is not None:
            self.call("on_step_end", output)
        return output

    def choose(self, y: Tensor) -> tuple[int, Tensor]:
        """Return the block to train on a batch, and its noise levels: before blocks branch, of all noise."""
        block, shape = self.block, self.model.target.level_shape(y)
        drawn = None if self.steps_done < self.config.trunk_steps else block
        sigma = self.model.draw_sigma(drawn, shape, seed=self.config.seed, step=self.batches_done, device=self.device)
        return block, sigma

    def _begin(self) -> None:
        """Prepare a step: branch, cut the noise anew at the start of a round, bring the block."""
        config, step = self.config, self.steps_done
        if step == config.trunk_steps > 0:
            self.changed |= branch(self.offloader)
        if self.meter and step % (config.visit * len(self.model.blocks)) == 0:
            self.check()
            self.model.repartition(self.meter.density())
        if step % config.visit == 0 or self.offloader.active is None:
            self.model.activate(self.block)
            check_trained(self, self.block)
            self.call("on_block_start", self.block)
            following = (step // config.visit + 1) * config.visit
            while self._block_at(following) not in self.own:
                following += config.visit
            if config.total_steps is None or following < config.total_steps:
                self.offloader.prefetch(self._block_at(following))
        self._losses.clear()
        for optimizer in self.active_optimizers(self.block):
            optimizer.zero_grad(set_to_none=True)  # what a step that failed left over

    def active_optimizers(self, block: int) -> list[torch.optim.Optimizer]:
        """Return the optimizers that a step of a block uses."""
        return [o for part in ("shared", f"block_{block}") if (o := self.optimizers.get(part)) is not None]

    def set_rates(self, block: int) -> list[float]:
        """Give the groups of a step's optimizers their learning rates, and return them in order."""
        rates = []
        for optimizer in self.active_optimizers(block):
            for group, peak in zip(optimizer.param_groups, self.peaks[optimizer], strict=True):
                group["lr"] = self.learning_rate_of(self.steps_done, peak)
                rates.append(group["lr"])
        return rates

    def _finish(self, block: int, work: Work) -> None:
        """Count an update, and log it if it is its turn."""
        self.changed |= {"shared", f"block_{block}"}
        self.steps_done += 1
        if self._logs(self.steps_done - 1):
            self.check()
            if work.usage and work.norm is not None:
                self.call("on_log", row(self, block, self._losses, work.norm, work.usage))

    def learning_rate_of(self, step: int, peak: float) -> float:
        """Return the learning rate of a step, on the way to and from `peak`."""
        return learning_rate(step, steps=self.config.total_steps, peak=peak, warmup=self.config.warmup_steps)

    def fit(
        self,
        loader: Iterable[Any],
        *,
        steps: int | None = None,
        batch: Callable[[Any], Any] = tuple,
        progress: bool = True,
    ) -> None:
        """Train until `steps` steps are done in all, from the first step on.

        Args:
            loader: Batches (x, y), iterated again and again. If it has state_dict and load_state_dict, its position is
                part of a checkpoint.
            steps: Steps in all; the config's by default.
            batch: Makes (x, y) of what the loader gives, e.g. `lambda d: (d["image"], d["label"])`.
            progress: Show a bar (by rich, if it is installed and this is a terminal), else a line now and then.

        Raises:
            ValueError: No number of steps, or one that is done already, or an empty loader.
            TypeError: A loader that can't be iterated, a batch that is no function, or one that isn't (x, y).
            NonFiniteLoss: Naming block, step and noise levels.
        """
        if (end := typed("steps", int | None, self.config.total_steps if steps is None else steps)) is None:
            raise ValueError("fit needs steps, here or in the Trainer's settings")
        if not callable(batch):
            raise TypeError(f"batch must be a function that makes (x, y) of a batch, got {type(batch).__name__}")
        if end < self.steps_done:
            raise ValueError(f"steps={end} counts from the first step on, and {self.steps_done} are done: give more")
        if end != self.config.total_steps:
            warn_untrained(self.own, len(self.model.blocks), self.config, end)
        self.loader = loader
        if "loader" in self.positions:
            loader.load_state_dict(self.positions.pop("loader"))  # type: ignore[attr-defined]
        batches = endless(loader)
        with Progress(end) if progress else contextlib.nullcontext() as bar:
            self.callbacks += [bar] if bar else []
            try:
                while self.steps_done < end:
                    data = next(batches)
                    if self.block in self.own:
                        self.step(*pair(batch, data))
                    else:
                        pass_over(self)
            finally:
                self.callbacks = [c for c in self.callbacks if c is not bar]
        self.check()

    def save(self, folder: str | Path, *, extra: dict[str, Any] | None = None) -> None:
        """Write a checkpoint: the parts that changed since the last save there, one at a time, then its manifest.

        A process killed at any instant leaves the old checkpoint or the new one. extra: JSON values of one's own.
        Raises: NonFiniteLoss, before anything is written; RuntimeError between the batches of one step or within
            averages(); CheckpointError or OSError if the folder can't be used.
        """
        self.check()
        state.save(self, Path(folder).resolve(), extra or {})
        self.call("on_save", Path(folder))

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Go on from a checkpoint, bit for bit as if training had never stopped; returns save's `extra`.

        Raises: CheckpointError if it is damaged, or of another model or other settings; RuntimeError within averages().
        """
        return state.load(self, Path(folder).resolve())

    def averages(self) -> contextlib.AbstractContextManager[None]:
        """Return a context within which the model's weights are their moving averages."""
        return self.offloader.averages()

    def memory(self) -> Usage:
        """Return bytes on the device by category, and the allocator's peaks, allocated and reserved."""
        peak, reserved = allocated(self.device)
        return dataclasses.replace(self.offloader.usage(), allocated=peak, reserved=reserved)

    def check(self) -> None:
        """Raise NonFiniteLoss if any step so far met a loss or gradient that isn't finite. Waits for the device."""
        self.watch.check()

    def _logs(self, step: int) -> bool:
        return step % self.config.log_every == self.config.log_every - 1 or step + 1 == self.config.total_steps

    def call(self, name: str, *arguments: Any) -> None:
        """Call a method of all callbacks that have it."""
        for callback in self.callbacks:
            if hasattr(callback, name):
                getattr(callback, name)(self, *arguments)
