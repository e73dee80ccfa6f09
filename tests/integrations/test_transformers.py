"""transformers' Trainer over blocks: the steps are our Trainer's to the bit, all around them is transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import diffusionblocks as db
import tiny_transformers as tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which transformers.Trainer needs
from diffusionblocks.integrations.transformers import DiffusionBlocksTrainer, batch_of  # noqa: E402

LLAMA, VIT = "LlamaForCausalLM", "ViTForImageClassification"


def dataset(name, size=16):
    x, y = tiny.batch(name, size)
    if name == VIT:
        return [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]
    return [{"input_ids": row, "labels": row} for row in torch.cat([x, y[:, -1:]], 1)]


def arguments(folder, **values):
    settings = dict(
        per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**settings, **values})


def trainer_of(name, args, **options):
    options = dict(train_dataset=dataset(name), offload="cpu", visit=1) | options
    return DiffusionBlocksTrainer(db.convert(tiny.network(name), 2), args, **options)


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(t, theirs[key]) for key, t in ours.items())


class Seen(transformers.TrainerCallback):
    def __init__(self):
        self.steps, self.saves = 0, 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1

    def on_save(self, *args, **kwargs):
        self.saves += 1


def test_steps_are_those_of_our_trainer(tmp_path):
    args = arguments(
        tmp_path, lr_scheduler_type="constant", train_sampling_strategy="sequential", gradient_accumulation_steps=2,
        max_grad_norm=0.5,
    )  # fmt: skip
    theirs = trainer_of(LLAMA, args)
    theirs.train()
    ours = db.Trainer(
        db.convert(tiny.network(LLAMA), 2), lr=1e-2, visit=1, weight_decay=0.0, clip=0.5, accumulate=2, seed=42,
        steps=6, device="cpu",
    )  # fmt: skip
    ours.learning_rate_of = lambda step, peak: peak
    x, y = tiny.batch(LLAMA, 16)
    for i in range(12):
        part = slice(4 * (i % 4), 4 * (i % 4) + 4)
        ours.step(x[part], y[part])
    assert theirs.blocks.steps_done == 6 and equal(theirs.model, ours.model)


def test_resume_is_bit_exact_and_a_checkpoint_is_a_model(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=3, logging_steps=2, warmup_steps=2)
    seen = Seen()
    whole, resumed = trainer_of(VIT, args, callbacks=[seen]), trainer_of(VIT, args)
    whole.train()
    assert (seen.steps, seen.saves) == (6, 2)
    rows = [row for row in whole.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6] and {row["block"] for row in rows} <= {0, 1}
    assert rows[0]["learning_rate"] == 5e-3 and rows[0]["grad_norm"] > 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(whole.model, resumed.model)
    x, _ = tiny.batch(VIT)
    assert torch.equal(db.load(tmp_path / "checkpoint-6")(x), whole.model.eval()(x))


def test_evaluation_sees_the_answer(tmp_path):
    trainer = trainer_of(
        VIT, arguments(tmp_path, max_steps=40), eval_dataset=dataset(VIT), ema=0.9,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before and after["eval_accuracy"] > 0.4  # chance is 0.2
    assert trainer.evaluate()["eval_loss"] == after["eval_loss"]


@pytest.mark.parametrize(("values", "options", "words"), [
    (dict(label_smoothing_factor=0.1), {}, "label_smoothing_factor=0.1"),
    (dict(gradient_checkpointing=True), {}, "checkpoint_layers=True"),
    (dict(optim="adafactor"), {}, "optimizer= here"),
    (dict(lr_scheduler_type="greedy", eval_strategy="epoch"), {}, "lr_scheduler_type"),
    ({}, dict(lr=1e-3), "learning_rate"),
    ({}, dict(train_blocks=(0,)), "diffusionblocks.Trainer"),
])  # fmt: skip
def test_what_blocks_cannot_honour_is_refused(values, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer_of(VIT, arguments(tmp_path, **values), **options)


def test_unknown_settings_and_metrics_without_logits_are_refused(tmp_path):
    for wrong, words in (("offlaod", "no setting 'offlaod'; perhaps offload"), ("slot", "perhaps slots"),
                         ("optimizers", "optimizers: blocks have one each, of optimizer=")):  # fmt: skip
        with pytest.raises(TypeError, match=words):
            trainer_of(VIT, arguments(tmp_path), **{wrong: 2})
    with pytest.raises(ValueError, match="compute_metrics"):
        model = tiny.convert(tiny.network("BertForMaskedLM"))
        DiffusionBlocksTrainer(model, arguments(tmp_path), compute_metrics=len)


def test_another_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a DiffusionBlocks"):
        DiffusionBlocksTrainer(tiny.network(VIT), arguments(tmp_path))


def test_epochs_that_end_within_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="doesn't divide the 4 batches"):
        trainer_of(VIT, arguments(tmp_path, gradient_accumulation_steps=3)).train()


def test_batches_of_collators():
    ids = torch.tensor([[3, 4, 5, 6]])
    causal, masked = (tiny.convert(tiny.network(name)) for name in (LLAMA, "BertForMaskedLM"))
    x, y = batch_of(causal, {"input_ids": ids, "labels": ids})
    assert x.tolist() == [[3, 4, 5]] and y.tolist() == [[4, 5, 6]]
    x, y = batch_of(masked, {"input_ids": torch.where(ids == 4, 19, ids), "labels": torch.where(ids == 4, ids, -100)})
    assert x.shape == (1, 0) and torch.equal(y, ids)
    assert batch_of(causal, {"input_ids": ids, "position_ids": torch.arange(4)})[0].tolist() == [[3, 4, 5]]
    texts = tiny.convert(tiny.network("BertForSequenceClassification"))
    padded = {"input_ids": torch.tensor([[3, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    padded |= {"token_type_ids": torch.zeros(1, 3, dtype=torch.int64), "position_ids": torch.tensor([[0, 1, 1]])}
    assert batch_of(texts, {**padded, "labels": torch.tensor([1])})[1].tolist() == [1]


@pytest.mark.parametrize(("name", "inputs", "words"), [
    (LLAMA, dict(input_ids=[[3, 4]], labels=[[-100, 4]]), "prompts"),
    (LLAMA, dict(input_ids=[[3, 2]], attention_mask=[[1, 0]]), "pack texts"),
    ("BertForSequenceClassification", dict(input_ids=[[3, 5]], attention_mask=[[1, 0]], labels=[1]), "pad_token_id"),
    (VIT, dict(image=[[1]]), "batch="),
    ("BertForSequenceClassification", dict(input_ids=[[3, 5]], token_type_ids=[[0, 1]], labels=[1]), "ids must be 0"),
    (LLAMA, dict(input_ids=[[3, 4, 5]], position_ids=[[0, 1, 0]]), "position_ids must be 0, 1, 2 and so on"),
])  # fmt: skip
def test_batches_that_would_be_taken_wrongly_are_refused(name, inputs, words):
    with pytest.raises(ValueError, match=words):
        batch_of(tiny.convert(tiny.network(name)), {key: torch.tensor(value) for key, value in inputs.items()})


@pytest.mark.parametrize("bf16", [False, True])
def test_training_again_goes_on(tmp_path, bf16):
    trainer = trainer_of(VIT, arguments(tmp_path, max_steps=1, bf16=bf16))
    for _ in range(2):
        trainer.train()
    assert trainer.state.global_step == 1 and trainer.blocks.steps_done == 1
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
