"""Other training recipes for the same rows, which throughput.py compares with ours.

- reference (Experiment 1): the reference's own experiment.py, which is no part of this repository.

- conventional: every row padded to the maximum length, LM logits at every position; on a language
  model also micro-batches of 8 x accumulation 2 and gradient checkpointing.

- ecosystem (language models): transformers' Trainer: padding to the longest row, gradient
  checkpointing, LM logits at every position.
"""

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import common
from collapse.config import LanguageModelConfig
from collapse.data.batches import Batch, Split, count_targets
from collapse.data.task import Task
from collapse.models.costs import now
from collapse.training.loop import StepSums
from collapse.utils.errors import UserError

RECIPES = ("conventional", "ecosystem", "ours")


class LogitsEverywhere:
    """Mixin of a trainer: makes LM logits at every position, including padding."""

    def lm_loss_sum(self, hidden: Tensor, batch: Batch) -> Tensor:
        targets = batch.input_ids.masked_fill(~batch.text_mask, -100)[:, 1:]  # (B, L - 1)
        logits = self.model.lm_head(hidden)[:, :-1].float()  # (B, L - 1, V)
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )

    def use_less_memory(self) -> None:
        """The recipe cannot use less memory, so it fails."""
        raise torch.OutOfMemoryError("the recipe runs out of memory")


class Conventional(LogitsEverywhere):
    """LogitsEverywhere that also pads every row to the maximum length."""

    def collate(self, rows: np.ndarray) -> Batch:
        batch = super().collate(rows)
        missing = self.config.max_length - batch.input_ids.shape[1]
        ids, mask = F.pad(batch.input_ids, (0, missing)), F.pad(batch.text_mask, (0, missing))
        return dataclasses.replace(batch, input_ids=ids, text_mask=mask)


def make_trainer(
    number: int, recipe: str, model: common.DualHeadModel, split: Split, settings
) -> common.Trainer:
    trainer = common.make_trainer(model, split, settings, common.find_arm(str(number)))
    mixed_in = {"conventional": Conventional, "ecosystem": LogitsEverywhere}.get(recipe)
    if mixed_in:
        kind = type(trainer)
        trainer.__class__ = type(f"{recipe} {kind.__name__}", (mixed_in, kind), {})
    if recipe == "ecosystem":
        trainer.optimizer = None  # transformers makes its own
    if recipe == "conventional" and isinstance(settings, LanguageModelConfig):
        trainer.micro_batch_size = 8
    return trainer


class EcosystemLoss(nn.Module):
    """A module for transformers' Trainer, whose output is the loss of our trainer's batch."""

    def __init__(self, trainer: common.Trainer):
        super().__init__()
        self.trainer, self.model = trainer, trainer.model

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        rows = rows.numpy(force=True)
        targets = count_targets(self.trainer.split, rows)
        sums = StepSums(rows=len(rows), targets=targets, steps=1)
        (sequence,) = self.trainer.sequences(rows)
        return {"loss": self.trainer.losses(sequence, sums)[0]}


class StepTimes(transformers.TrainerCallback):
    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.stamps: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.stamps.append(self.clock())

    on_step_end = on_step_begin


def ecosystem_seconds(
    trainer: common.Trainer, rows: np.ndarray, clock: Callable[[], float] = now
) -> float:
    """Seconds that transformers' Trainer takes for the rows.

    Measured from the start of its first step to the end of its last.
    """
    times, settings = StepTimes(clock), trainer.config
    with tempfile.TemporaryDirectory() as folder:  # it makes one, though it saves nothing
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=1,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip_norm,
            # rows are grouped by length already, better than it could with so few
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            bf16=False,  # the model itself multiplies in bfloat16, in every recipe
            use_cpu=trainer.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer_of_transformers = transformers.Trainer(
            EcosystemLoss(trainer),
            arguments,
            train_dataset=datasets.Dataset.from_dict({"rows": rows.tolist()}),
            callbacks=[times],
        )
        trainer_of_transformers.remove_callback(transformers.PrinterCallback)
        trainer_of_transformers.train()
    return times.stamps[-1] - times.stamps[0]


PUBLISHED_MODELS = ("Model1_SentimentOnly", "Model2_Dual", "Model3_Engram")


def load_published_script(path: Path, task: Task) -> ModuleType:
    """The reference's experiment.py, ready to train on these rows, on the CPU.

    It reads the hub and makes its folder as soon as it is imported: here it is given the rows, and
    makes none. Raises UserError for a file that does not have its parts.
    """
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--reference-script {path} is no Python file: give the experiment.py.")
    rows = {
        name: [
            {"sentence": text, "label": int(label)}
            for text, label in zip(split.texts, split.labels, strict=True)
        ]
        for name, split in (("train", task.train), ("validation", task.validation))
    }
    spec = importlib.util.spec_from_file_location("published_script", path)
    script = importlib.util.module_from_spec(spec)
    with (
        mock.patch.object(datasets, "load_dataset", lambda *_: rows),
        mock.patch.object(os, "makedirs"),
    ):
        spec.loader.exec_module(script)
    script.DEVICE = torch.device("cpu")  # where ours trains
    needed = (*PUBLISHED_MODELS, "train_epoch", "train_ds", "BATCH_SIZE", "LR")
    if missing := [name for name in needed if not hasattr(script, name)]:
        raise UserError(f"{path} is not the reference's experiment.py: no {', '.join(missing)}.")
    return script


def published_seconds(script: ModuleType, number: int, rows: np.ndarray) -> float:
    """Seconds that the reference's own loop takes for these training rows, with its own model."""
    model = getattr(script, PUBLISHED_MODELS[number - 1])().to(script.DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=script.LR)
    part = torch.utils.data.Subset(script.train_ds, rows.tolist())
    batches = torch.utils.data.DataLoader(part, batch_size=script.BATCH_SIZE)
    started = now()
    script.train_epoch(model, batches, optimizer, number)
    return now() - started


PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}  # in place or not


def matrix_share(trainer: common.Trainer, batches: Sequence[np.ndarray]) -> float:
    """Share of these steps' time that matrix products outside of fused attention take, profiled."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities) as profile,
        torch.profiler.record_function("steps"),
    ):
        for rows in batches:
            trainer.step(rows, trainer.config.learning_rate)
    events = {event.key: event for event in profile.key_averages()}
    products = [event for name, event in events.items() if name.rstrip("_") in PRODUCTS]
    return sum(e.self_cpu_time_total for e in products) / events["steps"].cpu_time_total
