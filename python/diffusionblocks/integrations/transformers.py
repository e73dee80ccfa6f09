"""transformers' Trainer, with its arguments, callbacks and checkpoints, training a model block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from ..blocks import DiffusionBlocks
from ..targets.devices import send_batch
from ..targets.labels import LabelTarget
from ..targets.tokens import TokenTarget
from ..training.config import TrainerConfig
from ..training.settings import settings_from
from ..training.trainer import Trainer
from .batches import IMPLIED, batch_of

CHECKPOINT = "blocks"  # folder of a checkpoint: what resuming the blocks takes
COLUMNS = ["pixel_values", "input_ids", "attention_mask", *IMPLIED, "labels", "label", "label_ids"]

REFUSED = {  # TrainingArguments that must be unset, and what to do instead
    "fp16": "bf16=True",
    "fp16_full_eval": "leave it out: weights are evaluated in their own type",
    "bf16_full_eval": "leave it out: weights are evaluated in their own type",
    "deepspeed": "offload='cpu' or 'disk' here, or diffusionblocks.Trainer(mesh=...) under torchrun",
    "fsdp": "offload='cpu' or 'disk' here, or diffusionblocks.Trainer(mesh=...) under torchrun",
    "parallelism_config": "diffusionblocks.Trainer(mesh=...) under torchrun",
    "gradient_checkpointing": "checkpoint_layers=True here",
    "activation_checkpointing": "checkpoint_layers=True here",
    "torch_compile": "compile=True here",
    "use_liger_kernel": "leave it out: the blocks have kernels of their own",
    "neftune_noise_alpha": "leave it out: the embeddings get noise already",
    "label_smoothing_factor": "leave it out: the target defines the loss",
    "auto_find_batch_size": "diffusionblocks.plan(model, batch) before training",
    "optim_args": "optimizer= here",
    "optim_target_modules": "optimizer= here",
    "load_best_model_at_end": "diffusionblocks.load(trainer.state.best_model_checkpoint) after training",
    "push_to_hub": "model.push_to_hub(repo_id) after training",
    "torch_empty_cache_steps": "leave it out: blocks change places in fixed buffers",
}
FIXED = {  # TrainingArguments that must keep their defaults, since BlockAdamW is the optimizer
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "adam_beta1": (0.9,), "adam_beta2": (0.999,), "adam_epsilon": (1e-8,),
}  # fmt: skip
GIVEN = {  # settings of diffusionblocks.Trainer, and the TrainingArguments that they come from
    "lr": "learning_rate", "steps": "max_steps or num_train_epochs", "warmup": "warmup_steps", "clip": "max_grad_norm",
    "weight_decay": "weight_decay", "accumulate": "gradient_accumulation_steps", "seed": "seed", "precision": "bf16",
    "device": "use_cpu", "log_every": "logging_steps", "log_folder": "report_to", "loggers": "report_to",
}  # fmt: skip


class DiffusionBlocksTrainer(transformers.Trainer):
    """transformers.Trainer whose steps are those of diffusionblocks.Trainer: one block at a time, offloaded or not.

    Learning rate schedule, data, callbacks, logging, evaluation and the cadence of checkpoints are transformers' own.
    The logged loss is the mean over the steps since the last row, "block" the one trained last; eval_loss is the mean
    over all blocks. A checkpoint also is a model's folder for `load`, with averaged weights.

    Args:
        model: From `convert` or `from_layers`.
        args: Arguments that blocks can't honour are refused by name.
        batch: Makes (x, y) of what the collator gives. By default x is pixel_values or input_ids and y the labels, of
            language models the tokens themselves.
        train_dataset, eval_dataset, data_collator, processing_class, compute_metrics, callbacks,
            preprocess_logits_for_metrics: As transformers.Trainer takes them.
        settings: Of diffusionblocks.Trainer, those that TrainingArguments don't have: offload, folder, visit, ema, ...

    Raises: ValueError or TypeError, naming the argument.
    """

    model: Any  # DiffusionBlocks, where transformers has a network of its own
    _signature_columns: Any

    def __init__(
        self,
        model: DiffusionBlocks,
        args: transformers.TrainingArguments,
        *,
        batch: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        preprocess_logits_for_metrics: Any = None,
        **settings: Any,
    ):
        _check(model, args, settings, compute_metrics)
        self.batch, self.settings = batch, settings
        self.blocks: _BlockTrainer | None = None
        self._evaluated = 0  # batches of this evaluation
        args = copy.copy(args)
        args.logging_nan_inf_filter = False  # it reads every loss from the device; NonFiniteLoss is raised anyway
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.accelerator.device_placement = False  # blocks and batches are placed by the blocks' trainer
        self.accelerator.prepare_model = lambda model, **options: model
        self.accelerator.clip_grad_norm_ = lambda *parameters, **options: self._norm

    def get_train_dataloader(self) -> Any:
        """Return transformers' loader. Raises: ValueError if an epoch would end within a step."""
        loader, accumulate = super().get_train_dataloader(), self.args.gradient_accumulation_steps
        count = len(loader) if has_length(loader) else 0
        if count % accumulate:
            raise ValueError(
                f"gradient_accumulation_steps={accumulate} doesn't divide the {count} batches of an epoch, whose last "
                "step would be of fewer: change it, the batch size or the number of samples"
            )
        return loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return an optimizer of nothing, whose learning rate the scheduler moves and the blocks' optimizers follow."""
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return transformers' scheduler, and make the trainer of the blocks, whose steps are known now."""
        scheduler, args = super().create_scheduler(num_training_steps, optimizer), self.args
        if self.blocks is not None:
            self.blocks.offloader.release()  # by the training before
        self.blocks = _BlockTrainer(
            self.model,
            lambda: scheduler.get_last_lr()[0] / args.learning_rate,
            **({} if "optimizer" in self.settings else {"lr": args.learning_rate}),
            steps=num_training_steps,
            weight_decay=args.weight_decay,
            clip=args.max_grad_norm,
            accumulate=args.gradient_accumulation_steps,
            precision="bfloat16" if args.bf16 else "float32",
            device=str(args.device),
            seed=args.seed,
            **self.settings,
        )
        return scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Train the block whose turn it is on a batch, and return its loss."""
        assert self.blocks is not None
        output = self.blocks.step(*self._pair(inputs))
        self._block, self._norm = output.block, output.grad_norm
        return output.loss / self.args.gradient_accumulation_steps

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the blocks' mean denoising loss, the answer at the end of the sampling trajectory, and y."""
        x, y = send_batch(*self._pair(inputs), self.model.device, self.model.target.check)
        with torch.no_grad(), self.model.averages():
            noise = {"seed": self.args.seed, "step": self._evaluated}
            losses = [self.model.loss(block, x, y, **noise).loss for block in range(len(self.model.blocks))]
            logits = None if prediction_loss_only else self.model(x)
        self._evaluated += 1
        return torch.stack(losses).mean(), logits, None if prediction_loss_only else y

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as transformers does, with the same noise every time."""
        self._evaluated = 0
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as transformers does, and which block was trained last."""
        super().log({**logs, "block": self._block} if "loss" in logs else logs, *args, **kwargs)

    def _pair(self, inputs: Any) -> tuple[Tensor, Tensor]:
        return batch_of(self.model, inputs) if self.batch is None else self.batch(inputs)

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Leave the model where it is."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset if self.batch else super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator if self.batch else super()._get_collator_with_removed_columns(data_collator, description)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.blocks is not None
        super()._save_optimizer_and_scheduler(output_dir)
        self.blocks.save(Path(output_dir, CHECKPOINT))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load nothing yet: the blocks' trainer, which loads them, isn't made yet."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            assert self.blocks is not None
            self.blocks.load(Path(checkpoint, CHECKPOINT))


class _BlockTrainer(Trainer):
    """Trainer whose learning rates are a share of their peaks that somebody else schedules."""

    def __init__(self, model: DiffusionBlocks, share: Callable[[], float], **settings: Any):
        super().__init__(model, **settings)
        self._share = share

    def learning_rate_of(self, step: int, peak: float) -> float:
        return peak * self._share()


def _check(model: Any, args: Any, settings: dict[str, Any], compute_metrics: Any) -> None:
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(f"model must be a DiffusionBlocks, from convert or from_layers, got {type(model).__name__}")
    for name, instead in REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(f"TrainingArguments({name}={getattr(args, name)!r}) can't be honoured: {instead}")
    for name, values in FIXED.items():
        if (value := getattr(args, name)) not in values:
            raise ValueError(
                f"TrainingArguments({name}={value!r}) can't be honoured: optimizer= here, e.g. lambda params: "
                "BlockAdamW(params, betas=(0.9, 0.95))"
            )
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(f"lr_scheduler_type={args.lr_scheduler_type!s} depends on losses of one network: take another")
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError("one process and one GPU: set CUDA_VISIBLE_DEVICES, or diffusionblocks.Trainer(mesh=...)")
    for name in settings.keys() & GIVEN.keys():
        raise ValueError(f"{name} comes from TrainingArguments: set {GIVEN[name]} there")
    for name in settings.keys() & {"mesh", "train_blocks"}:
        raise ValueError(f"{name} needs diffusionblocks.Trainer: transformers' loop would count steps of other blocks")
    if "optimizers" in settings:
        raise TypeError("optimizers: blocks have one each, of optimizer=, e.g. lambda p: torch.optim.SGD(p, lr=0.1)")
    known = {name: value for name, value in settings.items() if name != "optimizer"}
    settings_from(TrainerConfig, TrainerConfig(steps=1), known, "optimizer")
    if compute_metrics is not None and not isinstance(model.target, (LabelTarget, TokenTarget)):
        raise ValueError(f"compute_metrics is for labels and next tokens, not {type(model.target).__name__}")
